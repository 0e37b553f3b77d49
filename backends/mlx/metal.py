"""Writing to the paged KV cache and attention over it as Metal kernels; cache.py and model.py call this on a Mac.

One MetalKernels belongs to one model, as it keeps kernels and small constants; it is made and used on the device thread only.
Every function is lazy. Pools are read, and written in place, as they are: they must be evaluated, contiguous arrays whose
slots are page * 32 + offset. Who reads the pools gives the token of the last write, so that MLX orders the two.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from backends.mlx.metal_library import Constant, KernelLibrary, MakeKernel
from engine.errors import ConfigError
from engine.model.spec import Attention

__all__ = ["HEAD_SIZES", "LONGEST_SPLIT", "MOST_SPLITS", "PAGE", "LayerPools", "MetalKernels", "parts_of", "splits_of"]

PAGE = 32                             # tokens; kernels/common.metal has the same
HEAD_SIZES = range(8, 257, 8)
FLOATS = (mx.float16, mx.bfloat16, mx.float32)
CACHES = (*FLOATS, mx.int8, mx.uint8)  # uint8: E4M3
LONGEST_SPLIT = 8                     # pages that one threadgroup of attend_decode reads while there are few of them
MOST_SPLITS, ENOUGH_GROUPS = 32, 512


@dataclass(frozen=True, slots=True)
class LayerPools:
    """A layer's KV cache: (pages * 32, KV, D) of float16, bfloat16, float32, uint8 (E4M3) or int8.

    int8 has scales (pages * 32, KV) in float32, one for each token and head: number = scale * int8. The others have none.
    """

    keys: mx.array
    values: mx.array
    key_scales: mx.array | None = None
    value_scales: mx.array | None = None

    def __post_init__(self) -> None:
        if self.keys.dtype not in CACHES:
            raise ConfigError(
                f"a KV cache of {self.keys.dtype} has no kernels: choose float16, bfloat16, float32, int8 or uint8"
            )
        if self.keys.shape[2] not in HEAD_SIZES:
            raise ConfigError(f"head size {self.keys.shape[2]} has no Metal kernel, it must be a multiple of 8 up to 256")
        wanted = self.keys.dtype == mx.int8
        if any((scales is not None) != wanted for scales in (self.key_scales, self.value_scales)):
            raise ConfigError(f"a KV cache of {self.keys.dtype}: int8 needs scales of keys and values, no other may have any")


def splits_of(pages: int, groups: int) -> int:
    """Into how many parts attend_decode cuts a context of so many pages, with so many threadgroups for each part."""
    splits = 1
    while splits * LONGEST_SPLIT < pages and splits < MOST_SPLITS and splits * groups < ENOUGH_GROUPS:
        splits *= 2
    return splits


def parts_of(pages: int, rows: int, spec: Attention) -> int:
    """splits_of() for a step of so many rows in a layer."""
    return splits_of(pages, rows * spec.kv_heads * tiles_of(spec.heads // spec.kv_heads))


def tiles_of(group: int) -> int:
    """Threadgroups for the heads that share a KV head: each has up to 8 of them."""
    return -(-group // min(group, 8))


class MetalKernels:
    """The kernels of one model's cache and attention. `make_kernel` is mx.fast.metal_kernel, but for tests."""

    def __init__(self, make_kernel: MakeKernel | None = None) -> None:
        self.library = KernelLibrary(make_kernel)
        self._scalars: dict[tuple[float, mx.Dtype], mx.array] = {}
        self._unused: mx.array | None = None

    def write_cache(self, keys: mx.array, values: mx.array, pools: LayerPools, slots: mx.array) -> mx.array:
        """Put keys and values (T, KV, D) at slots (T,) int32 of the pools, in place; slots outside of them are left out.

        Returns the token (1,) that readers of the pools take.
        """
        tokens, kv_heads, head_size = keys.shape
        group = min(8, tokens * kv_heads)
        (token,) = self.library.run(
            "write_cache",
            {"keys": keys, "values": values, "slots": _padded(slots, -1), **self._pools(pools)},
            {"token": ((1,), mx.float32)},
            {"T": keys.dtype, "C": pools.keys.dtype, "KV": kv_heads, "D": head_size, "GROUP": group},
            groups=(-(-tokens * kv_heads // group), 1, 1),
            threads=32 * group,
        )
        return token

    def attend_decode(
        self,
        q: mx.array,
        pools: LayerPools,
        tables: mx.array,
        lengths: mx.array,
        token: mx.array,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> mx.array:
        """Attention of one query for each row: q (B, H, D), tables (B, W) and lengths (B,) int32 -> (B, H, D), q's dtype.

        A row sees lengths[b] tokens, its own included, the last `window` of them if there is one. Length 0 gives zeros.
        """
        rows, heads, head_size = q.shape
        kv_heads = pools.keys.shape[1]
        group = heads // kv_heads
        members, tiles = min(group, 8), tiles_of(group)
        splits = splits_of(tables.shape[1], rows * kv_heads * tiles)
        parts = max(1, 8 // members)
        one = splits == 1
        shape = (rows, heads, head_size) if one else (rows, heads, splits, head_size)
        out, stats = self.library.run(
            "attend_decode",
            {
                "q": q,
                "tables": _padded(tables, 0),
                "lengths": _padded(lengths, 0),
                **self._pools(pools),
                **self._settings(token, scale, window, soft_cap),
            },
            {
                "out": (shape, q.dtype if one else mx.float32),
                "stats": ((8,) if one else (rows, heads, splits, 2), mx.float32),
            },
            {
                **self._constants(q, pools),
                "O": q.dtype if one else mx.float32,
                "HEADS": members,
                "PARTS": parts,
                "SPLITS": splits,
            },
            groups=(kv_heads * tiles, rows, splits),
            threads=32 * members * parts,
        )
        if one:
            return out
        (combined,) = self.library.run(
            "combine_splits",
            {"parts": out, "stats": stats},
            {"out": (q.shape, q.dtype)},
            {"T": q.dtype, "D": head_size, "SPLITS": splits},
            groups=(rows * heads, 1, 1),
            threads=32,
        )
        return combined

    def attend_prefill(
        self,
        q: mx.array,
        pools: LayerPools,
        tables: mx.array,
        row_starts: mx.array,
        lengths: mx.array,
        token: mx.array,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> mx.array:
        """Attention of rows of any number of queries: q (T, H, D), tables (B, W), row_starts (B + 1,), lengths (B,) int32.

        Row b has the queries row_starts[b] : row_starts[b + 1] and sees lengths[b] tokens, these included; each query sees
        what is not behind it. Rows without queries are padding. What lies behind the last row is undefined in the result.
        """
        tokens, heads, head_size = q.shape
        kv_heads = pools.keys.shape[1]
        row_bytes = head_size * q.dtype.size
        lengths = _padded(lengths, 0)
        missing = len(lengths) + 1 - len(row_starts)             # padded rows end where they begin
        row_starts = mx.pad(row_starts, (0, missing), constant_values=tokens) if missing else row_starts
        (out,) = self.library.run(
            "attend_prefill",
            {
                "q": q,
                "tables": _padded(tables, 0),
                "row_starts": row_starts,
                "lengths": lengths,
                **self._pools(pools),
                **self._settings(token, scale, window, soft_cap),
            },
            {"out": (q.shape, q.dtype)},
            {**self._constants(q, pools), "BLOCK": 32 if row_bytes <= 256 else 16 if row_bytes <= 512 else 8},
            groups=(tokens * (heads // kv_heads) // 32 + len(lengths), kv_heads, 1),
            threads=128,
        )
        return out

    def self_check(self) -> bool:
        """Whether, on this device, a kernel and the host see what was written in place, and no other slot has changed."""
        if self.library.native and not mx.metal.is_available():
            return False
        tokens, head_size = 5, 64
        keys = (np.arange(tokens * head_size, dtype=np.float32).reshape(tokens, 1, head_size) % 61 - 30) / 8
        slots = np.array([33, 0, 95, 31, 32], np.int32)
        pools = LayerPools(mx.full((3 * PAGE, 1, head_size), 7.0), mx.full((3 * PAGE, 1, head_size), 7.0))
        mx.eval(pools.keys, pools.values)
        token = self.write_cache(mx.array(keys), mx.array(-keys), pools, mx.array(slots))
        tables = mx.zeros((8, 8), mx.int32)           # a context of one token: its value is the result
        lengths = mx.array([1, 0, 0, 0, 0, 0, 0, 0], mx.int32)
        out = self.attend_decode(mx.zeros((8, 1, head_size)), pools, tables, lengths, token, 1.0)
        mx.eval(out, token)
        expected = np.full((3 * PAGE, 1, head_size), 7.0, np.float32)
        expected[slots] = keys
        kept = expected[slots] * -1
        there = np.array(pools.values)
        return bool(
            np.array_equal(np.array(pools.keys), expected)
            and np.array_equal(there[slots], kept)
            and (np.delete(there, slots, axis=0) == 7.0).all()
            and np.array_equal(np.array(out)[0, 0], -keys[1, 0])
        )

    def _pools(self, pools: LayerPools) -> dict[str, mx.array]:
        if self._unused is None:
            self._unused = mx.zeros((8, 1))
        return {
            "key_pool": pools.keys,
            "value_pool": pools.values,
            "key_scales": self._unused if pools.key_scales is None else pools.key_scales,
            "value_scales": self._unused if pools.value_scales is None else pools.value_scales,
        }

    def _settings(self, token: mx.array, scale: float, window: int | None, soft_cap: float | None) -> dict[str, mx.array]:
        return {
            "token": token,
            "scale": self._scalar(scale, mx.float32),
            "soft_cap": self._scalar(soft_cap or 0.0, mx.float32),
            "window": self._scalar(window or 0, mx.int32),
        }

    def _scalar(self, value: float, dtype: mx.Dtype) -> mx.array:
        key = (value, dtype)
        if key not in self._scalars:
            self._scalars[key] = mx.array(value, dtype)
            mx.eval(self._scalars[key])
        return self._scalars[key]

    @staticmethod
    def _constants(q: mx.array, pools: LayerPools) -> dict[str, Constant]:
        kv_heads, head_size = pools.keys.shape[1:]
        return {"T": q.dtype, "C": pools.keys.dtype, "D": head_size, "KV": kv_heads, "G": q.shape[1] // kv_heads}


def _padded(numbers: mx.array, value: int) -> mx.array:
    """At least 8 entries: MLX puts smaller arrays into another address space, where kernels do not compile."""
    if numbers.size >= 8:
        return numbers
    missing = -(-8 // (numbers.size // len(numbers))) - len(numbers)
    return mx.pad(numbers, [(0, missing), *[(0, 0)] * (numbers.ndim - 1)], constant_values=value)
