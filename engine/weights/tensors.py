"""RawTensor and the table of storage types: what a checkpoint gives and a backend takes, bytes as the file has them."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from engine.errors import UnsupportedModel

__all__ = ["STORAGE", "STORAGE_BY_GGUF_ID", "Part", "RawTensor", "StorageType", "TensorSource", "to_float32"]


@dataclass(frozen=True, slots=True)
class StorageType:
    """How weights rest in a file: `block` weights of a row take `bytes` bytes. gguf_id is GGML's number of the type."""

    name: str
    block: int
    bytes: int
    gguf_id: int

    @property
    def quantized(self) -> bool:
        return self.block > 1


STORAGE: dict[str, StorageType] = {
    kind.name: StorageType(kind.name, block, size, int(kind)) for kind, (block, size) in GGML_QUANT_SIZES.items()
}
STORAGE_BY_GGUF_ID: dict[int, StorageType] = {storage.gguf_id: storage for storage in STORAGE.values()}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor as its file has it.

    shape is in NumPy order, (rows, columns) for a matrix: y = x W^T. data is flat uint8, usually a view of a mapped
    file: read it, never write it, and do not keep it after TensorSource.release.
    """

    name: str
    shape: tuple[int, ...]
    storage: StorageType
    data: NDArray[np.uint8]
    file: str

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.storage.block * self.storage.bytes


@dataclass(frozen=True, slots=True)
class Part:
    """Where a canonical tensor lies in a file: the whole of tensor `name`, or `rows` of its rows from `first_row` on.

    Rows count over all leading axes, so that expert e of a tensor (E, F, D) is the F rows from e F on, and the gate of a
    fused (2 F, D) its first F rows.
    """

    name: str
    first_row: int = 0
    rows: int | None = None

    def of(self, tensor: RawTensor, canonical: str) -> RawTensor:
        """That part of the file's tensor, a view of its bytes. The rows must be there: whoever makes Parts checks it."""
        if self.rows is None:
            return tensor
        start, stop = self.first_row * tensor.row_bytes, (self.first_row + self.rows) * tensor.row_bytes
        assert 0 <= start < stop <= tensor.data.nbytes, (canonical, self, tensor.shape)
        return RawTensor(tensor.name, (self.rows, tensor.shape[-1]), tensor.storage, tensor.data[start:stop], tensor.file)


class TensorSource(Protocol):
    """Canonical name -> tensor (names in ModelSpec's docstring)."""

    def names(self) -> Iterable[str]: ...

    def tensor(self, name: str) -> RawTensor:
        """The tensor; KeyError if the checkpoint has no such canonical name."""
        ...

    def release(self, name: str) -> None:
        """The bytes of `name` are no longer needed: its file pages may leave memory."""
        ...


def to_float32(tensor: RawTensor) -> NDArray[np.float32]:
    """Every weight of `tensor` as float32, in its shape, exactly as gguf's reference dequantization has it.

    Raises UnsupportedModel for the types that no file stores weights in (integers, Q8_1, Q8_K).
    """
    rows = tensor.data.reshape(tensor.rows, tensor.row_bytes)
    match tensor.storage.name:
        case "F32":
            values = rows.view(np.float32)
        case "F16":
            values = rows.view(np.float16)
        case "BF16":
            values = (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        case "F64":
            values = rows.view(np.float64)
        case name:
            try:
                values = dequantize(rows, GGMLQuantizationType(tensor.storage.gguf_id))
            except NotImplementedError:
                raise UnsupportedModel(
                    f"{tensor.file}: tensor {tensor.name} is stored as {name}, which no weight should be: take another file"
                ) from None
    return values.astype(np.float32, copy=False).reshape(tensor.shape)
