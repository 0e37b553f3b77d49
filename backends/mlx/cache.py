"""The KV cache: one fixed pool of pages per layer, and attention over it in MLX's own operations, for every device.

session.py opens the cache for a step, model.py works on what that gives. metal_cache.py has the same by own kernels.
`pool[slots] = keys` writes in place only while nobody else holds the pool, and work in flight that reads it is a holder:
so a step is opened only when the one before has ended. Nothing may keep a view of a pool beyond its step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from backends.mlx.ops import Ops, attention, rotate
from backends.mlx.rope import Rotation
from backends.mlx.steps import PAGE_TOKENS, PaddedStep, rounded_up, rounded_width
from backends.mlx.tree import HeadNorms
from engine.model.spec import Attention, ModelSpec, Rope
from engine.step import IntArray

__all__ = ["Cache", "PortableCache", "StepPages", "copy_pages", "copy_rounds", "make_pools", "page_bytes"]


class StepPages(Protocol):
    """The cache during one step. For each layer, in order: place, then attend."""

    def place(self, number: int, spec: Attention, norms: HeadNorms, qkv: mx.array) -> mx.array:
        """Norm and turn queries and keys of qkv (T, H + 2 KV, hs), put keys and values at their slots: queries (T, H, hs).

        norms: the weights of the norms of queries and keys, (hs,) each, if the model has them.
        """
        ...

    def attend(self, number: int, spec: Attention, q: mx.array) -> mx.array:
        """softmax(scale q k) v over each token's context, (T, H, hs). What padding gives is undefined."""
        ...

    @property
    def written(self) -> Sequence[mx.array]:
        """What must be evaluated for all keys and values to be in their pages."""
        ...


class Cache(Protocol):
    """The pool of pages of all layers."""

    @property
    def pages(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def open(self, step: PaddedStep, copies: IntArray) -> StepPages:
        """Copy pages (source, target), in order and after all earlier steps; then what the step works on."""
        ...


def page_bytes(spec: ModelSpec, item_bytes: int) -> int:
    """Of a page, for all layers."""
    numbers = sum(layer.attention.kv_heads * layer.attention.head_size for layer in spec.layers)
    return 2 * item_bytes * PAGE_TOKENS * numbers


def make_pools(spec: ModelSpec, pages: int, dtype: mx.Dtype) -> list[tuple[mx.array, mx.array]]:
    """Keys and values of each layer, (pages * 32, KV, hs) of zeros, evaluated; the last page is for padding."""
    made = []
    for layer in spec.layers:
        shape = (pages * PAGE_TOKENS, layer.attention.kv_heads, layer.attention.head_size)
        both = mx.zeros(shape, dtype), mx.zeros(shape, dtype)
        mx.eval(*both)
        made.append(both)
    return made


def copy_rounds(copies: IntArray) -> list[IntArray]:
    """What can be copied at once, in order: all, or pair by pair where a target is in another pair too."""
    if not len(copies):
        return []
    sources, targets = copies.T
    alone = len(np.unique(targets)) == len(targets) and not np.intersect1d(sources, targets).size
    return [copies] if alone else np.split(copies, len(copies))


def copy_pages(pools: Sequence[mx.array], copies: IntArray) -> None:
    """Copy pages by MLX's own operations, when all earlier work has ended."""
    for some in copy_rounds(copies):
        sources, targets = (mx.array((pages[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).ravel()) for pages in some.T)
        moved = [pool[sources] for pool in pools]
        mx.eval(*moved)
        mx.synchronize()                                         # what reads a pool holds it
        for pool, values in zip(pools, moved, strict=True):
            pool[targets] = values
        mx.eval(*pools)
        mx.synchronize()


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows of about as many queries: (n, Lq) indices into T and their positions, page tables (n, W)."""

    queries: mx.array
    positions: mx.array
    tables: mx.array
    masks: dict[int | None, mx.array] = field(default_factory=dict)

    def mask(self, window: int | None) -> mx.array:
        """What each query sees of the pages' tokens, (n, 1, Lq, W * 32)."""
        if window not in self.masks:
            keys = mx.arange(self.tables.shape[1] * PAGE_TOKENS, dtype=mx.int32)
            at = self.positions[:, None, :, None]
            seen = keys <= at
            self.masks[window] = seen if window is None else seen & (keys > at - window)
        return self.masks[window]


class PortableCache:
    """Pages written by scatter and read by gather."""

    def __init__(self, spec: ModelSpec, ops: Ops, pages: int, dtype: mx.Dtype) -> None:
        """pages: without the one for padding."""
        self.ops, self.pages = ops, pages
        self.rotations = {layer.attention.rope: Rotation.of(layer.attention.rope) for layer in spec.layers}
        self.pools = make_pools(spec, pages + 1, dtype)

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.pools)

    def open(self, step: PaddedStep, copies: IntArray) -> "PortablePages":
        mx.synchronize()
        copy_pages([pool for both in self.pools for pool in both], copies)
        return PortablePages(self, step)


class PortablePages:
    """One step's way through a PortableCache."""

    def __init__(self, cache: PortableCache, step: PaddedStep) -> None:
        self.ops, self.pools = cache.ops, cache.pools
        self.slots = mx.array(step.slots)
        self.turns: Mapping[Rope, tuple[mx.array, mx.array]] = {
            rope: rotation.at(step.positions) for rope, rotation in cache.rotations.items()
        }
        self.groups, answers = groups_of(step)
        self.answers = mx.array(answers)

    def place(self, number: int, spec: Attention, norms: HeadNorms, qkv: mx.array) -> mx.array:
        q, keys, values = mx.split(qkv, [spec.heads, spec.heads + spec.kv_heads], axis=1)
        if norms is not None:
            q, keys = self.ops.rms_norm(q, norms[0]), self.ops.rms_norm(keys, norms[1])
        turns, interleaved = self.turns[spec.rope], spec.rope.interleaved
        key_pool, value_pool = self.pools[number]
        key_pool[self.slots] = rotate(keys, *turns, interleaved)
        value_pool[self.slots] = values
        return rotate(q, *turns, interleaved)

    def attend(self, number: int, spec: Attention, q: mx.array) -> mx.array:
        found = []
        for group in self.groups:
            keys, values = (self.read(pool, group.tables) for pool in self.pools[number])         # (n, KV, W * 32, hs)
            queries = q[group.queries].swapaxes(1, 2)                                             # (n, H, Lq, hs)
            mask = group.mask(spec.sliding_window)
            mixed = attention(queries, keys, values, spec.scale, mask, spec.soft_cap)
            found.append(mixed.swapaxes(1, 2).reshape(-1, spec.heads, spec.head_size))
        return (found[0] if len(found) == 1 else mx.concatenate(found))[self.answers]             # (T, H, hs)

    @staticmethod
    def read(pool: mx.array, tables: mx.array) -> mx.array:
        _, kv_heads, head_size = pool.shape
        pages = pool.reshape(-1, PAGE_TOKENS, kv_heads, head_size)[tables]                        # (n, W, 32, KV, hs)
        return pages.reshape(len(tables), -1, kv_heads, head_size).swapaxes(1, 2)

    @property
    def written(self) -> Sequence[mx.array]:
        return [pool for both in self.pools for pool in both]


def groups_of(step: PaddedStep) -> tuple[list[RowGroup], IntArray]:
    """Rows by their number of queries, rounded up to a power of two; and where each token's answer is among all groups'."""
    lengths = step.lengths
    sizes = 1 << np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int32)
    answers, first, groups = np.zeros(len(step.tokens), np.int32), 0, []
    for size in np.unique(sizes[lengths > 0]).tolist():
        rows = np.flatnonzero((sizes == size) & (lengths > 0))
        longest = min(int(size), rounded_up(int(lengths[rows].max())))
        offsets = np.arange(longest)
        real = offsets < lengths[rows, None]                                                      # (n, Lq)
        queries = np.where(real, step.row_starts[rows, None] + offsets, step.row_starts[rows, None])
        answers[queries[real]] = first + np.flatnonzero(real)
        width = min(rounded_width(-(-int(step.kv_lengths[rows].max()) // PAGE_TOKENS)), step.page_tables.shape[1])
        groups.append(
            RowGroup(
                mx.array(queries.astype(np.int32)),
                mx.array(step.positions[queries]),
                mx.array(step.page_tables[rows, :width]),
            )
        )
        first += real.size
    return groups, answers
