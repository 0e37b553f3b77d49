"""Matrices as they rest in memory: lanes, planes, grids, dense lanes. packing.py makes them, ops.py multiplies by them.

Every quantized type rests at about its own size, exactly (docs/storage-types.md). What they all have: rows, nbytes, take.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backends.cpu.kernels.grid_blocks import Kind
from backends.cpu.kernels.jit import LANES
from backends.cpu.kernels.planes import Codebook
from engine.weights.tensors import RawTensor, StorageType, to_float32

__all__ = ["DenseArray", "DenseMatrix", "Grid", "Lanes", "Matrix", "Planes"]

FloatArray = NDArray[np.float32]
DenseArray = FloatArray | NDArray[np.uint16] | NDArray[np.int16]


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


@dataclass(frozen=True, slots=True)
class Planes:
    """A matrix in 2 to 6 bits, see kernels/planes.py; a plane or a codebook that it does not have is None."""

    rows: int
    group: int                              # columns of a group
    low: NDArray[np.uint32]                 # (rows / 32, columns * bits / 32, 32)
    low_bits: int
    high: NDArray[np.uint32] | None
    high_bits: int
    codebook: Codebook                      # 16 bytes in four words
    scale: FloatArray                       # (rows / 32, groups or blocks, 32)
    minimum: FloatArray                     # the same, or (0, 0, 0)
    fine: NDArray[np.uint32]                # (rows / 32, groups / 4, 32): int8 + 128; or (0, 0, 0)
    fine_minimum: NDArray[np.uint32]

    @property
    def nbytes(self) -> int:
        arrays = (self.low, self.scale, self.minimum, self.fine, self.fine_minimum)
        return sum(array.nbytes for array in arrays) + (self.high.nbytes if self.high is not None else 0)

    def take(self, rows: NDArray[np.int32]) -> FloatArray:
        """Some rows as float32: what an embedding looks up."""
        q = integers(self.low, self.low_bits, rows)
        bits = self.low_bits
        if self.high is not None:
            q = q | integers(self.high, self.high_bits, rows) << bits
            bits += self.high_bits
        if self.codebook is not None:
            q, bits = np.array(self.codebook, np.uint32).view(np.uint8)[q], 8
        groups = q.shape[1] // self.group
        parts = q.reshape(len(rows), groups, self.group) * np.float32(2.0**-bits)
        scale = group_values(self.scale, self.fine, rows, groups)
        if len(self.minimum):
            values = parts * scale + group_values(self.minimum, self.fine_minimum, rows, groups)
        else:
            values = (parts - np.float32(0.5)) * scale
        return values.reshape(len(rows), -1)


@dataclass(frozen=True, slots=True)
class Grid:
    """A matrix of a grid type: the blocks of the file, 32 rows of bytes side by side."""

    rows: int
    storage: StorageType
    kind: Kind
    blocks: NDArray[np.uint8]               # (rows / 32, row bytes, 32)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def take(self, rows: NDArray[np.int32]) -> FloatArray:
        """Some rows as float32: what an embedding looks up."""
        chosen = np.ascontiguousarray(self.blocks[rows // LANES, :, rows % LANES])
        columns = chosen.shape[1] // self.storage.bytes * self.storage.block
        return to_float32(RawTensor("rows", (len(rows), columns), self.storage, chosen.reshape(-1), "memory"))


Matrix = Lanes | Planes | Grid | DenseMatrix


def integers(words: NDArray[np.uint32], bits: int, rows: NDArray[np.int32]) -> NDArray[np.integer]:
    """The bits that some rows have in a plane, (n, columns)."""
    shifts = np.array([8 * (j % 4) + bits * (j // 4) for j in range(32 // bits)], np.uint32)
    fields = (words[rows // LANES, :, rows % LANES][:, :, None] >> shifts) & np.uint32(2**bits - 1)
    return fields.astype(np.uint8).reshape(len(rows), -1)


def group_values(
    coarse: FloatArray, fine: NDArray[np.uint32], rows: NDArray[np.int32], groups: int
) -> FloatArray:
    """The scales (or minima) of the groups of some rows, (n, groups, 1)."""
    block, lane = rows // LANES, rows % LANES
    values = np.repeat(coarse[block, :, lane], groups // coarse.shape[1], axis=1)
    if len(fine):
        signed = np.ascontiguousarray(fine[block, :, lane]).view(np.uint8).astype(np.float32) - np.float32(128)
        values = values * signed
    return values[:, :, None]
