"""Device: the little that the runner needs of a GPU. nvidia.py has it on cuda.core, tests on the CPU from the same .cu files.

Everything that follows on a stream happens in order and later: launch, copies and replays return at once. Addresses are
plain integers, so that a kernel can be given the middle of an array. Nobody else imports a CUDA library.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["ITEM_BYTES", "Argument", "Array", "Device", "DeviceFacts", "Event", "Graph", "Kernel", "Stream", "make_array"]

ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "i32": 4, "u32": 4, "i64": 8, "u8": 1}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel: its file in kernels/, and the C++ expression that names it, template arguments included."""

    file: str        # "norm.cu"
    name: str        # "rms_norm<true>"


@dataclass(frozen=True, slots=True)
class Array:
    """Where numbers lie in device memory: rows one after another, the last axis without gaps."""

    address: int
    shape: tuple[int, ...]
    item: str                        # a key of ITEM_BYTES

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.item]

    def first(self, count: int) -> "Array":
        """The first rows."""
        assert 0 <= count <= self.shape[0], (count, self.shape)
        return Array(self.address, (count, *self.shape[1:]), self.item)

    def row(self, index: int) -> "Array":
        """One entry of the first axis."""
        assert 0 <= index < self.shape[0], (index, self.shape)
        inner = self.shape[1:]
        return Array(self.address + index * prod(inner) * ITEM_BYTES[self.item], inner, self.item)


Argument = Array | int | np.int32 | np.uint32 | np.int64 | np.float32 | bytes
"""What a kernel is given: an Array or an int is a pointer, a NumPy scalar a number of that very type, bytes a structure by
value (kernels of cutlass_kernels/ take such)."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What launch geometry depends on."""

    name: str
    architecture: str                # "sm_90"
    multiprocessors: int
    shared_bytes: int                # that one block may have, all of it dynamic
    memory_bytes: int


class Event(Protocol):
    """A moment on a stream."""

    def wait(self) -> None:
        """Block this thread until the stream has passed it. StepFailed if the device failed."""
        ...


class Graph(Protocol):
    """Launches that were captured; Stream.replay runs them again on the same addresses."""


class Stream(Protocol):
    """Work in order."""

    def launch(
        self, kernel: Kernel, grid: tuple[int, int, int], threads: int, shared_bytes: int, *arguments: Argument
    ) -> None:
        """Run a prepared kernel: `grid` blocks of `threads` threads in a row, with so much dynamic shared memory each."""
        ...

    def copy_in(self, target: int, source: NDArray[Any]) -> None:
        """Host to device. `source` is contiguous, and may only change once the copy has happened."""
        ...

    def copy_out(self, target: NDArray[Any], source: int) -> None:
        """Device to host; `target` is contiguous and complete once an event recorded after it has passed."""
        ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Device to device; the two do not overlap."""
        ...

    def fill(self, target: int, nbytes: int, byte: int) -> None: ...

    def record(self) -> Event:
        """The moment when all work so far is done."""
        ...

    def wait(self, event: Event) -> None:
        """What follows here happens after the event; this thread does not wait."""
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Take down the launches and device-to-device copies that work() makes on this stream, without running them."""
        ...

    def replay(self, graph: Graph) -> None: ...


class Device(Protocol):
    """One GPU. Every call comes from one thread."""

    facts: DeviceFacts

    def free_bytes(self) -> int:
        """Device memory that can still be had."""
        ...

    def allocate(self, nbytes: int) -> int:
        """The address of new memory, a multiple of 256, contents undefined. Raises OutOfDeviceMemory."""
        ...

    def release(self, address: int) -> None:
        """Give memory back; nothing in flight may use it."""
        ...

    def host_array(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that copies can go from and to without a stop (page-locked)."""
        ...

    def stream(self) -> Stream: ...

    def prepare(self, kernels: Iterable[Kernel]) -> None:
        """Compile and load kernels, those of a file together. Raises DeviceUnavailable if the compiler refuses."""
        ...

    def synchronize(self) -> None:
        """Wait for everything. StepFailed if the device failed."""
        ...

    def close(self) -> None:
        """Free everything; idempotent."""
        ...


def make_array(device: Device, item: str, *shape: int) -> Array:
    """An Array of its own memory."""
    return Array(device.allocate(max(1, prod(shape) * ITEM_BYTES[item])), shape, item)
