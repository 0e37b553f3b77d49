"""Arrays that lie in the file's own mapping: on Apple silicon a page of the file is a page of the device. packing.py asks.

Nothing is assumed: where MLX, the alignment or a comparison of bytes says no, the answer is None and the caller copies.
"""

import mmap

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

__all__ = ["Mappings"]

ALIGNMENT = 16               # of a tensor in its file, that the kernels' vector loads want
COMPARED = 4096              # bytes at each end


class Mappings:
    """The tensors that the device reads in their files. `kept` must live as long as the arrays."""

    def __init__(self, possible: bool) -> None:
        """possible: whether device memory is host memory, mx.metal.is_available()."""
        self.possible = possible
        self.kept: list[NDArray[np.uint8]] = []
        self.starts: set[int] = set()

    def holds(self, data: NDArray[np.uint8]) -> bool:
        """Whether the device reads these bytes where they are, so that they should stay in memory."""
        return data.ctypes.data in self.starts

    def array(self, data: NDArray[np.uint8]) -> mx.array | None:
        """The bytes of a tensor, flat uint8, without a copy; None if that cannot be had.

        The device adopts the pages that the tensor lies in and no others: what it adopts counts as its memory, and a whole
        file would count tensors that are copied anyway.
        """
        if not self.possible or not data.size:
            return None
        mapping = mapping_of(data)
        if mapping is None:
            return None
        start = data.ctypes.data - np.frombuffer(mapping, np.uint8, 1).ctypes.data
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        stop = -(-(start + data.size) // mmap.PAGESIZE) * mmap.PAGESIZE
        if start % ALIGNMENT or stop > len(mapping):             # the file's last page is not a whole one
            return None
        pages = np.frombuffer(mapping, np.uint8, stop - first, first)
        try:
            part = mx.asarray(pages, copy=False)[start - first : start - first + data.size]
            mx.eval(part)
        except (ValueError, TypeError, BufferError, OverflowError, RuntimeError):    # whichever says that it must be copied
            return None
        if any(not np.array_equal(np.array(part[at]), data[at]) for at in (slice(COMPARED), slice(-COMPARED, None))):
            return None
        self.kept.append(pages)
        self.starts.add(data.ctypes.data)
        return part


def mapping_of(data: NDArray[np.uint8]) -> mmap.mmap | None:
    """The mapping that an array looks into, if it looks into one."""
    owner: object = data
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    return owner if isinstance(owner, mmap.mmap) else None
