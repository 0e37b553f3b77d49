"""TensorFile: one file of named tensors, mapped. What GgufFile and SafetensorsFile share: the mapping, release, close.

A subclass reads its header from `self._map` and sets `tensors`; the rest of the engine sees tensors as views of the mapping
and never a copy. Whoever opens a file closes it.
"""

import mmap
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from engine.errors import BadModelFile, ModelNotFound
from engine.weights.tensors import RawTensor

__all__ = ["TensorFile"]


class TensorFile:
    """`tensors`: name -> tensor, in the file's order; close() unmaps what nobody looks at."""

    tensors: Mapping[str, RawTensor] = MappingProxyType({})

    def __init__(self, path: Path, least_bytes: int, kind: str) -> None:
        """Map the file. Raises ModelNotFound if it cannot be read, BadModelFile if no header of `kind` fits in it."""
        self.path = path
        try:
            if path.exists() and not path.is_file():                     # opening a pipe would wait for ever
                raise ModelNotFound(f"{path}: cannot be read, it is no file: name a {kind} file")
            with path.open("rb") as stream:
                size = stream.seek(0, 2)
                if size < least_bytes:
                    raise BadModelFile(
                        f"it has {size} bytes, a {kind} header has {least_bytes}: the file is damaged, download it again",
                        file=str(path),
                    )
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelNotFound(f"{path}: no such file: check the path, or download the model first") from None
        except OSError as error:
            raise ModelNotFound(f"{path}: cannot be read ({error.strerror}): check the path and its rights") from error

    def release(self, tensor: RawTensor) -> None:
        """Let the pages that lie wholly within `tensor` leave memory; they are read from the file again when touched."""
        if sys.platform != "win32":        # where there is no madvise, the system takes pages back by itself
            if self._map.closed:
                return
            start = tensor.data.ctypes.data - self._address
            first = start + -start % mmap.PAGESIZE
            length = (start + tensor.data.size - first) // mmap.PAGESIZE * mmap.PAGESIZE
            if length > 0:
                self._map.madvise(mmap.MADV_DONTNEED, first, length)

    @property
    def _address(self) -> int:
        view: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, 1)
        return int(view.ctypes.data)

    def close(self) -> None:
        """Forget the tensors and unmap the file, at once or when the last array that looks into it goes. Idempotent."""
        self.tensors = MappingProxyType({})
        try:
            self._map.close()
        except BufferError:                # somebody still holds a view; the mapping goes with it
            return
