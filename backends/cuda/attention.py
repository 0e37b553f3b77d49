"""Attention on pages: launches of attention_decode.cu and attention_prefill.cu, and the blocks of queries for the latter.

ops.py calls it, once per layer and kind of row: rows of one token come first in a step (attend_decode), the others are cut
into blocks on the host (query_blocks, attend_prefill). A launch of attend_decode depends on no length, so that a graph can
hold it. Which kernels there are is asked here for positions too.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backends.cuda.cache import PAGE_TOKENS, CacheItem, CacheLayout
from backends.cuda.device import Argument, Array, Device, Kernel, Stream, make_array
from backends.cuda.rope import position_kernels, rotate_and_write, rotations
from engine.errors import UnsupportedModel
from engine.model.spec import Attention

__all__ = [
    "CacheItem",
    "CacheLayout",
    "SplitWorkspace",
    "attend_decode",
    "attend_prefill",
    "attention_kernels",
    "queries_per_block",
    "query_blocks",
    "rotate_and_write",
    "rotations",
    "splits_for",
]

WARP = 32
MOST_SPLITS = 64
TILE_TOKENS = 16                     # of a warp of attend_decode
LEAST_SPLIT_PAGES = 2
PREFILL_WARPS = 4
STAGES_BYTES = 72 << 10
BLOCKS_PER_MULTIPROCESSOR = 3        # of attend_decode: what STAGES_BYTES leaves room for on an H100
MOST_ROUNDS = 4                      # of blocks that splits may make
NO_WINDOW = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SplitWorkspace:
    """What splits of attend_decode leave for one another. Steps of a stream share it, whatever their rows and splits are."""

    counters: Array                  # u32, (rows x splits, kv heads x passes): 0 between launches
    partials: Array                  # f32, (rows x splits, heads, head_size + 2)

    @classmethod
    def make(cls, device: Device, stream: Stream, attention: Attention, row_splits: int | None = None) -> "SplitWorkspace":
        """For launches of at most `row_splits` rows x splits; None: whatever splits_for says."""
        per_row = attention.kv_heads * passes(attention, TILE_TOKENS)
        if row_splits is None:
            row_splits = max(1, MOST_ROUNDS * BLOCKS_PER_MULTIPROCESSOR * device.facts.multiprocessors // per_row)
        counters = make_array(device, "u32", row_splits, per_row)
        stream.fill(counters.address, counters.nbytes, 0)
        return cls(counters, make_array(device, "f32", row_splits, attention.heads, attention.head_size + 2))

    @property
    def nbytes(self) -> int:
        return self.counters.nbytes + self.partials.nbytes


def attention_kernels(attention: Attention, item: CacheItem) -> list[Kernel]:
    """What has to be prepared for layers of this kind. Raises UnsupportedModel where there is no kernel."""
    return [decode_kernel(attention, item), prefill_kernel(attention, item), *position_kernels(attention, item)]


def decode_kernel(attention: Attention, item: CacheItem) -> Kernel:
    return Kernel("attention_decode.cu", f"attend_decode<{supported_head_size(attention)}, {cpp(item == 'fp8')}>")


def prefill_kernel(attention: Attention, item: CacheItem) -> Kernel:
    return Kernel("attention_prefill.cu", f"attend_prefill<{supported_head_size(attention)}, {cpp(item == 'fp8')}>")


def supported_head_size(attention: Attention) -> int:
    size = attention.head_size
    if size % 16 or not 16 <= size <= 256:
        raise UnsupportedModel(
            f"head size {size}: the cuda backend has attention kernels for multiples of 16 from 16 to 256: "
            "choose another model, or --backend cpu"
        )
    return size


# ---- rows of one token -----------------------------------------------------------------------------------------------------


def splits_for(rows: int, attention: Attention, multiprocessors: int, most_pages: int) -> int:
    """Into how many shares a context is split, so that `rows` rows keep the device busy; most_pages: of the longest context.

    The fewest that use nine tenths of what the best choice uses of the multiprocessors, counted in whole rounds of blocks.
    """
    blocks = rows * attention.kv_heads * passes(attention, TILE_TOKENS)
    room = multiprocessors * BLOCKS_PER_MULTIPROCESSOR
    most = max(1, min(MOST_SPLITS, most_pages // LEAST_SPLIT_PAGES, MOST_ROUNDS * room // blocks))
    use = [blocks * n / (-(-blocks * n // room) * room) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(use, 1) if share >= 0.9 * max(use))


def attend_decode(
    stream: Stream, qkv: Array, pool_address: int, layout: CacheLayout, layer: int, rows: int, row_starts: Array,
    kv_lengths: Array, page_tables: Array, table_width: Array, splits: int, workspace: SplitWorkspace | None, out: Array,
    attention: Attention,
) -> None:  # fmt: skip
    """Attention of rows 0 to rows - 1, which have one token each; out (T, H hs) bf16 at their tokens.

    row_starts (B + 1), kv_lengths (B), page_tables (B, W), table_width (1): i32, read on the device. The workspace may be
    None where splits is 1.
    """
    assert 1 <= splits <= MOST_SPLITS, splits
    counters: Argument = 0
    partials: Argument = 0
    per_row = attention.kv_heads * passes(attention, TILE_TOKENS)
    if splits > 1:
        assert workspace is not None
        assert rows * splits <= workspace.partials.shape[0], (rows, splits, workspace)
        counters, partials = workspace.counters, workspace.partials
    stream.launch(
        decode_kernel(attention, layout.item), (rows, per_row, splits), decode_warps(attention.head_size) * WARP,
        decode_shared_bytes(attention.head_size, layout.item_bytes),
        qkv, pool_address + layout.keys(layer), np.int64(layout.page_bytes), row_starts, kv_lengths, page_tables, table_width,
        out, partials, counters, *of_heads(attention),
    )  # fmt: skip


def decode_warps(head_size: int) -> int:
    return 4 if head_size <= 128 else 2


def decode_shared_bytes(head_size: int, item_bytes: int) -> int:
    """Tiles of keys and values, as many for each warp as STAGES_BYTES allow but 2 to 6; and the queries of large heads."""
    stage = decode_warps(head_size) * 2 * TILE_TOKENS * shared_stride(head_size * item_bytes)
    queries = 0 if head_size <= 128 else head_size // 16 * WARP * 16
    return min(6, max(2, STAGES_BYTES // stage)) * stage + queries


# ---- rows of several tokens ------------------------------------------------------------------------------------------------


def prefill_rows(head_size: int) -> int:
    """(query, head) pairs of a block."""
    return PREFILL_WARPS * 16 * (2 if head_size <= 128 else 1)


def queries_per_block(attention: Attention) -> int:
    """How many queries fit in a block beside one another, each with the heads of a group."""
    rows = prefill_rows(attention.head_size)
    return rows // min(rows, attention.heads // attention.kv_heads)


def query_blocks(
    row_starts: NDArray[np.int32], kv_lengths: NDArray[np.int32], decode_rows: int, queries: int
) -> NDArray[np.int32]:
    """The blocks (n, 4) of the rows after the first `decode_rows`, of at most `queries` queries, those with most keys first.

    Columns: first token in the step, queries, row, keys that the first query sees, itself included.
    """
    starts, counts = row_starts[decode_rows:-1], np.diff(row_starts[decode_rows:])
    blocks_of = -(-counts // queries)
    row = np.repeat(np.arange(len(counts)), blocks_of)
    within = (np.arange(len(row)) - np.repeat(np.cumsum(blocks_of) - blocks_of, blocks_of)) * queries
    seen = kv_lengths[decode_rows:][row] - counts[row] + within + 1
    blocks = np.stack([starts[row] + within, np.minimum(queries, counts[row] - within), row + decode_rows, seen], axis=1)
    return blocks[np.argsort(-seen, kind="stable")].astype(np.int32)


def attend_prefill(
    stream: Stream, qkv: Array, pool_address: int, layout: CacheLayout, layer: int, blocks: Array, page_tables: Array,
    table_width: Array, out: Array, attention: Attention,
) -> None:  # fmt: skip
    """Attention of the queries in blocks (n, 4) i32, see query_blocks; out (T, H hs) bf16 at their tokens."""
    size = attention.head_size
    rows = prefill_rows(size)
    shared_bytes = rows * shared_stride(2 * size) + 4 * PAGE_TOKENS * shared_stride(size * layout.item_bytes)
    stream.launch(
        prefill_kernel(attention, layout.item), (blocks.shape[0], attention.kv_heads * passes(attention, rows), 1),
        PREFILL_WARPS * WARP, shared_bytes,
        qkv, pool_address + layout.keys(layer), np.int64(layout.page_bytes), blocks, page_tables, table_width, out,
        *of_heads(attention),
    )  # fmt: skip


# ---- what both have -----------------------------------------------------------------------------------------------------


def passes(attention: Attention, rows: int) -> int:
    """How many blocks the heads of a group take, `rows` heads each."""
    return -(-(attention.heads // attention.kv_heads) // rows)


def shared_stride(row_bytes: int) -> int:
    """Bytes between rows in shared memory: an odd number of 16-byte pieces, for ldmatrix without bank conflicts."""
    return (row_bytes // 16 | 1) * 16


def of_heads(attention: Attention) -> tuple[Argument, ...]:
    window = NO_WINDOW if attention.sliding_window is None else attention.sliding_window
    cap = 0.0 if attention.soft_cap is None else attention.soft_cap
    counts = (np.int32(attention.heads), np.int32(attention.kv_heads), np.int32(window))
    return *counts, np.float32(attention.scale), np.float32(cap)


def cpp(value: bool) -> str:
    return "true" if value else "false"
