"""CuTe DSL -> machine code and launch facts, on a machine without a GPU or driver. The kernels of this folder compile by it.

Pointers and scalars are launched like any kernel's; a tensor map is a structure of 128 bytes, a TMA tensor its extents as
int32, all by value. `parameters` says the sizes, read off the PTX, so that a launch can be compared with them.
"""

import re
import tempfile
from dataclasses import dataclass
from typing import Any

from cutlass import cute
from cutlass.cute.runtime import make_fake_stream

__all__ = ["Compiled", "compile_offline"]

PARAMETER_BYTES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4, "u16": 2, "u8": 1}
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.ptr[\w\s.]*?)?\s+\S+_param_\d+(?:\[(\d+)\])?")
CONFIGURATION = r"struct<\(array<3 x i32>, array<3 x i32>, i64"        # grid, block, dynamic shared memory
SHARED = re.compile(rf"getelementptr %\w+\[0, 2\][^\n]*{CONFIGURATION}[^\n]*\n\s*llvm\.store (%\w+), ")


@dataclass(frozen=True, slots=True)
class Compiled:
    """Machine code, its kernel's name, and what a launch needs to know."""

    code: bytes
    symbol: str
    launch: dict[str, Any]


def compile_offline(kernel: Any, arguments: tuple[Any, ...], target: str) -> Compiled:
    """Compile a kernel class's __call__ for such arguments; its `launch` tells what is the kernel's own."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"--gpu-arch {target} --keep-ptx --keep-cubin --dump-dir {folder}"
        compiled = cute.compile(kernel, *arguments, make_fake_stream(), options=options)
        code, ptx, host = bytes(compiled.__cubin__), str(compiled.__ptx__), str(compiled.ir_module)
    (symbol,) = compiled.kernel_info
    facts = {"parameters": parameter_bytes(ptx), "shared_bytes": dynamic_shared_bytes(host)}
    return Compiled(code, symbol, kernel.launch | facts)


def parameter_bytes(ptx: str) -> list[int]:
    """The sizes of the kernel's parameters, from its declaration."""
    entry = ptx[ptx.index(".visible .entry") :]
    found = PARAMETER.findall(entry[: entry.index(")")])
    return [int(count) if count else PARAMETER_BYTES[kind] for kind, count in found]


def dynamic_shared_bytes(host: str) -> int:
    """What the host function that CuTe DSL generates puts into the launch's configuration."""
    stored = SHARED.search(host)
    constant = stored and re.search(re.escape(stored[1]) + r" = llvm\.mlir\.constant\((\d+) : i64\)", host)
    if not constant:
        raise RuntimeError("CuTe DSL's host function is not as in 4.8: pip install 'nvidia-cutlass-dsl==4.8.*'")
    return int(constant[1])
