"""Kernel files -> cubins: by NVRTC, or from a bundle or the cache. No GPU is needed, so CI and `python -m` do it too.

    python -m backends.cuda.compile --arch sm_90a --out DIR      makes a bundle; a machine without a compiler runs from it
    python -m backends.cuda.compile --all --report               registers, stack and spills of every kernel, everywhere

nvidia.py calls find_cubins(). CuTe DSL kernels (*.py) are compiled here only when nvidia-cutlass-dsl is installed.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TypeVar

from backends.cuda.bundle import Bundle, bundle_folder, write_bundle
from backends.cuda.cubins import Cubin, CubinCache, KernelFacts
from backends.cuda.device import Kernel
from backends.cuda.elf import resources_of
from backends.cuda.nvrtc import compile_file, compiler_version, supported_targets
from engine.errors import DeviceUnavailable

__all__ = ["ARCHITECTURES", "CUTLASS", "candidates", "find_cubins", "has_cutlass"]

log = logging.getLogger(__name__)
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")
WITH_OWN_INSTRUCTIONS = {"sm_90": "sm_90a", "sm_100": "sm_100a", "sm_103": "sm_103a"}
CUTLASS = (Kernel("dense_gemm.py", "dense_gemm"),)
In = TypeVar("In")
Out = TypeVar("Out")


# ---- architectures ------------------------------------------------------------------------------------------------------


def candidates(architecture: str) -> tuple[str, ...]:
    """Targets whose code runs on a device such as "sm_90", best first: its own, then lower ones of the same generation."""
    major, minor = divmod(int(architecture.removeprefix("sm_")), 10)
    lower = (f"sm_{major}{each}" for each in range(minor, -1, -1))
    own = WITH_OWN_INSTRUCTIONS.get(architecture)
    return (own, *lower) if own else tuple(lower)


# ---- CuTe DSL -----------------------------------------------------------------------------------------------------------


def has_cutlass() -> bool:
    return find_spec("nvidia_cutlass_dsl") is not None


def compile_with_cutlass(file: str, target: str) -> Cubin:
    """One file of cutlass_kernels/: its compile(target) gives code, symbol and launch facts."""
    if not has_cutlass():
        raise DeviceUnavailable(f"{file} needs CuTe DSL: pip install 'nvidia-cutlass-dsl[cu13]==4.8.*', or use a bundle")
    name = Path(file).stem
    compiled = import_module(f"backends.cuda.cutlass_kernels.{name}").compile(target)
    registers, stack_bytes = resources_of(compiled.code)[compiled.symbol]
    facts = KernelFacts(compiled.symbol, registers=registers, stack_bytes=stack_bytes, launch=compiled.launch)
    return Cubin(compiled.code, {name: facts})


# ---- finding ------------------------------------------------------------------------------------------------------------


def find_cubins(kernels: Iterable[Kernel], architecture: str) -> dict[str, Cubin]:
    """{file: cubin that has its kernels} for a device such as "sm_90": of the bundle, the cache, or compiled now.

    Files are compiled side by side. Raises DeviceUnavailable if a kernel cannot be had.
    """
    wanted = by_file(kernels)
    folder = bundle_folder()
    bundle = Bundle(folder) if folder else None
    found: dict[str, Cubin] = {}
    for file, members in wanted.items():
        for target in candidates(architecture) if bundle else ():
            assert bundle is not None
            if file not in found and (cubin := bundle.get(file, members, target)) is not None:
                found[file] = cubin
    missing = [file for file in wanted if file not in found]
    if not missing:
        return found
    try:
        supported = supported_targets()
    except DeviceUnavailable as error:
        raise DeviceUnavailable(f"{bundle.refusal}; {error}") if bundle else error from error
    targets = [each for each in candidates(architecture) if number_of(each) in supported]
    if not targets:
        raise DeviceUnavailable(f"{compiler_version()} knows no {architecture}: pip install --upgrade nvidia-cuda-nvrtc")
    target = targets[0]
    kept = CubinCache()

    def cubin_of(file: str) -> Cubin:
        names = [kernel.name for kernel in wanted[file]]
        key = kept.key(file, names, target, compiler_version())
        cubin = kept.get(key)
        if cubin is None or not cubin.has(names):
            began = monotonic()
            cubin = compile_with_cutlass(file, target) if file.endswith(".py") else compile_file(file, names, target)
            log.info("compiled %s for %s: %d kernels in %.1f s", file, target, len(names), monotonic() - began)
            kept.put(key, cubin)
        return cubin

    return found | dict(zip(missing, side_by_side(cubin_of, missing), strict=True))


def number_of(target: str) -> int:
    return int(re.sub(r"\D", "", target))


def by_file(kernels: Iterable[Kernel]) -> dict[str, list[Kernel]]:
    files: dict[str, list[Kernel]] = {}
    for kernel in dict.fromkeys(kernels):
        files.setdefault(kernel.file, []).append(kernel)
    return files


def side_by_side(work: Callable[[In], Out], items: Sequence[In]) -> list[Out]:
    with ThreadPoolExecutor(max(1, min(len(items), os.cpu_count() or 1))) as pool:
        return list(pool.map(work, items))


# ---- the command --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m backends.cuda.compile", description="Compile the kernels; no GPU is needed.")
    parser.add_argument("--arch", action="append", default=[], help="sm_80, sm_89, sm_90a, ...; may be given several times")
    parser.add_argument("--all", action="store_true", help=f"for {', '.join(ARCHITECTURES)}")
    parser.add_argument("--out", type=Path, help="write a bundle here")
    parser.add_argument("--report", action="store_true", help="print registers, stack and spills of every kernel")
    chosen = parser.parse_args(arguments)
    targets = tuple(dict.fromkeys([*chosen.arch, *(ARCHITECTURES if chosen.all else ())]))
    if not targets or not (chosen.out or chosen.report):
        parser.error("give --arch or --all, and --out or --report")
    from backends.cuda.catalogue import all_kernels  # it imports all that launches: not needed to load a kernel

    files = {file: [kernel.name for kernel in members] for file, members in by_file(all_kernels()).items()}
    try:
        jobs = [(file, target) for target in targets for file in files]
        cubins = dict(zip(jobs, side_by_side(lambda job: compile_file(job[0], files[job[0]], job[1]), jobs), strict=True))
        if has_cutlass():
            cubins |= cutlass_cubins(targets)
        if chosen.out:
            write_bundle(chosen.out, cubins, compiler_version())
    except (DeviceUnavailable, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if chosen.report:
        print_report(cubins)
    size = sum(len(cubin.code) for cubin in cubins.values())
    count = sum(len(cubin.kernels) for cubin in cubins.values())
    print(f"{count} kernels in {len(cubins)} cubins, {size:,} bytes" + (f" in {chosen.out}" if chosen.out else ""))
    return 0


def cutlass_cubins(targets: Iterable[str]) -> dict[tuple[str, str], Cubin]:
    """Those targets that a CuTe DSL kernel is written for; others have its CUDA C++ sibling."""
    cubins: dict[tuple[str, str], Cubin] = {}
    for kernel in CUTLASS:
        written_for = import_module(f"backends.cuda.cutlass_kernels.{Path(kernel.file).stem}").TARGETS
        cubins |= {(kernel.file, each): compile_with_cutlass(kernel.file, each) for each in targets if each in written_for}
    return cubins


def print_report(cubins: Mapping[tuple[str, str], Cubin]) -> None:
    print(f"{'target':8} {'file':24} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}  kernel")
    for (file, target), cubin in sorted(cubins.items(), key=lambda item: (item[0][1], item[0][0])):
        for name, facts in sorted(cubin.kernels.items()):
            counts = f"{facts.registers:9} {facts.shared_bytes:7} {facts.stack_bytes:6} {facts.spill_bytes:6}"
            print(f"{target:8} {file:24} {counts}  {name}")


if __name__ == "__main__":
    sys.exit(main())
