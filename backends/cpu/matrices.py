"""Matrices as they rest in memory: planes, grids, dense lanes. packing.py makes them, ops.py multiplies by them.

Every quantized type rests at about its own size, exactly (docs/storage-types.md). What they all have: rows, nbytes, take.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.cpu.kernels import grid_blocks
from backends.cpu.kernels.digits import COLUMNS
from backends.cpu.kernels.integer import FEW, MATRIX, TILE, Kind, function_of
from backends.cpu.kernels.jit import LANES
from backends.cpu.kernels.planes import Codebook
from engine.weights.tensors import RawTensor, StorageType, to_float32

__all__ = ["DenseArray", "DenseMatrix", "Grid", "Matrix", "Planes"]

FloatArray = NDArray[np.float32]
ScaleArray = NDArray[Any]                        # float32, or the bits of float16
DenseArray = FloatArray | NDArray[np.uint16] | NDArray[np.int16]


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


@dataclass(frozen=True)
class Planes:
    """A matrix in 2 to 8 bits, see kernels/planes.py; a plane or a codebook that it does not have is None."""

    rows: int
    group: int                              # columns of a group
    low: NDArray[np.uint32]                 # (rows / 32, columns * bits / 32, 32)
    low_bits: int
    high: NDArray[np.uint32] | None
    high_bits: int
    codebook: Codebook                      # 16 bytes in four words
    unit: float                             # what a scale is of one step of a weight
    scale: ScaleArray                       # (rows / 32, groups or blocks, 32)
    minimum: ScaleArray                     # the same, or (0, 0, 0)
    fine: NDArray[np.uint32]                # (rows / 32, groups / 4, 32): int8 + 128; or (0, 0, 0)
    fine_minimum: NDArray[np.uint32]

    @property
    def plain(self) -> bool:
        """Whether it has one plane of 4 or 8 bits, with scales and perhaps minima, and nothing else."""
        beside = self.high is not None or self.codebook is not None or len(self.fine) > 0
        return not beside and self.low_bits in (4, 8) and self.group == 32 and self.scale.shape[1] * 32 == self.columns

    @property
    def factor(self) -> float:
        """What a scale is of 2^bits, or of 256 where bytes are looked up."""
        return self.unit * (256 if self.codebook is not None else 2 ** (self.low_bits + self.high_bits))

    @property
    def columns(self) -> int:
        return 32 // self.low_bits * int(self.low.shape[1])

    @cached_property
    def described(self) -> NDArray[np.void]:
        """As integer.products takes it: one MATRIX that points into these arrays."""
        kind = Kind(
            self.low_bits, self.high_bits, int(self.codebook is not None), int(self.scale.dtype == np.int16),
            round(self.factor), int(len(self.minimum) > 0), int(len(self.fine) > 0), self.group,
            self.columns // self.scale.shape[1],
        )  # fmt: skip
        here = np.zeros(1, MATRIX)
        here["one"], here["few"], here["many"] = (function_of(kind, tokens).address for tokens in (1, FEW, TILE))
        for name in ("low", "high", "scale", "minimum", "fine", "fine_minimum"):
            array = getattr(self, name)
            here[name] = 0 if array is None else array.ctypes.data
        here["low_stride"], here["scale_stride"] = self.low[:1].nbytes, self.scale[:1].nbytes
        here["high_stride"] = 0 if self.high is None else self.high[:1].nbytes
        here["minimum_stride"], here["fine_stride"] = self.minimum[:1].nbytes, self.fine[:1].nbytes
        here["table"] = 0 if self.table is None else self.table.ctypes.data
        here["rows"], here["blocks"], here["records"] = self.rows, len(self.low), self.columns // COLUMNS
        return here

    @cached_property
    def table(self) -> NDArray[np.uint32] | None:
        """The codebook, once for each 16 bytes of a vector."""
        return None if self.codebook is None else np.tile(np.array(self.codebook, np.uint32), 4)

    @property
    def nbytes(self) -> int:
        arrays = (self.low, self.scale, self.minimum, self.fine, self.fine_minimum)
        return sum(array.nbytes for array in arrays) + (self.high.nbytes if self.high is not None else 0)

    def take(self, rows: NDArray[np.int32]) -> FloatArray:
        """Some rows as float32: what an embedding looks up."""
        q = integers(self.low, self.low_bits, rows)
        if self.high is not None:
            q = q | integers(self.high, self.high_bits, rows) << self.low_bits
        if self.codebook is not None:
            q = np.array(self.codebook, np.uint32).view(np.uint8)[q]
        groups = q.shape[1] // self.group
        parts = q.reshape(len(rows), groups, self.group) * np.float32(self.unit)
        scale = group_values(self.scale, self.fine, rows, groups)
        if len(self.minimum):
            values = parts * scale + group_values(self.minimum, self.fine_minimum, rows, groups)
        else:
            values = (parts - np.float32(self.factor / 2)) * scale
        return values.reshape(len(rows), -1)


@dataclass(frozen=True, slots=True)
class Grid:
    """A matrix of a grid type: the blocks of the file, 32 rows of bytes side by side."""

    rows: int
    storage: StorageType
    kind: grid_blocks.Kind
    blocks: NDArray[np.uint8]               # (rows / 32, row bytes, 32)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def take(self, rows: NDArray[np.int32]) -> FloatArray:
        """Some rows as float32: what an embedding looks up."""
        chosen = np.ascontiguousarray(self.blocks[rows // LANES, :, rows % LANES])
        columns = chosen.shape[1] // self.storage.bytes * self.storage.block
        return to_float32(RawTensor("rows", (len(rows), columns), self.storage, chosen.reshape(-1), "memory"))


Matrix = Planes | Grid | DenseMatrix


def integers(words: NDArray[np.uint32], bits: int, rows: NDArray[np.int32]) -> NDArray[np.integer]:
    """The bits that some rows have in a plane, (n, columns)."""
    shifts = np.array([8 * (j % 4) + bits * (j // 4) for j in range(32 // bits)], np.uint32)
    fields = (words[rows // LANES, :, rows % LANES][:, :, None] >> shifts) & np.uint32(2**bits - 1)
    return fields.astype(np.uint8).reshape(len(rows), -1)


def group_values(
    coarse: ScaleArray, fine: NDArray[np.uint32], rows: NDArray[np.int32], groups: int
) -> FloatArray:
    """The scales (or minima) of the groups of some rows, (n, groups, 1)."""
    block, lane = rows // LANES, rows % LANES
    chosen = coarse[block, :, lane]
    if chosen.dtype == np.int16:
        chosen = np.ascontiguousarray(chosen).view(np.float16)
    exact: FloatArray = chosen.astype(np.float32)
    values = np.repeat(exact, groups // coarse.shape[1], axis=1)
    if len(fine):
        signed = np.ascontiguousarray(fine[block, :, lane]).view(np.uint8).astype(np.float32) - np.float32(128)
        values = values * signed
    return values[:, :, None]
