"""Attention as its definition says it, in float64, and caches of pages as NumPy arrays: what tests of attention compare with.

Nothing here knows how the kernels go about it; E4M3 and bfloat16 are written out here once more, from their definitions.
"""

from dataclasses import dataclass

import numpy as np

from backends.cuda.attention import CacheLayout, attention_kernels
from engine.model.spec import Attention, Rope
from tests.cuda.devices import make_device

__all__ = [
    "PAGE", "Case", "assert_close", "device_for", "e4m3_values", "from_bf16", "is_close", "make_attention", "to_bf16",
    "to_e4m3",
]  # fmt: skip

PAGE = 32
NAN_BF16 = 0xFFFF


def to_bf16(x):
    """Rounded to nearest, ties to even; as the 16 bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def e4m3_values():
    """The 256 numbers: sign, 4 bits of exponent (bias 7), 3 of mantissa; all ones are NaN, there is no infinity."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    size[code & 127 == 127] = np.nan
    return np.where(code > 127, -size, size)


def to_e4m3(x):
    """The nearest one, of two equally near ones the even; 448 is the largest."""
    sizes = e4m3_values()[:127]
    size = np.minimum(np.abs(np.asarray(x, np.float64)), 448)
    above = np.clip(np.searchsorted(sizes, size), 1, 126)
    low, high = sizes[above - 1], sizes[above]
    up = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return (np.where(up, above, above - 1) | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def make_attention(heads=2, kv_heads=1, head_size=64, **more):
    rope = more.pop("rope", Rope(theta=10_000.0, rotary_size=head_size, interleaved=False))
    scale = more.pop("scale", head_size**-0.5)
    return Attention(heads=heads, kv_heads=kv_heads, head_size=head_size, scale=scale, rope=rope, **more)


def reference(queries, keys, values, positions, attention):
    """queries (n, H, hs) at positions (n,), keys and values (tokens, KV, hs) -> (n, H, hs), all float64."""
    group = attention.heads // attention.kv_heads
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = attention.scale * np.einsum("nhd,thd->hnt", queries, keys)
    if attention.soft_cap is not None:
        scores = attention.soft_cap * np.tanh(scores / attention.soft_cap)
    back = np.asarray(positions)[:, None] - np.arange(len(keys))
    hidden = back < 0
    if attention.sliding_window is not None:
        hidden |= back >= attention.sliding_window
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hnt,thd->nhd", weights / weights.sum(-1, keepdims=True), values)


@dataclass
class Case:
    """Rows of (queries, tokens of context) with random numbers, in pages in any order, and what attention makes of them."""

    attention: Attention
    layout: CacheLayout
    layer: int
    row_starts: np.ndarray
    kv_lengths: np.ndarray
    tables: np.ndarray               # (B, W) page numbers, beginning at far_page
    pool: np.ndarray                 # (pages, layers, 2, KV, 32, hs) bits; what is not written is NaN
    far_page: int                    # the number of the pool's first page
    qkv: np.ndarray                  # bits; keys and values are NaN
    expected: np.ndarray             # (T, H hs)

    @classmethod
    def make(cls, rows, attention, *, item="bf16", layers=1, layer=0, far=False, seed=0, spare_columns=0):
        random = np.random.default_rng(seed)
        counts, lengths = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        layout = CacheLayout(layers, attention.kv_heads, attention.head_size, item)
        pages = -(-lengths // PAGE)
        far_page = (9 << 30) // layout.page_bytes if far else 0
        kind = np.uint16 if item == "bf16" else np.uint8
        pool = np.full((pages.sum(), layers, 2, attention.kv_heads, PAGE, attention.head_size), np.iinfo(kind).max, kind)
        tables = np.zeros((len(rows), pages.max() + spare_columns), np.int32)
        numbers = random.permutation(pages.sum())
        tokens, heads, size = counts.sum(), attention.heads, attention.head_size
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        queries = to_bf16(random.normal(size=(tokens, heads, size)) * 1.5)
        expected = np.zeros((tokens, heads, size))
        for row, (count, length) in enumerate(rows):
            mine, numbers = numbers[: pages[row]], numbers[pages[row] :]
            tables[row, : pages[row]] = mine + far_page
            both = random.normal(size=(2, length, attention.kv_heads, size))
            bits = to_bf16(both) if item == "bf16" else to_e4m3(both)
            both = from_bf16(bits).astype(np.float64) if item == "bf16" else e4m3_values()[bits]
            for token in range(length):
                pool[mine[token // PAGE], layer, :, :, token % PAGE] = bits[:, token]
            at = slice(starts[row], starts[row + 1])
            positions = np.arange(length - count, length)
            expected[at] = reference(from_bf16(queries[at]).astype(np.float64), both[0], both[1], positions, attention)
        qkv = np.full((tokens, (heads + 2 * attention.kv_heads) * size), NAN_BF16, np.uint16)
        qkv[:, : heads * size] = queries.reshape(tokens, -1)
        expected = expected.reshape(tokens, -1)
        return cls(attention, layout, layer, starts, lengths, tables, pool, far_page, qkv, expected)

    def on(self, device):
        """The arrays on a device: qkv, pool address, row_starts, kv_lengths, tables, width, out."""
        pool = device.put(self.pool)
        return (
            device.put(self.qkv),
            pool.address - self.far_page * self.layout.page_bytes,
            *(device.put(array) for array in (self.row_starts, self.kv_lengths, self.tables)),
            device.put(np.array([self.tables.shape[1]], np.int32)),
            device.put(np.full(self.expected.shape, NAN_BF16, np.uint16)),
        )


def device_for(attentions, items=("bf16",), files=None, **more):
    """A device with the kernels for all of these, built together."""
    device = make_device(**more)
    kernels = {kernel: None for attention in attentions for item in items for kernel in attention_kernels(attention, item)}
    device.prepare([kernel for kernel in kernels if files is None or kernel.file in files])
    return device


def is_close(got, expected):
    """As near as bfloat16 results have to be."""
    error = got - expected
    worst = np.abs(error).max() / max(1.0, np.abs(expected).max())
    return bool(worst <= 2e-2 and np.linalg.norm(error) <= 5e-3 * np.linalg.norm(expected))


def assert_close(got, expected):
    error = np.abs(got - expected)
    assert not np.isnan(got).any(), f"NaN in rows {np.unique(np.where(np.isnan(got))[0])}"
    assert is_close(got, expected), (error.max(), np.linalg.norm(error) / np.linalg.norm(expected))


