"""Matrices as they rest in memory: quantized lanes and dense lanes, and the table of storage types that become them.

weights.py packs a checkpoint's tensors with it, ops.py multiplies by what comes out. One rule for every storage type: an
exact repack if there is one, else bfloat16. Nothing here keeps a view of a file.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from backends.cpu.kernels import repack
from backends.cpu.kernels.jit import LANES
from engine.weights.tensors import RawTensor, to_float32

__all__ = ["DENSE", "PACKINGS", "DenseMatrix", "Lanes", "Matrix", "pack"]

FloatArray = NDArray[np.float32]
DenseArray = FloatArray | NDArray[np.uint16] | NDArray[np.int16]
WIDEN_BYTES = 64 << 20    # float32 bytes of a matrix that are made at a time, where it goes through float32


@dataclass(frozen=True, slots=True)
class Lanes:
    """A matrix in 4 or 8 bits: w = (q / 2^bits - 1/2) scale, or q / 2^bits scale + minimum where there are minima."""

    rows: int
    bits: int
    words: NDArray[np.uint32]       # (rows / 32, columns * bits / 32, 32)
    scale: FloatArray               # (rows / 32, groups, 32)
    minimum: FloatArray             # the same, or (0, 0, 0)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scale.nbytes + self.minimum.nbytes

    def take(self, rows: NDArray[np.int32]) -> FloatArray:
        """Some rows as float32: what an embedding looks up."""
        block, lane = rows // LANES, rows % LANES
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)
        q = (self.words[block, :, lane][:, :, None] >> shifts) & np.uint32(2**self.bits - 1)
        scale = self.scale[block, :, lane][:, :, None]
        parts = q.reshape(len(rows), scale.shape[1], -1) * np.float32(2.0**-self.bits)     # (n, groups, columns of a group)
        if len(self.minimum):
            values = parts * scale + self.minimum[block, :, lane][:, :, None]
        else:
            values = (parts - np.float32(0.5)) * scale
        return values.reshape(len(rows), -1)


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A matrix as float32, bfloat16 (in uint16) or float16 (in int16)."""

    rows: int
    weight: DenseArray              # (rows / 32, columns, 32)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def take(self, rows: NDArray[np.int32]) -> FloatArray:
        """Some rows as float32: what an embedding looks up."""
        chosen = self.weight[rows // LANES, :, rows % LANES]
        if chosen.dtype == np.uint16:
            return (chosen.astype(np.uint32) << 16).view(np.float32)
        return (chosen.view(np.float16) if chosen.dtype == np.int16 else chosen).astype(np.float32)


Matrix = Lanes | DenseMatrix


@dataclass(frozen=True, slots=True)
class Packing:
    """How a quantized storage type rests as lanes."""

    bits: int
    group: int
    minima: bool
    pack: Callable[[NDArray[np.uint8], NDArray[np.uint32], FloatArray, FloatArray, int], None]


PACKINGS = {
    "Q4_0": Packing(4, 32, False, repack.q4_0),
    "Q4_1": Packing(4, 32, True, repack.q4_1),
    "Q4_K": Packing(4, 32, True, repack.q4_k),
    "Q5_0": Packing(8, 32, False, repack.q5_0),
    "Q5_1": Packing(8, 32, True, repack.q5_1),
    "Q5_K": Packing(8, 32, True, repack.q5_k),
    "Q6_K": Packing(8, 16, False, repack.q6_k),
    "Q8_0": Packing(8, 32, False, repack.q8_0),
}
DENSE = {"F32": np.float32, "BF16": np.uint16, "F16": np.int16}


def pack(storage: str, tensors: Sequence[RawTensor], taken: Callable[[RawTensor], None]) -> Matrix:
    """Tensors of the same columns under one another, as `storage`. taken: called after each, when its bytes are free."""
    rows, columns = sum(tensor.rows for tensor in tensors), tensors[0].shape[-1]
    blocks = -(-rows // LANES)
    first = 0
    if storage in DENSE:
        weight = np.zeros((blocks, columns, LANES), DENSE[storage])
        for tensor in tensors:
            for start, values in dense_pieces(tensor, storage):
                repack.dense_rows(values, weight, first + start)
            first += tensor.rows
            taken(tensor)
        return DenseMatrix(rows, weight)
    packing = PACKINGS[storage]
    words = np.zeros((blocks, columns * packing.bits // 32, LANES), np.uint32)
    scale = np.zeros((blocks, columns // packing.group, LANES), np.float32)
    minimum = np.zeros_like(scale) if packing.minima else np.zeros((0, 0, 0), np.float32)
    for tensor in tensors:
        packing.pack(tensor.data.reshape(tensor.rows, tensor.row_bytes), words, scale, minimum, first)
        first += tensor.rows
        taken(tensor)
    return Lanes(rows, packing.bits, words, scale, minimum)


def dense_pieces(tensor: RawTensor, storage: str) -> Iterator[tuple[int, DenseArray]]:
    """(first row, rows as `storage`) of the tensor, a few rows at a time, so that float32 never holds all of them."""
    data = tensor.data.reshape(tensor.rows, tensor.row_bytes)
    if tensor.storage.name == storage:
        yield 0, data.view(DENSE[storage])
        return
    rows = max(1, WIDEN_BYTES // (4 * tensor.shape[-1]))
    piece = partial(RawTensor, name=tensor.name, storage=tensor.storage, file=tensor.file)
    for start in range(0, tensor.rows, rows):
        some = data[start : start + rows]
        values = to_float32(piece(shape=(len(some), tensor.shape[-1]), data=some.reshape(-1)))
        yield start, narrow(values, storage)


def narrow(values: FloatArray, storage: str) -> DenseArray:
    """float32 -> the bits of a dense storage type, rounded to nearest, ties to even."""
    match storage:
        case "BF16":
            bits = np.ascontiguousarray(values).view(np.uint32)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        case "F16":
            return values.astype(np.float16).view(np.int16)
        case _:
            return np.ascontiguousarray(values)
