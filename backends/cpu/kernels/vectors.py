"""A few instructions on vectors of 16 lanes, written as LLVM code, because neither Numba nor LLVM finds them by itself.

integer.py builds its products with an Emitter. Functions that are built so are called by address, see `call`: a kernel that
calls them is compiled once, whatever types of weights there are.
"""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["LANES", "Emitter", "Value", "call", "has_byte_products", "tools"]

LANES = 16
INT, FLOAT, ADDRESS = ir.IntType(32), ir.FloatType(), ir.IntType(64)
INTS, FLOATS, HALF_FLOATS = (ir.VectorType(kind, LANES) for kind in (INT, FLOAT, ir.HalfType()))
BYTES = ir.VectorType(ir.IntType(8), 4 * LANES)
FIRST_LANE = ir.Constant(INTS, [0] * LANES)
NEWER_SIGNATURES = (22,)     # of LLVM: from here on byte products take bytes

Value = Any     # of LLVM code; neither llvmlite nor this part of Numba has types
tools: Any = cgutils


def has_byte_products() -> bool:
    """Whether the machine that kernels are compiled for multiplies bytes: AVX-512 with VNNI."""
    from numba.core import config

    if config.CPU_FEATURES is not None:                 # type: ignore[attr-defined]  # NUMBA_CPU_FEATURES
        features = set(config.CPU_FEATURES.split(","))  # type: ignore[attr-defined]
        return {"+avx512vnni", "+avx512bw"} <= features
    if config.CPU_NAME is not None:                     # type: ignore[attr-defined]  # NUMBA_CPU_NAME: of another machine
        return False
    features_here = binding.get_host_cpu_features()
    return bool(features_here.get("avx512vnni") and features_here.get("avx512bw"))


class Emitter:
    """Writes instructions at a builder's place. Addresses are int64; offsets are in bytes."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def ints(self, value: int) -> Value:
        return ir.Constant(INTS, [value] * LANES)

    def floats(self, value: float) -> Value:
        return ir.Constant(FLOATS, [value] * LANES)

    def at(self, address: Value, *offsets: Value | int) -> Value:
        for offset in offsets:
            address = self.builder.add(address, ADDRESS(offset) if isinstance(offset, int) else offset)
        return address

    def times(self, index: Value, factor: int) -> Value:
        return self.builder.mul(index, ADDRESS(factor))

    def load(self, kind: ir.Type, address: Value, *offsets: Value | int) -> Value:
        pointer = self.builder.inttoptr(self.at(address, *offsets), kind.as_pointer())
        return self.builder.load(pointer, align=4)

    def store(self, value: Value, address: Value, *offsets: Value | int) -> None:
        self.builder.store(value, self.builder.inttoptr(self.at(address, *offsets), value.type.as_pointer()), align=4)

    def broadcast(self, kind: ir.VectorType, address: Value, *offsets: Value | int) -> Value:
        """One number of memory in all lanes."""
        return self.spread(self.load(kind.element, address, *offsets))

    def spread(self, scalar: Value) -> Value:
        nothing = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
        return self.builder.shuffle_vector(self.builder.insert_element(nothing, scalar, INT(0)), nothing, FIRST_LANE)

    def shifted(self, value: Value, left: int) -> Value:
        """To the left, or to the right where `left` is negative."""
        if left == 0:
            return value
        return self.builder.shl(value, self.ints(left)) if left > 0 else self.builder.lshr(value, self.ints(-left))

    def fused(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, rounded once."""
        return self.call("llvm.fma.v16f32", FLOATS, a, b, c)

    def prefetch(self, address: Value, *offsets: Value | int) -> None:
        """Bring a cache line that will be read into all caches; an address that is nobody's does no harm."""
        pointer = self.builder.inttoptr(self.at(address, *offsets), ir.IntType(8).as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, INT(0), INT(3), INT(1))

    def byte_products(self, total: Value, unsigned: Value, signed: Value) -> Value:
        """Lanes of total + the sum of four products of bytes (vpdpbusd)."""
        name = "llvm.x86.avx512.vpdpbusd.512"
        if binding.llvm_version_info >= NEWER_SIGNATURES:
            unsigned, signed = self.builder.bitcast(unsigned, BYTES), self.builder.bitcast(signed, BYTES)
        return self.call(name, INTS, total, unsigned, signed)

    def look_up(self, table: Value, bytes_: Value) -> Value:
        """table[byte] of every byte below 16; table: 16 bytes, four times (vpshufb)."""
        chosen = self.call(
            "llvm.x86.avx512.pshuf.b.512", BYTES, self.builder.bitcast(table, BYTES), self.builder.bitcast(bytes_, BYTES)
        )
        return self.builder.bitcast(chosen, INTS)

    def call(self, name: str, result: ir.Type, *arguments: Value) -> Value:
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(tools.get_or_insert_function(self.builder.module, signature, name), arguments)


typed_intrinsic: Any = intrinsic


@typed_intrinsic  # type: ignore[untyped-decorator]
def call(_context: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at an address with a tuple of int64."""

    def generate(_target: Any, builder: ir.IRBuilder, signature: Any, values: list[Value]) -> Value:
        given = tools.unpack_tuple(builder, values[1], len(signature.args[1]))
        function = ir.FunctionType(ir.VoidType(), [ADDRESS] * len(given))
        builder.call(builder.inttoptr(values[0], function.as_pointer()), given)
        return _target.get_dummy_value()

    return types.void(types.int64, arguments), generate
