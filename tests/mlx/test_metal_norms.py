"""A sum with its RMS norm, q/k norm with rope and cache write, and copies of pages, against NumPy in float64."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

import mlx.core as mx

from backends.mlx import metal_cache
from backends.mlx.cache import PortableCache, copy_rounds
from backends.mlx.metal import PAGE, LayerPools, MetalKernels
from backends.mlx.metal_cache import MetalCache, PagedKernels
from backends.mlx.metal_norms import NormKernels, rope_table
from backends.mlx.ops import Ops
from backends.mlx.steps import PaddedStep
from engine.errors import ConfigError
from tests.mlx.metal_support import TOLERANCES, as_float, assert_close
from tests.mlx.shim import ShimError, ShimMetal
from tests.support.random_models import small_model
from tests.support.steps import build_step

F16, BF16, F32, INT8, E4M3 = mx.float16, mx.bfloat16, mx.float32, mx.int8, mx.uint8
LAST = 262_143
SAID = r"the error is|error is|depend on the order|was touched|end of an allocation"


def make_kernels(edits=None):
    if mx.metal.is_available() and not edits:
        return NormKernels()
    return NormKernels(ShimMetal((0, 1, 2) if edits else (0, 1), edits).metal_kernel)


def draw(seed, shape, dtype):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def check_norm(kernels, width, tokens, dtype):
    x, y, weight = draw(1, (tokens, width), dtype), draw(2, (tokens, width), dtype), draw(3, (width,), dtype)
    residual, normed = kernels.add_rms_norm(x, y, weight, 1e-6)
    total = as_float(x) + as_float(y)
    assert_near(as_float(residual), total, TOLERANCES[dtype])
    stored = as_float(residual)
    expected = stored / np.sqrt((stored**2).mean(-1, keepdims=True) + 1e-6) * as_float(weight)
    assert_near(as_float(normed), expected, TOLERANCES[dtype])


def assert_near(got, expected, tolerance):
    assert_close(got[:, :, None], expected[:, :, None], tolerance)


@pytest.mark.parametrize(("width", "tokens", "dtype"),
                         [(8, 3, F32), (100, 1, F16), (576, 2, BF16), (1537, 1, F16), (5120, 1, F32)])  # fmt: skip
def test_a_sum_and_its_norm_at_any_width(width, tokens, dtype):
    check_norm(make_kernels(), width, tokens, dtype)


@pytest.mark.skipif(mx.metal.is_available(), reason="a native kernel cannot be edited")
def test_a_norm_without_its_barrier_is_found():
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    with pytest.raises(AssertionError, match=SAID):
        check_norm(make_kernels({"add_rms_norm": lambda text: text.replace(barrier, "")}), 576, 2, F32)


def turned(x, positions, frequencies, halves, stretch, weight):
    """x (T, heads, D) as the definition says, with complex numbers."""
    if weight is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
    out, size = x.copy(), 2 * len(frequencies)
    first, second = (slice(0, size // 2), slice(size // 2, size)) if halves else (slice(0, size, 2), slice(1, size, 2))
    angles = np.multiply.outer(positions.astype(np.float64), frequencies)[:, None]
    spun = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles) * stretch
    out[..., first], out[..., second] = spun.real, spun.imag
    return out


def check_rope(kernels, size, rotary, dtype, item, halves, norm, stretch=1.0, padding=0):
    positions, slots = np.array([0, 1, 77, 131_071, LAST], np.int32), np.array([95, 0, -1, 33, 32], np.int32)
    heads, kv_heads, slots_in_all = 3, 2, 3 * PAGE
    q, k, v = (draw(seed, (5, count, size), dtype) for seed, count in enumerate((heads, kv_heads, kv_heads)))
    qkv = mx.concatenate([q, k, v], axis=1)
    weights = (draw(5, (size,), dtype), draw(6, (size,), dtype)) if norm else None
    frequencies = 10_000.0 ** (-np.arange(0, rotary, 2) / max(1, rotary))
    shape = (slots_in_all, kv_heads, size)
    arrays = [mx.zeros(shape, F32).astype(item) for _ in range(2)]
    scales = [mx.zeros(shape[:2]) for _ in range(2)] if item == INT8 else []
    mx.eval(arrays, scales)
    pools = LayerPools(*arrays, *scales)
    table = rope_table(frequencies, stretch, halves=halves)
    given = [mx.array(np.pad(ints, (0, padding), constant_values=2)) for ints in (positions, slots)]
    out, token = kernels.rope_and_write(qkv, pools, *given, table, weights)
    assert out.shape == q.shape
    mx.eval(out, token)
    own = [None if weights is None else as_float(weight) for weight in weights or (None, None)]
    expected = [turned(as_float(x), positions, frequencies, halves, stretch, w) for x, w in zip((q, k), own, strict=True)]
    assert_close(as_float(out), expected[0], TOLERANCES[dtype])
    kept, others = slots >= 0, np.setdiff1d(np.arange(slots_in_all), slots)
    for pool, scale, right in ((pools.keys, pools.key_scales, expected[1]), (pools.values, pools.value_scales, as_float(v))):
        found = as_float(mx.from_fp8(pool, F32)) if item == E4M3 else as_float(pool)
        assert (found[others] == 0).all()
        if scale is not None:          # half a step, and what rounding of keys to their dtype may add
            steps = np.abs(right[kept]).max(-1) / 127
            np.testing.assert_allclose(np.array(scale)[slots[kept]], steps, rtol=TOLERANCES[dtype])
            off = np.abs(found[slots[kept]] * np.array(scale)[slots[kept]][..., None] - right[kept])
            assert (off <= steps[..., None] * (0.5 + 127 * TOLERANCES[dtype])).all()
            continue
        assert_close(found[slots[kept]], right[kept], 7e-2 if item == E4M3 else TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("size", "rotary", "dtype", "item", "halves", "norm", "stretch"),
    [(64, 64, F16, F16, False, False, 1.0), (80, 20, BF16, BF16, True, False, 1.0), (96, 96, F16, INT8, True, True, 1.0),
     (128, 64, F32, F32, True, True, 1.25), (128, 128, F16, E4M3, True, False, 1.0), (256, 128, F16, F16, False, True, 1.0),
     (64, 0, F16, F16, True, False, 1.0)],
)  # fmt: skip
def test_queries_and_keys_are_turned_and_come_to_their_slots(size, rotary, dtype, item, halves, norm, stretch):
    check_rope(make_kernels(), size, rotary, dtype, item, halves, norm, stretch)


def test_positions_and_slots_may_be_longer_than_the_tokens():
    check_rope(make_kernels(), 64, 64, F32, F32, True, False, padding=4)


BROKEN = {
    "values are keys": ("(turns ? 0 : KV)", "0"),
    "rows of the queries alone": ("* (H + 2 * KV) +", "* H +"),
    "other pairs": ("number + ROTARY / 2", "number + ROTARY / 2 - 1"),
    "the low half of frequencies is lost": (" + uint(ulong(position) * ulong(table[2 * number + 1]) >> 32)", ""),
    "padding is written": ("if (!query && !kept) return;", ""),
}


@pytest.mark.skipif(mx.metal.is_available(), reason="a native kernel cannot be edited")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_copy_is_found(what):
    right, wrong = BROKEN[what]
    with pytest.raises(AssertionError, match=SAID):
        check_rope(make_kernels({"rope_write": lambda text: text.replace(right, wrong)}), 64, 64, F32, F32, True, False)


def test_shapes_that_do_not_agree_are_refused():
    with pytest.raises(ConfigError, match="must be"):
        NormKernels().add_rms_norm(mx.zeros((2, 64)), mx.zeros((2, 65)), mx.zeros((64,)), 1e-6)
    pool = mx.zeros((32, 1, 64))
    qkv, ones, table = mx.zeros((1, 3, 64)), mx.zeros((1,), mx.int32), rope_table(np.ones(32), halves=True)
    larger = rope_table(np.ones(33), halves=True)
    wrong = [(qkv, ones[:0], table, None), (qkv, ones, larger, None), (qkv, ones, table, (pool[0, 0, :8],) * 2),
             (qkv[:, :2], ones, table, None)]  # fmt: skip
    for numbers, positions, turns, norms in wrong:
        with pytest.raises(ConfigError, match=r"give each|do not fit|other than \(64,\)"):
            NormKernels().rope_and_write(numbers, LayerPools(pool, pool), positions, ones, turns, norms)
    with pytest.raises(ConfigError, match="4 or more"):
        NormKernels().copy_pages(LayerPools(pool, pool), mx.zeros((3, 2), mx.int32))


# ---- copies of pages ----------------------------------------------------------------------------------------------------


def pools_of_bytes(item, head_size, kv_heads=3, pages=6):
    """Pools whose every byte is drawn, so that NaNs and all codes are among the numbers; and what is in them, by page."""
    random, made = np.random.default_rng(head_size), []
    shape = (pages * PAGE, kv_heads, head_size)
    for numbers, size in ((shape, item.size),) * 2 + ((shape[:2], 4),) * 2:
        raw = random.integers(0, 256, (*numbers, size), np.uint8).reshape(*numbers[:-1], -1)
        made.append(raw if size == 1 else raw.view({2: np.uint16, 4: np.uint32}[size]))
    items = (item, item, F32, F32)[: 4 if item == INT8 else 2]
    arrays = [mx.array(raw).view(kind) for raw, kind in zip(made, items, strict=False)]
    mx.eval(arrays)
    return LayerPools(*arrays), [raw.reshape(pages, -1) for raw in made[: len(items)]]


def pages_of(pools, pages=6):
    arrays = [array for array in (pools.keys, pools.values, pools.key_scales, pools.value_scales) if array is not None]
    kinds = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
    return [np.array(array.view(kinds[array.itemsize])).reshape(pages, -1) for array in arrays]


def check_copies(kernels, item, head_size, kv_heads=3):
    pools, before = pools_of_bytes(item, head_size, kv_heads)
    pairs = np.array([[5, 0], [-1, -1], [1, 4], [5, 3], [-1, 2], [2, -1], [6, 2], [2, 6]], np.int32)
    token = kernels.copy_pages(pools, mx.array(pairs))
    mx.eval(token)
    assert np.array(token).tolist() == [1]
    for after, old in zip(pages_of(pools), before, strict=True):
        np.testing.assert_array_equal(after, old[[5, 1, 2, 5, 1, 5]], err_msg="the error is in a page")


@pytest.mark.parametrize(("item", "head_size", "kv_heads"),
                         [(F16, 64, 3), (BF16, 80, 1), (F32, 128, 2), (E4M3, 8, 1), (INT8, 40, 3)])  # fmt: skip
def test_pages_are_copied_bit_by_bit_and_no_other_changes(item, head_size, kv_heads):
    check_copies(make_kernels(), item, head_size, kv_heads)


BROKEN_COPIES = {
    "half of a page": ("at < pieces;", "at < pieces / 2;"),
    "values are left out": ("group.z % 2 == 1", "false"),
    "padding is copied": ("if (source < 0 ||", "if ("),
    "pages behind the end": (" || source >= pages", ""),
    "the other way": ("to[at] = from[at]", "const_cast<device uint4*>(from)[at] = to[at]"),
}


@pytest.mark.skipif(mx.metal.is_available(), reason="a native kernel cannot be edited")
@pytest.mark.parametrize("what", BROKEN_COPIES)
def test_a_broken_copy_of_pages_is_found(what):
    right, wrong = BROKEN_COPIES[what]
    with pytest.raises(AssertionError, match=r"the error is in a page|depend on the order|was touched"):
        check_copies(make_kernels({"copy_pages": lambda text: text.replace(right, wrong)}), F16, 64)


@pytest.mark.parametrize(
    ("copies", "launches"),
    [([[5, 0]], 1), ([[5, 0], [5, 1], [4, 2]], 1), ([[5, 0], [0, 1], [1, 2]], 3), ([[1, 0], [2, 1]], 2),
     ([[5, 0], [4, 0]], 2), ([[n, n + 6] for n in range(6)], 1)],
)  # fmt: skip
def test_copies_of_a_cache_keep_their_order_and_come_before_what_the_step_writes(copies, launches):
    """Against the cache of MLX's own operations; a page that is copied on must have arrived."""
    assert len(copy_rounds(np.array(copies, np.int32))) == launches
    check_cache_copies(copies)


@pytest.mark.skipif(mx.metal.is_available(), reason="the shim's own check")
def test_copies_that_are_not_kept_in_order_are_found(monkeypatch):
    monkeypatch.setattr(metal_cache, "copy_rounds", lambda copies: [copies])
    with pytest.raises(ShimError, match="depend on the order"):
        check_cache_copies([[5, 0], [0, 1], [1, 2]])


def test_copies_wait_for_the_last_write_of_the_step_before():
    """MLX orders by data alone, so what the kernel copies must depend on the token: a token that is no 1 is seen in it."""
    cache = caches_of(64)[0]
    before = np.array(cache.pools[0].keys)
    cache.last_token = mx.array([-99.0])
    cache.copy_pages(np.array([[1, 0]], np.int32))
    mx.eval(cache.last_token)
    np.testing.assert_array_equal(np.array(cache.pools[0].keys), before)


def caches_of(size):
    """With the same numbers: on the kernels, and on MLX's own operations."""
    spec = small_model("llama")[0]
    a = spec.layers[0].attention
    kind = replace(a, head_size=size, rope=replace(a.rope, rotary_size=size))
    spec = replace(spec, layers=tuple(replace(layer, attention=kind) for layer in spec.layers))
    make_kernel = None if mx.metal.is_available() else ShimMetal((0, 1)).metal_kernel
    kernels = PagedKernels(MetalKernels(make_kernel), NormKernels(make_kernel))
    ours, exact = MetalCache(spec, Ops(1e-5), 12, F32, kernels), PortableCache(spec, Ops(1e-5), 12, F32)
    for layer, (pools, others) in enumerate(zip(ours.pools, exact.pools, strict=True)):
        for array, other in zip((pools.keys, pools.values), others, strict=True):
            array[:], other[:] = draw(layer, array.shape, F32), draw(layer, array.shape, F32)
            mx.eval(array, other)
    return ours, exact, kind


def check_cache_copies(copies):
    ours, exact, kind = caches_of(64)
    step = PaddedStep.of(build_step([([1, 2], 3, [copies[0][1]])]), 12)
    qkv = draw(7, (len(step.tokens), kind.heads + 2 * kind.kv_heads, 64), F32)
    for cache in (ours, exact):
        pages = cache.open(step, np.array(copies, np.int32))
        for number in range(len(ours.pools)):
            pages.place(number, kind, None, qkv)
        mx.eval(*pages.written)
    for pools, others in zip(ours.pools, exact.pools, strict=True):
        for array, other in zip((pools.keys, pools.values), others, strict=True):
            np.testing.assert_allclose(np.array(array)[: 12 * PAGE], np.array(other)[: 12 * PAGE], atol=1e-5)
