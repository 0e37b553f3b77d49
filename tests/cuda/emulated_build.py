"""Builds .cu files with g++ for the emulated device, and calls what came out.

A library is built once for the same texts and kept in the folder for temporary files. emulated_device.py calls compiled().
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path

from backends.cuda.device import Array
from engine.errors import StepFailed
from tests.cuda.emulated_memory import PAGE, libc, reserve

__all__ = ["KERNELS", "compiled"]

HERE = Path(__file__).parent
KERNELS = Path(__file__).parents[2] / "backends" / "cuda" / "kernels"
STACK_BYTES, MOST_THREADS = 128 << 10, 1024
SCALARS = {"int32": (ctypes.c_int32, "i32"), "uint32": (ctypes.c_uint32, "i32"), "int64": (ctypes.c_int64, "i64"),
           "float32": (ctypes.c_float, "f32")}  # fmt: skip
SAME_ITEMS = {"u32": "i32"}
BOUNDS = re.compile(
    r"(?P<template>template\s*<[^;{}()]*>\s*)?(?:static\s+)?__global__\s+void\s+"
    r"__launch_bounds__\((?P<threads>(?:[^(),]|\([^()]*\))+)(?:,(?:[^()]|\([^()]*\))*)?\)\s*(?P<name>\w+)\s*\("
)


# ---- calling ------------------------------------------------------------------------------------------------------------


@functools.cache
def stacks():
    """The first stack and the distance between two: each has a page before it that faults."""
    stride = STACK_BYTES + PAGE
    base = reserve(MOST_THREADS * stride)
    for thread in range(MOST_THREADS):
        libc.mprotect(base + thread * stride + PAGE, STACK_BYTES, 3)
    return base, stride


@functools.cache
def load(path):
    """A library; calls keep Python's lock, so that launches of several threads come one after another."""
    library = ctypes.PyDLL(path)
    library.emulated_message.restype = ctypes.c_char_p
    library.emulated_fault_address.restype = ctypes.c_void_p
    library.emulated_use_stacks(*(ctypes.c_size_t(n) for n in stacks()))
    return library


class Function:
    """A kernel in a shared library."""

    def __init__(self, kernel, library, symbol):
        self.kernel, self.library = kernel, library
        self.launcher = getattr(library, symbol)
        self.most_threads = getattr(library, symbol + "_threads")()
        kind = getattr(library, symbol + "_argument")
        kind.restype, kind.argtypes = ctypes.c_char_p, [ctypes.c_size_t]
        self.kinds = []
        while (found := kind(len(self.kinds))) is not None:
            self.kinds.append(found.decode())

    def values(self, arguments):
        """The arguments as C has them. Raises StepFailed if the kernel takes others."""
        if len(arguments) != len(self.kinds):
            raise StepFailed(f"{self.kernel.name}: {len(arguments)} arguments are given, it takes {len(self.kinds)}")
        return [self.value(place, *pair) for place, pair in enumerate(zip(arguments, self.kinds, strict=True))]

    def value(self, place, argument, kind):
        name = type(argument).__name__
        if isinstance(argument, Array) or type(argument) is int:
            item = SAME_ITEMS.get(argument.item, argument.item) if isinstance(argument, Array) else None
            if not kind.startswith("*"):
                raise StepFailed(f"{self.kernel.name}: argument {place} is a pointer, the kernel takes a number ({kind})")
            if item not in (None, "u8") and kind not in ("*", "*" + item):
                raise StepFailed(f"{self.kernel.name}: argument {place} has {item}, the kernel takes a pointer to {kind[1:]}")
            return ctypes.c_void_p(argument.address if isinstance(argument, Array) else argument)
        if name not in SCALARS:
            raise StepFailed(f"{self.kernel.name}: argument {place} is a {name}: give an Array, an int or a NumPy scalar")
        c_type, given = SCALARS[name]
        if given != kind:
            raise StepFailed(f"{self.kernel.name}: argument {place} is a {name}, the kernel takes {kind}")
        return c_type(argument)

    def __call__(self, grid, threads, shared_bytes, values, seed):
        """What went wrong, and the address that was touched, if any was; None if nothing did."""
        pointers = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(value) for value in values])
        failed = self.launcher(
            (ctypes.c_uint * 3)(*grid), ctypes.c_uint(threads), ctypes.c_size_t(shared_bytes), pointers, ctypes.c_uint(seed)
        )
        return (self.library.emulated_message().decode(), self.library.emulated_fault_address()) if failed else None


# ---- building -----------------------------------------------------------------------------------------------------------


@functools.cache
def cuda_headers():
    """The folder of cuda_bf16.h, from the wheel nvidia-cuda-runtime or an installed CUDA."""
    package = importlib.util.find_spec("nvidia")
    places = [Path(at) for at in (package.submodule_search_locations if package else [])]
    found = [header.parent for at in places for header in at.glob("*/include/cuda_bf16.h")]
    for folder in [*found, Path("/usr/local/cuda/include")]:
        if (folder / "cuda_bf16.h").is_file():
            return folder
    raise FileNotFoundError("no CUDA headers: pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl")


@functools.cache
def options():
    """Of g++: vectors of 32 bytes where this CPU has them; products and sums are not fused, so that results are the same."""
    found = ["-std=c++17", "-O1", "-w", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-gnu-unique"]
    found.append("-U_FORTIFY_SOURCE")                # it takes the way out of a fiber for an attack
    if platform.machine() == "x86_64" and {"avx2", "fma", "bmi2"} <= set(Path("/proc/cpuinfo").read_text().split()):
        found += ["-march=x86-64-v3", "-mno-vzeroupper"]
    return found


@functools.cache
def build_folder():
    folder = Path(tempfile.gettempdir()) / f"rillet-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is somebody else's"
    return folder


def digest(*texts):
    return hashlib.sha256("\0".join([*options(), *texts]).encode()).hexdigest()[:24]


def gxx(source, target, *more):
    part = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run(["g++", *options(), *more, str(source), "-o", str(part)], capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(done.stderr[:4000])
    part.replace(target)


@functools.cache
def precompiled():
    """A folder with emulated.h as g++ reads it fastest."""
    texts = {name: (HERE / name).read_text() for name in ("emulated.h", "emulated_threads.h")}
    folder = build_folder() / f"headers-{digest(*texts.values())}"
    if not (folder / "emulated.h.gch").exists():
        folder.mkdir(exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
        gxx(folder / "emulated.h", folder / "emulated.h.gch", "-I", str(cuda_headers()), "-x", "c++-header")
    return folder


def entries(text, kernels):
    """C++ that makes each kernel callable, and tells its launch bounds."""
    bounds = {}
    lines = []
    for found in BOUNDS.finditer(text):
        name = found["name"]
        bounds[name] = f"launch_bounds_of_{name}"
        lines.append(f"{found['template'] or ''}constexpr unsigned {bounds[name]}() {{ return {found['threads']}; }}")
    for i, kernel in enumerate(kernels):
        name, bracket, arguments = kernel.name.partition("<")
        most = f"{bounds[name]}{bracket}{arguments}()" if name in bounds else "1024"
        lines.append(f'KERNEL_ENTRY(entry_{i}, {kernel.name})\nextern "C" unsigned entry_{i}_threads() {{ return {most}; }}')
    return "\n".join(lines)


def compiled(file, kernels, texts, edits):
    """Kernel -> Function, all of one file. texts: {file: text}, more files; edits: {file: function of its text}."""
    sources = {path.name: path.read_text() for path in [*sorted(KERNELS.glob("*.cuh")), KERNELS / file] if path.exists()}
    sources |= texts
    for name, edit in edits.items():
        if name in sources:
            changed = edit(sources[name])
            assert changed != sources[name], f"the edit changes nothing of {name}"
            sources[name] = changed
    text = sources.pop(file)
    headers = {name: one for name, one in sources.items() if name.endswith(".cuh")}
    whole = f'#include "emulated.h"\n#line 1 "{file}"\n{text}\n{entries(text, kernels)}\n'
    folder = precompiled()
    key = digest(folder.name, whole, *headers, *headers.values())
    library = build_folder() / f"{Path(file).stem}-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=build_folder()) as place:
            for name, one in headers.items():
                (Path(place) / name).write_text(one)
            source = Path(place) / "kernels.cpp"
            source.write_text(whole)
            gxx(source, library, "-I", str(folder), "-I", str(cuda_headers()), "-shared")
    loaded = load(str(library))
    return {kernel: Function(kernel, loaded, f"entry_{i}") for i, kernel in enumerate(kernels)}


