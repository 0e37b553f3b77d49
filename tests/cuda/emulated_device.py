"""The emulated device: backends.cuda.device.Device on the CPU, for tests. Kernels are the .cu files themselves, through g++.

What would go unseen on a GPU is an error here, or gives NaNs: memory lies between pages that nobody may touch, is NaNs before
it is written and gone when it is released; a stream does its work as late as it may, so that nothing is there before it was
waited for; a launch beyond a GPU's limits or the kernel's is refused; after an error the device is dead. `seed` chooses the
order in which threads and blocks take turns (0 ascending, 1 descending; odd: warps run ahead) and on which side of memory the
page that faults lies (odd: below); beyond 1, half of the asynchronous copies to shared memory land before they are awaited.
"""

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from backends.cuda.device import Array, DeviceFacts, Kernel
from engine.errors import StepFailed
from tests.cuda.emulated_build import compiled
from tests.cuda.emulated_memory import Memory, host_bytes

GRID_LIMITS, THREADS_LIMIT = (2**31 - 1, 65535, 65535), 1024
DTYPES = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32, "f64": np.float64, "i32": np.int32, "u32": np.uint32,
          "i64": np.int64, "u8": np.uint8}  # fmt: skip
ITEMS = {"f": {2: "f16", 4: "f32", 8: "f64"}, "i": {4: "i32", 8: "i64"}, "u": {1: "u8", 2: "bf16", 4: "u32"}}


class EmulatedDevice:
    """One GPU that there is not."""

    def __init__(
        self, *, architecture="sm_90", multiprocessors=4, shared_bytes=99 << 10, memory_bytes=1 << 30, seed=0, edits=None,
        texts=None,
    ):  # fmt: skip
        """edits: {file: function of its text}, to see that a broken kernel is found out; texts: {file: text}, more files."""
        self.facts = DeviceFacts("emulated", architecture, multiprocessors, shared_bytes, memory_bytes)
        self.seed = seed
        self.edits, self.texts = edits or {}, texts or {}
        self.memory = Memory(memory_bytes, low=seed % 2 == 1)
        self.pinned = []
        self.functions = {}
        self.streams = []
        self.launches = 0
        self.failure = None              # once there is one, everything but close() raises it again

    def alive(self, what, *, while_capturing=False):
        if self.failure is not None:
            raise StepFailed(f"the device failed before: {self.failure}")
        if not while_capturing and any(stream.recording is not None for stream in self.streams):
            raise StepFailed(f"{what} while a graph is captured")

    # ---- memory ---------------------------------------------------------------------------------------------------------

    def free_bytes(self):
        return self.memory.nbytes - self.memory.used

    def allocate(self, nbytes):
        self.alive("memory is allocated")
        return self.memory.allocate(nbytes)

    def release(self, address):
        self.synchronize()
        self.memory.release(address)

    def host_array(self, nbytes):
        array = np.full(nbytes, 0xFF, np.uint8)
        self.pinned.append((array.ctypes.data, nbytes))
        return array

    def is_pinned(self, array):
        start = array.ctypes.data
        return any(first <= start and start + array.nbytes <= first + size for first, size in self.pinned)

    def close(self):
        self.streams.clear()
        self.memory.close()

    # ---- work -----------------------------------------------------------------------------------------------------------

    def stream(self):
        self.streams.append(EmulatedStream(self))
        return self.streams[-1]

    def synchronize(self):
        self.alive("the host waits")
        for stream in self.streams:
            stream.run_to(len(stream.queue) + stream.done)
        try:
            self.memory.check_all()
        except StepFailed as error:
            self.failure = error
            raise

    def prepare(self, kernels: Iterable[Kernel]):
        by_file = defaultdict(list)
        for kernel in kernels:
            if kernel not in self.functions and kernel not in by_file[kernel.file]:
                by_file[kernel.file].append(kernel)
        for file, wanted in by_file.items():
            if wanted:
                self.functions |= compiled(file, wanted, self.texts, self.edits)

    # ---- what tests do --------------------------------------------------------------------------------------------------

    def put(self, array):
        """A host array as device memory; bf16 is given as uint16."""
        array = np.ascontiguousarray(array)
        there = Array(self.allocate(max(1, array.nbytes)), array.shape, ITEMS[array.dtype.kind][array.dtype.itemsize])
        host_bytes(there.address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
        return there

    def get(self, array: Array):
        """Its numbers now, everything done; bf16 as float32."""
        self.synchronize()
        self.memory.check(array.address, array.nbytes, "a copy to the host")
        values = host_bytes(array.address, array.nbytes).copy().view(DTYPES[array.item]).reshape(array.shape)
        return (values.astype(np.uint32) << 16).view(np.float32) if array.item == "bf16" else values


class EmulatedStream:
    """Work that is done when somebody waits for it, not sooner."""

    def __init__(self, device):
        self.device = device
        self.queue = []
        self.done = 0
        self.recording = None

    def add(self, what, work: Callable[[], None], *, capturable=True):
        self.device.alive(what, while_capturing=True)
        if self.recording is None:
            self.queue.append(work)
        elif capturable:
            self.recording.append(work)
        else:
            raise StepFailed(f"{what} cannot be captured in a graph")

    def run_to(self, count):
        self.device.alive("the host waits")
        while self.done < count:
            work = self.queue.pop(0)
            self.done += 1
            try:
                work()
            except StepFailed as error:
                self.device.failure = self.device.failure or error
                raise

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
        if threads > function.most_threads:
            raise StepFailed(f"{kernel.name}: {threads} threads of a block, its launch bounds are {function.most_threads}")
        values = function.values(arguments)
        self.add("a launch", lambda: self.run(function, tuple(int(n) for n in grid), int(threads), int(shared_bytes), values))

    def run(self, function, grid, threads, shared_bytes, values):
        self.device.launches += 1
        failed = function(grid, threads, shared_bytes, values, self.device.seed)
        if failed is not None:
            text, address = failed
            near = "" if address is None else self.device.memory.near(address)
            raise StepFailed(f"{function.kernel.name}: {text}{near}")

    def copy_in(self, target, source):
        assert source.flags.c_contiguous
        kept = source if self.device.is_pinned(source) else source.copy()
        self.move("a copy from the host", lambda: kept.ctypes.data, lambda: target, kept.nbytes, (target,), capturable=False)

    def copy_out(self, target, source):
        assert target.flags.c_contiguous
        self.move(
            "a copy to the host", lambda: source, lambda: target.ctypes.data, target.nbytes, (source,), capturable=False
        )

    def copy(self, target, source, nbytes):
        if target < source + nbytes and source < target + nbytes:
            raise StepFailed(f"a copy of {nbytes:,} bytes within the device: the two overlap")
        self.move("a copy within the device", lambda: source, lambda: target, nbytes, (source, target))

    def move(self, what, source, target, nbytes, there, *, capturable=True):
        """`there`: addresses on the device that must be good, now and when the bytes move."""

        def check():
            for address in there:
                self.device.memory.check(address, nbytes, what)

        def work():
            check()
            ctypes.memmove(target(), source(), nbytes)

        check()
        self.add(what, work, capturable=capturable)

    def fill(self, target, nbytes, byte):
        def work():
            self.device.memory.check(target, nbytes, "a fill")
            ctypes.memset(target, byte, nbytes)

        self.device.memory.check(target, nbytes, "a fill")
        self.add("a fill", work)

    def record(self):
        if self.recording is not None:
            raise StepFailed("an event cannot be captured in a graph")
        self.device.alive("an event is recorded", while_capturing=True)
        return EmulatedEvent(self, self.done + len(self.queue))

    def wait(self, event):
        self.add("a wait for an event", event.wait, capturable=False)

    def capture(self, work):
        self.device.alive("a graph is captured")
        self.recording = []
        try:
            work()
            return self.recording
        finally:
            self.recording = None

    def replay(self, graph):
        for work in graph:
            self.add("a replay", work, capturable=False)


@dataclass
class EmulatedEvent:
    stream: EmulatedStream
    count: int

    def wait(self):
        self.stream.run_to(self.count)
