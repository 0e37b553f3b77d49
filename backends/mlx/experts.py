"""Experts as they rest on the device: a mixture's matrices as one array, multiplied by choice. packing.py makes them.

Many choices are sorted by expert first, so that a kernel reads each expert's weights once; few are taken as they come.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from backends.mlx.matrices import Experts, Groups, Product

__all__ = ["AffineExperts", "BlockExperts", "DenseExperts", "ExpertStack", "Mxfp4Experts"]

SORTED_CHOICES = 64          # from which on choices are sorted


@dataclass(frozen=True, slots=True)
class DenseExperts:
    """Experts of floats."""

    weight: mx.array                 # (E, N, K)

    @property
    def rows(self) -> int:
        return self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        def product(each: mx.array, experts: mx.array, in_order: bool) -> mx.array:
            return mx.gather_mm(each, self.weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=in_order)

        return by_expert(product, x.astype(self.weight.dtype), chosen).astype(x.dtype)


@dataclass(frozen=True, slots=True)
class AffineExperts:
    """Experts in groups of integers."""

    groups: Groups

    @property
    def rows(self) -> int:
        return self.groups.rows

    @property
    def nbytes(self) -> int:
        return self.groups.nbytes

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        g = self.groups

        def product(each: mx.array, experts: mx.array, in_order: bool) -> mx.array:
            return mx.gather_qmm(
                each, g.words, g.scales, g.biases, rhs_indices=experts, transpose=True, group_size=g.group, bits=g.bits,
                mode=g.mode, sorted_indices=in_order,
            )  # fmt: skip

        return by_expert(product, g.compute(x), chosen).astype(x.dtype)


class Mxfp4Experts(AffineExperts):
    """Experts in groups of 32 E2M1 numbers."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class BlockExperts:
    """Experts in the file's own blocks."""

    blocks: mx.array                 # (E, N, bytes of a row) uint8
    product: Product                 # it sorts choices itself

    @property
    def rows(self) -> int:
        return self.blocks.shape[1]

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        return self.product.by_choice(x, self.blocks, chosen)


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """Experts that read the same input and rest in different ways, side by side."""

    parts: tuple[Experts, ...]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        return mx.concatenate([part(x, chosen) for part in self.parts], axis=-1)


def by_expert(product: Callable[[mx.array, mx.array, bool], mx.array], x: mx.array, chosen: mx.array) -> mx.array:
    """product(inputs (..., 1, K), their experts (...), whether those are in order) for each choice: (T, k, N)."""
    tokens, choices = chosen.shape
    if tokens * choices < SORTED_CHOICES:
        each = x[:, None, None, :] if x.ndim == 2 else x[:, :, None, :]                  # (T, 1 or k, 1, K)
        return product(each, chosen, False).squeeze(-2)
    order = mx.argsort(chosen.reshape(-1))                                               # (T k,)
    back = mx.argsort(order)
    each = x[order // choices] if x.ndim == 2 else x.reshape(tokens * choices, -1)[order]
    mixed = product(each[:, None, :], chosen.reshape(-1)[order], True).squeeze(-2)       # (T k, N)
    return mixed[back].reshape(tokens, choices, -1)
