"""CUDA C++ -> machine code by NVRTC, which needs no GPU. compile.py calls it, and the bundle's command.

The instantiations that are wanted of a file are compiled together. Headers come from wheels or an installed CUDA.
"""

import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backends.cuda.cubins import KERNELS, Cubin, KernelFacts
from engine.errors import DeviceUnavailable

__all__ = ["compile_file", "compiler_version", "header_folders", "supported_targets"]

INSTALL = 'pip install "rillet[cuda]"'
ERROR_LINES = 6


@cache
def library() -> Any:
    """The bindings of NVRTC, with the library loaded. Raises DeviceUnavailable."""
    try:
        from cuda.bindings import nvrtc as bindings

        bindings.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise DeviceUnavailable(
            f"no compiler for kernels ({first_line(error)}): {INSTALL}, or set RILLET_CUDA_BUNDLE to the folder of a bundle "
            "that was made elsewhere with python -m backends.cuda.compile"
        ) from error
    return bindings


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


@cache
def compiler_version() -> str:
    _, major, minor = library().nvrtcVersion()
    return f"NVRTC {major}.{minor}"


@cache
def supported_targets() -> frozenset[int]:
    return frozenset(library().nvrtcGetSupportedArchs()[1])


@cache
def header_folders() -> tuple[Path, ...]:
    """Where cuda_bf16.h and nv/target are: of the wheels, or of an installed CUDA. Raises DeviceUnavailable."""
    package = find_spec("nvidia")
    places = [Path(at) for at in (package.submodule_search_locations or ()) if package] if package else []
    roots = [folder for at in places for folder in sorted(at.glob("*/include"), reverse=True)]
    roots += [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots.append(Path("/usr/local/cuda/include"))
    root = next((folder for folder in roots if (folder / "cuda_bf16.h").is_file()), None)
    extra = next((at for folder in roots for at in (folder / "cccl", folder) if (at / "nv" / "target").is_file()), None)
    if root is None or extra is None:
        raise DeviceUnavailable(
            "no CUDA headers (cuda_bf16.h, nv/target): pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl, "
            "or set CUDA_HOME to an installed CUDA 13"
        )
    return root, extra


def compile_file(file: str, names: Iterable[str], target: str, *, text: str | None = None) -> Cubin:
    """Compile the named instantiations of kernels/`file` for a target such as "sm_90a".

    `text` stands for the file's own. Raises DeviceUnavailable with the first lines of what the compiler says.
    """
    compiler, names = library(), sorted(set(names))
    source = (KERNELS / file).read_text(encoding="utf-8") if text is None else text
    options = [f"--gpu-architecture={target}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"--include-path={folder}" for folder in (KERNELS, *header_folders())]
    program = succeed(compiler.nvrtcCreateProgram(source.encode(), file.encode(), 0, [], []), file)
    try:
        for name in names:
            succeed(compiler.nvrtcAddNameExpression(program, name.encode()), file)
        outcome = compiler.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        said = read(compiler.nvrtcGetProgramLogSize, compiler.nvrtcGetProgramLog, program).decode(errors="replace")
        if int(outcome[0]):
            raise DeviceUnavailable(f"{file} cannot be compiled for {target} by {compiler_version()}:\n{first_errors(said)}")
        code = read(compiler.nvrtcGetCUBINSize, compiler.nvrtcGetCUBIN, program)
        symbols = {name: succeed(compiler.nvrtcGetLoweredName(program, name.encode()), file).decode() for name in names}
    finally:
        compiler.nvrtcDestroyProgram(program)
    return Cubin(code, {name: facts_of(symbol, said) for name, symbol in symbols.items()})


def succeed(result: tuple[Any, ...], file: str) -> Any:
    """What a call of NVRTC returns beside its code."""
    if int(result[0]):
        raise DeviceUnavailable(f"{file} cannot be compiled: NVRTC says {result[0]!r}")
    return result[1] if len(result) > 1 else None


def read(size_of: Callable[[Any], tuple[Any, int]], content_of: Callable[[Any, bytes], Any], program: Any) -> bytes:
    """NVRTC fills what it is given."""
    content = b" " * size_of(program)[1]
    content_of(program, content)
    return content


def first_errors(said: str) -> str:
    lines = said.rstrip("\0\n ").splitlines()
    start = next((i for i, line in enumerate(lines) if "error" in line), 0)
    return "\n".join(lines[start : start + ERROR_LINES])


def facts_of(symbol: str, said: str) -> KernelFacts:
    """The assembler's lines on one kernel."""
    _, _, after = said.partition(f"Compiling entry function '{symbol}'")
    lines = after.partition("Compiling entry function")[0]

    def number(pattern: str) -> int:
        found = re.search(pattern, lines)
        return int(found[1]) if found else 0

    return KernelFacts(
        symbol, registers=number(r"Used (\d+) registers"), stack_bytes=number(r"(\d+) bytes stack frame"),
        spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        shared_bytes=number(r"(\d+) bytes smem"),
    )  # fmt: skip
