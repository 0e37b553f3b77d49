"""y = x W^T by products of bytes, for machines that have them (AVX-512 with VNNI): two to four times as fast, and as exact.

A quantized weight is a byte w of its word, put there by shifts and masks (planes.py tells the layout); 32 values of x are
integers of three bytes (digits.py), x = s (65536 high + 256 middle + low). So the sum over a group is exact, three integer
sums in all; only the closing of a group is in float32:

    y += scale (s (65536 H + 256 M + L) / 256 - sum(x) / 2)             symmetric types
    y += scale (s (65536 H + 256 M + L) / 256) + minimum sum(x)         types with minima

Outputs are summed over the groups in ascending order, the same for any number of tokens. The function for one kind of
weight and one number of tokens is built with vectors.py; `products` calls it by its address, for 32 rows at a time.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import cfunc, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from backends.cpu.kernels.digits import COLUMNS, HALF_SUM, HIGH, HIGH_SCALE, LOW, MIDDLE, RECORD, SCALE, SUM
from backends.cpu.kernels.jit import LANES, OPTIONS, inner, kernel, signed
from backends.cpu.kernels.sharing import new_shares, next_task
from backends.cpu.kernels.vectors import FLOATS, HALF_FLOATS, INTS, Emitter, Value, call, tools
from backends.cpu.kernels.vectors import LANES as WIDTH

__all__ = ["FEW", "MATRIX", "TILE", "Kind", "block_totals", "function_of", "products"]

Floats = NDArray[np.float32]
Words = NDArray[np.uint32]

FEW, TILE = 4, 8           # tokens that share one decoding: of all 32 rows, and of 16 and then the others
WORD_BYTES = 4 * LANES     # of one word of each of 32 rows
HALVES = range(LANES // WIDTH)
CACHE_LINE, AHEAD = 64, 4096   # bytes


# ---- the function of a kind of weight -----------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How a matrix rests. Numbers that a function is built for."""

    low_bits: int
    high_bits: int         # 0: no second plane
    coded: int             # 1: the byte is looked up in 16 others
    halves: int            # 1: scales and minima are float16
    factor: int            # what a scale is of 256 in a byte
    minima: int            # 1: there are minima
    fine: int              # 1: scales and minima are multiplied by fine ones
    group: int             # columns of a group: 16 or 32
    span: int              # columns of a coarse scale: 16, 32 or 256


class Operands(NamedTuple):
    """Addresses for 32 rows of weights and a tile of tokens."""

    low: Value
    high: Value
    table: Value
    scale: Value
    minimum: Value
    fine: Value
    fine_minimum: Value
    x: Value            # the first token's records
    x_stride: Value     # bytes to the next token's
    records: Value      # how many
    out: Value          # (tokens, 32) float32


class Weights:
    """Writes the decoding of 32 rows' weights."""

    def __init__(self, emitter: Emitter, kind: Kind, operands: Operands) -> None:
        self.emit, self.kind, self.operands = emitter, kind, operands

    def bytes_of(self, record: Value, step: int, half: int) -> Value:
        """The weights of columns 4 step .. 4 step + 3 of a record, for 16 rows, full to the left."""
        kind, emit = self.kind, self.emit
        value = self.plane(self.operands.low, kind.low_bits, 8 - kind.low_bits - kind.high_bits, record, step, half)
        if kind.high_bits:
            high = self.plane(self.operands.high, kind.high_bits, 8 - kind.high_bits, record, step, half)
            value = emit.builder.or_(value, high)
        if kind.coded:
            index = emit.builder.and_(emit.shifted(value, -4), emit.ints(0x0F0F0F0F))
            return emit.look_up(emit.load(INTS, self.operands.table), index)
        return value

    def plane(self, address: Value, bits: int, up: int, record: Value, step: int, half: int) -> Value:
        """Fields of a plane's words, moved to bit `up` of their bytes; the others are masked."""
        fields = 8 // bits
        words = 8 * bits // 8                            # of a record
        place = self.emit.times(record, words * WORD_BYTES)
        word = self.emit.load(INTS, address, place, (step // fields) * WORD_BYTES + 64 * half)
        moved = self.emit.shifted(word, up - bits * (step % fields))
        return self.emit.builder.and_(moved, self.emit.ints(((1 << bits) - 1 << up) * 0x01010101)) if bits < 8 else moved

    def scales_of(self, coarse: Value, fine: Value, factor: int, record: Value, part: int, half: int) -> Value:
        """Scales or minima of a record's only group, or of its first or second one, times the factor."""
        emit, kind = self.emit, self.kind
        builder = emit.builder
        parts = COLUMNS // kind.group
        group = builder.add(emit.times(record, parts), record.type(part))
        coarse_groups = kind.span // kind.group
        number = group if coarse_groups == 1 else builder.lshr(group, record.type(coarse_groups.bit_length() - 1))
        if kind.halves:
            bits = emit.load(HALF_FLOATS, coarse, emit.times(number, WORD_BYTES // 2), 32 * half)
            scale = builder.fpext(bits, FLOATS)
        else:
            scale = emit.load(FLOATS, coarse, emit.times(number, WORD_BYTES), 64 * half)
        scale = scale if factor == 1 else builder.fmul(scale, emit.floats(factor))
        if not kind.fine:
            return scale
        word = emit.load(INTS, fine, emit.times(builder.lshr(group, group.type(2)), WORD_BYTES), 64 * half)
        place = builder.trunc(builder.shl(builder.and_(group, group.type(3)), group.type(3)), ir.IntType(32))
        byte = builder.and_(builder.lshr(word, emit.spread(place)), emit.ints(255))
        return builder.fmul(scale, builder.sitofp(builder.sub(byte, emit.ints(128)), FLOATS))


def build(emit: Emitter, kind: Kind, tokens: int, operands: Operands) -> None:
    """Write the products of 32 rows with `tokens` tokens."""
    builder, weights = emit.builder, Weights(emit, kind, operands)
    stride = operands.x_stride
    x = [emit.at(operands.x, builder.mul(stride, stride.type(token))) for token in range(tokens)]
    for halves in [HALVES] if tokens <= FEW else [[half] for half in HALVES]:      # as many sums as there are registers
        build_halves(emit, weights, x, halves)


def build_halves(emit: Emitter, weights: Weights, x: list[Value], halves: Sequence[int]) -> None:
    """Write the products of some of the rows with all tokens, whose records are at x."""
    builder, kind, operands = emit.builder, weights.kind, weights.operands
    totals = [[tools.alloca_once_value(builder, emit.floats(0)) for _ in halves] for _ in x]
    steps = kind.group // 4
    with tools.for_range(builder, operands.records) as loop:
        place = emit.times(loop.index, 4 * RECORD)
        size = kind.low_bits * WORD_BYTES                # of a record's words
        for line in range(0, size, CACHE_LINE):          # each cache line is asked for 4 KiB early
            emit.prefetch(operands.low, emit.times(loop.index, size), AHEAD + line)
        for part in range(COLUMNS // kind.group):
            sums = [[[emit.ints(0)] * 3 for _ in halves] for _ in x]
            for step in range(part * steps, (part + 1) * steps):
                bytes_ = [weights.bytes_of(loop.index, step, half) for half in halves]
                for token, records in enumerate(x):
                    for digit, at in enumerate((HIGH, MIDDLE, LOW)):
                        four = emit.broadcast(INTS, records, place, 4 * (at + step))
                        for i, weight in enumerate(bytes_):
                            sums[token][i][digit] = emit.byte_products(sums[token][i][digit], weight, four)
            close_group(emit, weights, part, loop.index, place, x, halves, sums, totals)
    for token, mine in enumerate(totals):
        for half, total in zip(halves, mine, strict=True):
            emit.store(builder.load(total), operands.out, (token * LANES + WIDTH * half) * 4)


def close_group(
    emit: Emitter, weights: Weights, part: int, record: Value, place: Value, x: list[Value], halves: Sequence[int],
    sums: list[list[list[Value]]], totals: list[list[Value]],
) -> None:  # fmt: skip
    """Add a group's sums to the totals of its tokens, as the module's formula says."""
    builder, kind, operands = emit.builder, weights.kind, weights.operands
    which = 0 if kind.group == COLUMNS else 1 + part     # of the three sums in a record
    scale = [weights.scales_of(operands.scale, operands.fine, kind.factor, record, part, half) for half in halves]
    minimum = [
        weights.scales_of(operands.minimum, operands.fine_minimum, 1, record, part, half) for half in halves if kind.minima
    ]
    for token, mine in enumerate(sums):
        low_scale, high_scale, x_sum = (
            emit.broadcast(FLOATS, x[token], place, 4 * at)
            for at in (SCALE, HIGH_SCALE, (SUM if kind.minima else HALF_SUM) + which)
        )
        for i, (high, middle, low) in enumerate(mine):
            below = builder.sitofp(builder.add(emit.shifted(middle, 8), low), FLOATS)
            value = builder.fmul(below, low_scale) if kind.minima else emit.fused(below, low_scale, x_sum)
            value = emit.fused(builder.sitofp(high, FLOATS), high_scale, value)
            total = emit.fused(scale[i], value, builder.load(totals[token][i]))
            if kind.minima:
                total = emit.fused(minimum[i], x_sum, total)
            builder.store(total, totals[token][i])


intrinsic_of_literals: Any = intrinsic(prefer_literal=True)


@intrinsic_of_literals  # type: ignore[untyped-decorator]
def product(
    _context: Any, low_bits: Any, high_bits: Any, coded: Any, halves: Any, factor: Any, minima: Any, fine: Any, group: Any,
    span: Any, tokens: Any, operands: Any,
) -> Any:  # fmt: skip
    """What build() writes. All but the operands are constants."""
    constants = (low_bits, high_bits, coded, halves, factor, minima, fine, group, span, tokens)

    def generate(target: Any, builder: ir.IRBuilder, signature: Any, values: list[Value]) -> Value:
        given = Operands(*tools.unpack_tuple(builder, values[-1], len(Operands._fields)))
        build(Emitter(builder), Kind(*(c.literal_value for c in constants[:-1])), constants[-1].literal_value, given)
        return target.get_dummy_value()

    return types.void(*constants, operands), generate


SIGNATURE: Any = types.void(*[types.int64] * len(Operands._fields))


@cache
def function_of(kind: Kind, tokens: int) -> Any:
    """The compiled function for a kind of weight and a number of tokens; its .address is what `products` calls."""
    low_bits, high_bits, coded, halves, factor, minima, fine, group, span = kind

    def product_of_kind(a, b, c, d, e, f, g, h, i, j, k):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        product(
            low_bits, high_bits, coded, halves, factor, minima, fine, group, span, tokens, (a, b, c, d, e, f, g, h, i, j, k)
        )  # fmt: skip

    compiled: Any = cfunc
    try:
        return compiled(SIGNATURE, cache=True, **OPTIONS)(product_of_kind)
    except RuntimeError:       # no folder for the cache: jit.kernel has said it
        return compiled(SIGNATURE, **OPTIONS)(product_of_kind)


# ---- whole matrices -----------------------------------------------------------------------------------------------------

MATRIX = np.dtype(
    [
        (name, np.int64)
        for name in (
            "one", "few", "many", "low", "high", "table", "scale", "minimum", "fine", "fine_minimum", "low_stride",
            "high_stride", "scale_stride", "minimum_stride", "fine_stride", "rows", "blocks", "records",
        )
    ]
)  # fmt: skip
"""A matrix as the kernels see it: functions and arrays by address, and bytes from 32 rows to the next 32."""


@inner
def block_totals(
    matrices: NDArray[Any], number: int, records: Words, b: int, t: int, tokens: int, total: Floats
) -> None:
    """The products of 32 rows with the tokens from t on, a tile of them at most, (TILE, 32)."""
    m = matrices[number]
    row_bytes = records.shape[1] * RECORD * 4
    call(
        m.one if tokens == 1 else (m.few if tokens - t <= FEW else m.many),
        (
            m.low + b * m.low_stride, m.high + b * m.high_stride, m.table, m.scale + b * m.scale_stride,
            m.minimum + b * m.minimum_stride, m.fine + b * m.fine_stride, m.fine_minimum + b * m.fine_stride,
            np.int64(records.ctypes.data) + t * row_bytes, row_bytes, m.records, np.int64(total.ctypes.data),
        ),
    )  # fmt: skip


@inner
def block_products(
    matrices: NDArray[Any], number: int, records: Words, b: int, tokens: int, out: Floats, first: int, add: bool
) -> None:
    """The products of 32 rows with all tokens."""
    total = np.empty((TILE, LANES), np.float32)
    start = first + b * LANES
    width = min(LANES, matrices[number].rows - b * LANES)
    for t in range(0, tokens, TILE):
        block_totals(matrices, number, records, b, t, tokens, total)
        for i in range(min(TILE, tokens - t)):
            if add:
                for r in range(width):
                    out[t + i, start + r] += total[i, r]
            else:
                for r in range(width):
                    out[t + i, start + r] = total[i, r]


@inner
def share_products(
    matrices: NDArray[Any], number: int, records: Words, tokens: int, out: Floats, first: int, add: bool,
    shares: NDArray[np.int64], worker: int,
) -> int:
    """What one thread does of the blocks, and how many they are."""
    blocks, done = matrices[number].blocks, 0
    b = next_task(shares, worker, blocks)
    while b >= 0:
        block_products(matrices, number, records, b, tokens, out, first, add)
        b = next_task(shares, worker, blocks)
        done += 1
    return done


@kernel
def products(
    matrices: NDArray[Any], number: int, records: Words, out: Floats, first: int, add: bool, tokens: int, workers: int
) -> None:
    """out[:tokens, first : first + rows] = (or +=, if add) x W^T, for matrices[number].

    records: (T rounded up to a tile, columns / 32, RECORD).
    """
    shares = new_shares(workers)
    for worker in prange(workers):
        share_products(matrices, number, records, tokens, out, first, add, shares, signed(worker))
