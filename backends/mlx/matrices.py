"""Matrix and Experts, and how matrices rest on the device: floats, MLX's groups, the file's blocks. packing.py makes them.

Scales rest in the activations' type if that holds them exactly, else in float32: then the product is computed in float32
(MLX would do so too, but it would hand the float32 on). A result always has the type of what came in.
"""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from backends.mlx.dequantize import dequantize_blocks

__all__ = ["Affine", "Blocks", "Dense", "Experts", "Groups", "Matrix", "Mxfp4", "Product"]


class Matrix(Protocol):
    """The weight of a linear layer, y = x W^T, or an embedding."""

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __call__(self, x: mx.array) -> mx.array:
        """(T, K) -> (T, N), of x's type."""
        ...

    def gather(self, ids: mx.array) -> mx.array:
        """(T,) int32 -> (T, K), of the activations' type."""
        ...


class Experts(Protocol):
    """One matrix (N, K) per expert of a layer."""

    @property
    def rows(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """x (T, K), or (T, k, K) for an input per choice; chosen (T, k) int32 -> (T, k, N), of x's type."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix of floats. columns_first: it rests as (K, N), which the BLAS of MLX's Linux wheel reads twice as fast."""

    weight: mx.array         # (N, K) or (K, N)
    dtype: mx.Dtype          # of the activations
    columns_first: bool = False

    @property
    def rows(self) -> int:
        return self.weight.shape[1 if self.columns_first else 0]

    @property
    def columns(self) -> int:
        return self.weight.shape[0 if self.columns_first else 1]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.weight if self.columns_first else self.weight.T
        return mx.matmul(x.astype(weight.dtype), weight).astype(x.dtype)

    def gather(self, ids: mx.array) -> mx.array:
        rows = self.weight[:, ids].T if self.columns_first else self.weight[ids]
        return rows.astype(self.dtype)


@dataclass(frozen=True, slots=True)
class Groups:
    """What a quantized matrix is made of, in one of MLX's modes; with experts each array has one more axis in front."""

    words: mx.array                  # (..., N, K * bits / 32) uint32
    scales: mx.array                 # (..., N, K / group)
    biases: mx.array | None          # None in mode mxfp4
    bits: int
    group: int
    mode: str

    @property
    def rows(self) -> int:
        return self.words.shape[-2]

    @property
    def columns(self) -> int:
        return self.scales.shape[-1] * self.group

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + (0 if self.biases is None else self.biases.nbytes)

    @property
    def arrays(self) -> list[mx.array]:
        return [self.words, self.scales] + ([] if self.biases is None else [self.biases])

    def compute(self, x: mx.array) -> mx.array:
        """x in the type that the product is computed in."""
        return x if self.biases is None else x.astype(self.scales.dtype)


@dataclass(frozen=True, slots=True)
class Affine:
    """A matrix in groups of integers: w = scale q + bias."""

    groups: Groups
    dtype: mx.Dtype

    @property
    def rows(self) -> int:
        return self.groups.rows

    @property
    def columns(self) -> int:
        return self.groups.columns

    @property
    def nbytes(self) -> int:
        return self.groups.nbytes

    def __call__(self, x: mx.array) -> mx.array:
        g = self.groups
        product = mx.quantized_matmul(
            g.compute(x), g.words, g.scales, g.biases, transpose=True, group_size=g.group, bits=g.bits, mode=g.mode
        )
        return product.astype(x.dtype)

    def gather(self, ids: mx.array) -> mx.array:
        g = self.groups
        biases = None if g.biases is None else g.biases[ids]
        rows = mx.dequantize(
            g.words[ids], g.scales[ids], biases, group_size=g.group, bits=g.bits, mode=g.mode,
            dtype=self.dtype if g.biases is None else g.scales.dtype,
        )  # fmt: skip
        return rows.astype(self.dtype)


class Mxfp4(Affine):
    """A matrix in groups of 32 E2M1 numbers and one power of two: the same calls in another mode."""

    __slots__ = ()


class Product(Protocol):
    """Kernels that multiply with the file's own blocks, of one type."""

    def __call__(self, x: mx.array, blocks: mx.array) -> mx.array:
        """x (T, K), blocks (N, bytes of a row) -> (T, N), of x's type."""
        ...

    def by_choice(self, x: mx.array, blocks: mx.array, chosen: mx.array) -> mx.array:
        """x (T, K) or (T, k, K), blocks (E, N, bytes of a row), chosen (T, k) int32 -> (T, k, N), of x's type."""
        ...


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix in the file's own blocks: kernels multiply with them, rows are dequantized when they are looked up."""

    blocks: mx.array                 # (N, bytes of a row) uint8
    kind: str                        # a key of dequantize.DEQUANTIZERS
    block_bytes: int
    columns: int
    dtype: mx.Dtype
    product: Product

    @property
    def rows(self) -> int:
        return self.blocks.shape[0]

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def __call__(self, x: mx.array) -> mx.array:
        return self.product(x, self.blocks)

    def gather(self, ids: mx.array) -> mx.array:
        return dequantize_blocks(self.kind, self.blocks[ids], self.block_bytes).astype(self.dtype)
