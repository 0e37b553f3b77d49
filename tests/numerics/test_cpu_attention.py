"""Paged attention against naive NumPy, and its bits against cutting a prompt into chunks."""

import numpy as np
import pytest

from backends.cpu.model import query_blocks
from backends.cpu.ops import Cache, Ops, StepShape
from backends.cpu.weights import DenseWeights, LayerWeights, Stack
from engine.model.spec import Attention, Dense, Layer, ModelSpec, Rope
from tests.support.cpu_rows import rows_of

NONE = np.zeros(0, np.float32)
NO_STACK = Stack(0, ())
NO_FEED = DenseWeights(NO_STACK, NO_STACK)
NO_WEIGHTS = LayerWeights(NONE, NO_STACK, NONE, NONE, NONE, NO_STACK, NONE, NONE, NONE, NO_FEED, NONE)


def spec_of(heads: int, kv_heads: int, size: int, window: int | None, cap: float | None) -> ModelSpec:
    rope = Rope(1e4, 2, interleaved=False)
    attention = Attention(heads, kv_heads, size, size**-0.5, rope, sliding_window=window, soft_cap=cap)
    return ModelSpec("test", 1, 8, (Layer(attention, Dense(8)),), 1e-5, tied_output=True, context_length=1024)


def run(spec, qkv, chunks, make_step):
    """Attention of one row whose tokens come in chunks; rope of position 0 is the identity. Others left NaNs."""
    a = spec.layers[0].attention
    pages = np.random.default_rng(3).permutation(64)[: -(-len(qkv) // 32)].tolist()
    shape = (64, 1, a.kv_heads)
    left = [np.full((*shape, *inner), np.nan, np.float32) for inner in ((a.head_size, 32), (32, a.head_size))]
    cache = Cache(*left)
    parts, before = [], 0
    for chunk in chunks:
        step = make_step([([0] * chunk, before, pages)])
        ops = Ops(2, 1e-5)
        rows = ops.rows("qkv", chunk, qkv.shape[1])
        rows.values[:chunk] = qkv[before : before + chunk]
        ones, zeros = np.ones((chunk, 1), np.float32), np.zeros((chunk, 1), np.float32)
        shape = StepShape(step.slots.astype(np.int64), query_blocks(spec, step), step.page_tables, ones, zeros)
        ops.rotate(rows, 0, a, NO_WEIGHTS, cache, shape)
        out = ops.attend(rows, 0, a, cache, shape)
        prepared = rows_of(out.values[:chunk], integer=ops.integer)
        np.testing.assert_array_equal(out.groups[:chunk], prepared.groups[:chunk])
        parts.append(out.values[:chunk].copy())
        before += chunk
    return np.vstack(parts)


def naive(spec, qkv):
    a = spec.layers[0].attention
    n, h, kv, d = len(qkv), a.heads, a.kv_heads, a.head_size
    x = qkv.astype(np.float64).reshape(n, h + 2 * kv, d)
    q, k, v = x[:, :h], np.repeat(x[:, h : h + kv], h // kv, 1), np.repeat(x[:, h + kv :], h // kv, 1)
    scores = np.einsum("thd,jhd->htj", q, k) * a.scale
    if a.soft_cap:
        scores = a.soft_cap * np.tanh(scores / a.soft_cap)
    t, j = np.arange(n)[:, None], np.arange(n)[None]
    hidden = (j > t) | (j <= t - (a.sliding_window or n))
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("htj,jhd->thd", weights, v).reshape(n, h * d)


def numbers(spec, length):
    a = spec.layers[0].attention
    columns = (a.heads + 2 * a.kv_heads) * a.head_size
    return (2 * np.random.default_rng(length).standard_normal((length, columns))).astype(np.float32)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100, 257])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (4, 4, 16), (8, 1, 80), (2, 2, 128)])
def test_close_to_naive_attention(length, heads, kv_heads, size, make_step) -> None:
    spec = spec_of(heads, kv_heads, size, None, None)
    qkv = numbers(spec, length)
    np.testing.assert_allclose(run(spec, qkv, [length], make_step), naive(spec, qkv), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [1, 5, 32, 40, 1000])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_sliding_window_and_soft_cap(window, cap, make_step) -> None:
    spec = spec_of(6, 2, 32, window, cap)
    qkv = numbers(spec, 150)
    np.testing.assert_allclose(run(spec, qkv, [150], make_step), naive(spec, qkv), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("chunks", [[1] * 100, [33, 1, 66], [32, 32, 36], [99, 1], [7, 50, 43]])
def test_chunks_do_not_change_a_bit(window, chunks, make_step) -> None:
    spec = spec_of(9, 3, 64, window, None)
    qkv = numbers(spec, 100)
    np.testing.assert_array_equal(run(spec, qkv, chunks, make_step), run(spec, qkv, [100], make_step))


def test_extreme_scores_neither_overflow_nor_vanish(make_step) -> None:
    spec = spec_of(2, 1, 16, None, None)
    qkv = numbers(spec, 70) * 100
    out = run(spec, qkv, [70], make_step)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, naive(spec, qkv), rtol=1e-3, atol=1e-2)
