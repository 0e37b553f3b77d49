"""The KV cache on Metal: norm, rope and the write in one kernel, paged attention in another; make_cache() chooses.

Kernels write into the pools in place, and readers take the token of the last write, so that MLX keeps their order. Two steps
may be in flight: the slots of one are made to depend on the last token of the step before, or MLX would see nothing that
orders the two. A page is written again only after the wait of the last ticket that names it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from backends.mlx.cache import Cache, PortableCache, copy_rounds, make_pools
from backends.mlx.metal import LayerPools, MetalKernels
from backends.mlx.metal_norms import NormKernels, RopeTable, rope_table
from backends.mlx.ops import Ops
from backends.mlx.rope import Rotation
from backends.mlx.steps import PaddedStep, rounded_up
from backends.mlx.tree import HeadNorms
from engine.errors import UnsupportedModel
from engine.model.spec import Attention, ModelSpec
from engine.step import IntArray

__all__ = ["MetalCache", "PagedKernels", "make_cache"]


@dataclass(frozen=True, slots=True)
class PagedKernels:
    """What works on pages: attention, and norm, rope and write in one."""

    attention: MetalKernels
    norms: NormKernels


def make_cache(
    spec: ModelSpec, ops: Ops, pages: int, dtype: mx.Dtype, kernels: PagedKernels | None, *, fp8: bool = False
) -> Cache:
    """By the kernels if there are any, else by MLX's own operations. fp8: keys and values as E4M3."""
    if kernels is None:
        if fp8:
            raise UnsupportedModel("an fp8 KV cache wants kernels that cannot be used here: leave --fp8-kvcache out")
        return PortableCache(spec, ops, pages, dtype)
    return MetalCache(spec, ops, pages, mx.uint8 if fp8 else dtype, kernels)


class MetalCache:
    """Pages written and read by kernels."""

    def __init__(self, spec: ModelSpec, ops: Ops, pages: int, item: mx.Dtype, kernels: PagedKernels) -> None:
        self.pages, self.kernels, self.norms, self.epsilon = pages, kernels.attention, kernels.norms, ops.epsilon
        self.pools = [LayerPools(keys, values) for keys, values in make_pools(spec, pages + 1, item)]
        ropes = {layer.attention.rope: Rotation.of(layer.attention.rope) for layer in spec.layers}
        self.tables: dict[object, RopeTable] = {
            rope: rope_table(rotation.frequencies, rotation.stretch, halves=not rope.interleaved)
            for rope, rotation in ropes.items()
        }
        self.last_token = mx.ones(1)
        mx.eval(self.last_token, *(table.turns for table in self.tables.values()))

    @property
    def nbytes(self) -> int:
        return sum(pools.keys.nbytes + pools.values.nbytes for pools in self.pools)

    def open(self, step: PaddedStep, copies: IntArray) -> "MetalPages":
        if len(copies):
            self.copy_pages(copies)
        return MetalPages(self, step)

    def copy_pages(self, copies: IntArray) -> None:
        """Queue copies behind all that was queued; what comes later waits for them as it waits for the last write."""
        for some in copy_rounds(copies):
            padded = np.pad(some, ((0, max(0, 4 - len(some))), (0, 0)), constant_values=-1)
            pairs = mx.array(padded) + mx.minimum(self.last_token, 0).astype(mx.int32)           # a token is 1
            tokens = [self.norms.copy_pages(pools, pairs) for pools in self.pools]
            self.last_token = mx.concatenate(tokens).min(keepdims=True)
        mx.async_eval(self.last_token)  # type: ignore[no-untyped-call]


class MetalPages:
    """One step's way through a MetalCache. Rows of one token come first and go to the kernel that splits a context."""

    def __init__(self, cache: MetalCache, step: PaddedStep) -> None:
        self.cache = cache
        self.positions = mx.array(padded(step.positions))
        self.slots = mx.array(padded(step.slots)) + mx.minimum(cache.last_token, 0).astype(mx.int32)     # a token is 1
        self.tokens: list[mx.array] = []
        longer = np.flatnonzero(step.lengths != 1)
        self.decoding = int(longer[0]) if len(longer) else len(step.lengths)
        total = len(step.tokens)
        if self.decoding == len(step.lengths):
            self.decoding_tokens = total                          # padding too: rows without a context
            self.decode_tables, self.decode_lengths = padded_rows(step.page_tables, step.kv_lengths, total)
            return
        d = self.decoding_tokens = self.decoding
        if d:
            self.decode_tables, self.decode_lengths = padded_rows(step.page_tables[:d], step.kv_lengths[:d], d)
        self.tables, self.lengths = padded_rows(step.page_tables[d:], step.kv_lengths[d:], rounded_up(len(step.lengths) - d))
        starts = np.full(len(self.lengths) + 1, step.count - d, np.int32)
        starts[: len(step.lengths) - d + 1] = step.row_starts[d:] - d
        self.row_starts = mx.array(starts)

    def place(self, number: int, spec: Attention, norms: HeadNorms, qkv: mx.array) -> mx.array:
        pools, table = self.cache.pools[number], self.cache.tables[spec.rope]
        turned, token = self.cache.norms.rope_and_write(
            qkv, pools, self.positions, self.slots, table, norms, self.cache.epsilon
        )
        self.tokens.append(token)
        self.cache.last_token = token
        return turned

    def attend(self, number: int, spec: Attention, q: mx.array) -> mx.array:
        kernels, pools, token = self.cache.kernels, self.cache.pools[number], self.tokens[number]
        settings = spec.scale, spec.sliding_window, spec.soft_cap
        found, d = [], self.decoding_tokens
        if d:
            found.append(kernels.attend_decode(q[:d], pools, self.decode_tables, self.decode_lengths, token, *settings))
        if d < len(q):
            found.append(
                kernels.attend_prefill(q[d:], pools, self.tables, self.row_starts, self.lengths, token, *settings)
            )
        return found[0] if len(found) == 1 else mx.concatenate(found)

    @property
    def written(self) -> Sequence[mx.array]:
        return self.tokens[-1:]


def padded(numbers: IntArray) -> IntArray:
    """With zeros behind them that nobody reads: a kernel takes no array of less than 8."""
    return np.pad(numbers, (0, max(0, 8 - len(numbers))))


def padded_rows(tables: IntArray, lengths: IntArray, rows: int) -> tuple[mx.array, mx.array]:
    """With rows behind them that see nothing; at least 8, as kernels take no smaller arrays."""
    missing = max(8, rows) - len(lengths)
    return mx.array(np.pad(tables, ((0, missing), (0, 0)))), mx.array(np.pad(lengths, (0, missing)))
