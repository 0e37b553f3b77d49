"""The emulated device: backends.cuda.device.Device on the CPU, for tests. Kernels are the .cu files themselves, through g++.

What would go unseen on a GPU is an error here, or gives NaNs: memory lies between pages that nobody may touch, is NaNs before it
is written and gone when it is released; a stream does its work as late as it may, so that nothing is there before it was
waited for; a launch beyond a GPU's limits is refused. `seed` chooses the order in which the threads of a block take turns.
"""

import ctypes
import hashlib
import importlib.util
import mmap
import os
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backends.cuda.device import Array, DeviceFacts, Kernel
from engine.errors import OutOfDeviceMemory, StepFailed

HERE = Path(__file__).parent
KERNELS = Path(__file__).parents[2] / "backends" / "cuda" / "kernels"
GRID_LIMITS, THREADS_LIMIT = (2**31 - 1, 65535, 65535), 1024
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
SCALARS = {np.int32: ctypes.c_int32, np.uint32: ctypes.c_uint32, np.int64: ctypes.c_int64, np.float32: ctypes.c_float}


def host_bytes(address, nbytes):
    """A view of memory by its address."""
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8) if nbytes else np.zeros(0, np.uint8)


class EmulatedDevice:
    """One GPU that there is not."""

    def __init__(
        self, *, architecture="sm_90", multiprocessors=4, shared_bytes=99 << 10, memory_bytes=1 << 30, seed=0, edits=None
    ):
        """edits: {file: function of its text}, to see that a broken kernel is found out."""
        self.facts = DeviceFacts("emulated", architecture, multiprocessors, shared_bytes, memory_bytes)
        self.seed = seed
        self.edits = edits or {}
        self.memory = {}                 # address -> (mapping, its length, bytes)
        self.pinned = []
        self.functions = {}
        self.streams = []
        self.launches = 0

    # ---- memory ---------------------------------------------------------------------------------------------------------

    def free_bytes(self):
        return self.facts.memory_bytes - sum(nbytes for _, _, nbytes in self.memory.values())

    def allocate(self, nbytes):
        if nbytes > self.free_bytes():
            raise OutOfDeviceMemory(f"{nbytes:,} bytes of device memory cannot be had, {self.free_bytes():,} are free")
        room = -(-nbytes // 256) * 256
        length = -(-room // PAGE) * PAGE + 2 * PAGE
        base = libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value)
        libc.mprotect(base, PAGE, 0)
        libc.mprotect(base + length - PAGE, PAGE, 0)
        address = base + length - PAGE - room
        ctypes.memset(address, 0xFF, room)
        self.memory[address] = base, length, nbytes
        return address

    def release(self, address):
        self.synchronize()
        base, length, _ = self.memory.pop(address)
        libc.munmap(base, length)

    def host_array(self, nbytes):
        array = np.full(nbytes, 0xFF, np.uint8)
        self.pinned.append((array.ctypes.data, nbytes))
        return array

    def is_pinned(self, array):
        start = array.ctypes.data
        return any(first <= start and start + array.nbytes <= first + size for first, size in self.pinned)

    def close(self):
        self.streams.clear()
        for address in list(self.memory):
            base, length, _ = self.memory.pop(address)
            libc.munmap(base, length)

    # ---- work -----------------------------------------------------------------------------------------------------------

    def stream(self):
        self.streams.append(EmulatedStream(self))
        return self.streams[-1]

    def synchronize(self):
        for stream in self.streams:
            stream.run_to(len(stream.queue) + stream.done)

    def prepare(self, kernels: Iterable[Kernel]):
        by_file = defaultdict(list)
        for kernel in kernels:
            if kernel not in self.functions and kernel not in by_file[kernel.file]:
                by_file[kernel.file].append(kernel)
        for file, wanted in by_file.items():
            if wanted:
                self.functions |= compiled(file, wanted, self.edits.get(file))

    # ---- what tests do --------------------------------------------------------------------------------------------------

    def put(self, array):
        """A host array as device memory; bf16 is given as uint16."""
        items = {"f": {2: "f16", 4: "f32", 8: "f64"}, "i": {4: "i32", 8: "i64"}, "u": {1: "u8", 2: "bf16", 4: "u32"}}
        array = np.ascontiguousarray(array)
        there = Array(self.allocate(max(1, array.nbytes)), array.shape, items[array.dtype.kind][array.dtype.itemsize])
        host_bytes(there.address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        return there

    def get(self, array: Array):
        """Its numbers now, everything done; bf16 as float32."""
        self.synchronize()
        dtypes = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32, "f64": np.float64, "i32": np.int32,
                  "u32": np.uint32, "i64": np.int64, "u8": np.uint8}
        values = host_bytes(array.address, array.nbytes).copy().view(dtypes[array.item]).reshape(array.shape)
        return (values.astype(np.uint32) << 16).view(np.float32) if array.item == "bf16" else values


class EmulatedStream:
    """Work that is done when somebody waits for it, not sooner."""

    def __init__(self, device):
        self.device = device
        self.queue = []
        self.done = 0
        self.recording = None

    def add(self, work: Callable[[], None], *, capturable=True):
        if self.recording is None:
            self.queue.append(work)
        elif capturable:
            self.recording.append(work)
        else:
            raise StepFailed("this cannot be captured in a graph")

    def run_to(self, count):
        while self.done < count:
            work = self.queue.pop(0)
            self.done += 1
            work()

    def launch(self, kernel, grid, threads, shared_bytes, *arguments):
        facts = self.device.facts
        if any(not 1 <= n <= most for n, most in zip(grid, GRID_LIMITS, strict=True)):
            raise StepFailed(f"{kernel.name}: no GPU takes the grid {grid}")
        if not (32 <= threads <= THREADS_LIMIT and threads % 32 == 0):
            raise StepFailed(f"{kernel.name}: {threads} threads of a block are no whole warps up to {THREADS_LIMIT}")
        if not 0 <= shared_bytes <= facts.shared_bytes:
            raise StepFailed(f"{kernel.name}: {shared_bytes} bytes of shared memory, a block has {facts.shared_bytes}")
        if kernel not in self.device.functions:
            raise StepFailed(f"{kernel.name} was not prepared")
        function = self.device.functions[kernel]
        values = [as_c(kernel, place, argument) for place, argument in enumerate(arguments)]
        function.check([ctypes.sizeof(value) for value in values])
        self.add(lambda: function(grid, threads, shared_bytes, values, self.device))

    def copy_in(self, target, source):
        assert source.flags.c_contiguous
        kept = source if self.device.is_pinned(source) else source.copy()
        self.add(lambda: ctypes.memmove(target, kept.ctypes.data, kept.nbytes), capturable=False)

    def copy_out(self, target, source):
        assert target.flags.c_contiguous
        self.add(lambda: ctypes.memmove(target.ctypes.data, source, target.nbytes), capturable=False)

    def copy(self, target, source, nbytes):
        assert target + nbytes <= source or source + nbytes <= target, "the two overlap"
        self.add(lambda: ctypes.memmove(target, source, nbytes))

    def fill(self, target, nbytes, byte):
        self.add(lambda: ctypes.memset(target, byte, nbytes))

    def record(self):
        return EmulatedEvent(self, self.done + len(self.queue))

    def wait(self, event):
        self.add(event.wait, capturable=False)

    def capture(self, work):
        assert self.recording is None
        self.recording = []
        try:
            work()
            return self.recording
        finally:
            self.recording = None

    def replay(self, graph):
        for work in graph:
            self.add(work)


@dataclass
class EmulatedEvent:
    stream: EmulatedStream
    count: int

    def wait(self):
        self.stream.run_to(self.count)


# ---- kernels ------------------------------------------------------------------------------------------------------------


def as_c(kernel, place, argument):
    if isinstance(argument, Array):
        return ctypes.c_void_p(argument.address)
    if type(argument) is int:
        return ctypes.c_void_p(argument)
    if type(argument) not in SCALARS:
        raise StepFailed(f"{kernel.name}: argument {place} is a {type(argument).__name__}: give an Array, an int or a NumPy scalar")
    return SCALARS[type(argument)](argument)


class Function:
    """A kernel in a shared library."""

    def __init__(self, kernel, library, symbol):
        self.kernel, self.library = kernel, library
        self.launcher = getattr(library, symbol)
        size = getattr(library, symbol + "_argument")
        size.restype, size.argtypes = ctypes.c_size_t, [ctypes.c_size_t]
        self.sizes = []
        while size(len(self.sizes)):
            self.sizes.append(size(len(self.sizes)))
        library.emulated_message.restype = ctypes.c_char_p

    def check(self, sizes):
        if sizes != self.sizes:
            raise StepFailed(f"{self.kernel.name}: arguments of {sizes} bytes are given, it takes {self.sizes}")

    def __call__(self, grid, threads, shared_bytes, values, device):
        device.launches += 1
        pointers = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(value) for value in values])
        failed = self.launcher(
            (ctypes.c_uint * 3)(*grid), ctypes.c_uint(threads), ctypes.c_size_t(shared_bytes), pointers, ctypes.c_uint(device.seed)
        )
        if failed:
            raise StepFailed(f"{self.kernel.name}: {self.library.emulated_message().decode()}")


def cuda_headers():
    """The folder of cuda_bf16.h, from the wheel nvidia-cuda-runtime or an installed CUDA."""
    package = importlib.util.find_spec("nvidia")
    places = [Path(at) for at in (package.submodule_search_locations if package else [])]
    for folder in [*(found.parent for at in places for found in at.glob("*/include/cuda_bf16.h")), Path("/usr/local/cuda/include")]:
        if (folder / "cuda_bf16.h").is_file():
            return folder
    raise FileNotFoundError("no CUDA headers: pip install nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl")


def build_folder():
    folder = Path(tempfile.gettempdir()) / f"rillet-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is somebody else's"
    return folder


def gxx(source: Path, target: Path, *options):
    part = target.with_name(f"{target.name}.{os.getpid()}")
    command = [
        "g++", "-std=c++17", "-O1", "-w", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-I", str(KERNELS), "-I", str(HERE),
        "-I", str(cuda_headers()), *options, "-x", "c++", str(source), "-o", str(part),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(done.stderr[:4000])
    part.replace(target)


def compiled(file, kernels, edit=None):
    """Kernel -> Function, all of one file; built once for the same texts."""
    text = (KERNELS / file).read_text()
    if edit is not None:
        changed = edit(text)
        assert changed != text, f"the edit changes nothing of {file}"
        text = changed
    entries = "\n".join(f"KERNEL_ENTRY(entry_{i}, {kernel.name})" for i, kernel in enumerate(kernels))
    whole = f'#include "emulated.h"\n#line 1 "{file}"\n{text}\n{entries}\n'
    parts = [whole, (HERE / "emulated.h").read_text(), *(path.read_text() for path in sorted(KERNELS.glob("*.cuh")))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    library = build_folder() / f"{Path(file).stem}-{key}.so"
    if not library.exists():
        source = library.with_suffix(f".{os.getpid()}.cpp")
        source.write_text(whole)
        try:
            gxx(source, library, "-shared")
        finally:
            source.unlink()
    loaded = ctypes.CDLL(str(library))
    return {kernel: Function(kernel, loaded, f"entry_{i}") for i, kernel in enumerate(kernels)}
