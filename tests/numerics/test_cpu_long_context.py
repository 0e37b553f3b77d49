"""The longest contexts: positions to 262,143, tables of 8,192 pages, slots whose byte offset passes 2^32 and whose
element number passes 2^31, in a pool of which only the touched pages take memory."""

import sys

import numpy as np
import pytest

from backends.cpu.model import make_cache, step_shape
from backends.cpu.ops import Ops
from backends.cpu.rope import Rotation
from backends.cpu.weights import DenseWeights, LayerWeights, Stack
from engine.model.spec import Attention, Dense, Layer, ModelSpec, Rope, YarnScaling

NONE = np.zeros(0, np.float32)
NO_STACK = Stack(0, ())
NO_FEED = DenseWeights(NO_STACK, NO_STACK)
NO_WEIGHTS = LayerWeights(NONE, NO_STACK, NONE, NONE, NONE, NO_STACK, NONE, NONE, NONE, NO_FEED, NONE)

CONTEXT, PAGE = 262_144, 32
HEADS, SIZE = 2, 64
POOL = (1 << 20) + CONTEXT // PAGE + 8              # pages of 8 KiB keys and 8 KiB values: 8.6 GB each, never touched
ROPE = Rope(1e6, SIZE, interleaved=False, scaling=YarnScaling(8.0, 32_768))

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows commits memory when it is asked for")


def spec(window: int | None) -> ModelSpec:
    attention = Attention(HEADS, 1, SIZE, SIZE**-0.5, ROPE, sliding_window=window)
    return ModelSpec("test", 1, 8, (Layer(attention, Dense(8)),), 1e-5, tied_output=True, context_length=CONTEXT)


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    """x (heads, size) in float64, rotated by the formula of rotate-half with cosines and sines of one position."""
    rotation = Rotation.of(ROPE)
    angles = position * rotation.frequencies
    cosine, sine = np.cos(angles) * rotation.factor, np.sin(angles) * rotation.factor
    low, high = x[:, : SIZE // 2], x[:, SIZE // 2 :]
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine], 1)


@pytest.fixture(scope="module")
def pool():
    """The pool, the pages of one row (the last ones, shuffled), and what they hold but for the last four tokens."""
    cache = make_cache(spec(None), POOL)
    draw = np.random.default_rng(5)
    pages = draw.permutation(np.arange(POOL - CONTEXT // PAGE, POOL)).astype(np.int32)
    keys = draw.standard_normal((CONTEXT, SIZE), dtype=np.float32)
    values = draw.standard_normal((CONTEXT, SIZE), dtype=np.float32)
    cache.keys[pages, 0, 0] = keys.reshape(-1, PAGE, SIZE).transpose(0, 2, 1)
    cache.values[pages, 0, 0] = values.reshape(-1, PAGE, SIZE)
    assert int(pages.min()) * cache.keys[0].nbytes > 2**32
    assert int(pages.min()) * cache.keys[0].size >= 2**31
    return cache, pages, keys, values


@pytest.mark.parametrize("window", [None, 4096])
def test_the_last_tokens_of_the_longest_context(window: int | None, pool, make_step) -> None:
    cache, pages, keys, values = pool
    model, new = spec(window), 4
    first = CONTEXT - new
    qkv = np.random.default_rng(6).standard_normal((new, (HEADS + 2) * SIZE), dtype=np.float32)
    step = make_step([([0] * new, first, pages.tolist())])
    assert step.positions.max() == CONTEXT - 1
    assert step.page_tables.shape == (1, CONTEXT // PAGE)
    ops, shape = Ops(2, 1e-5), step_shape(model, step, Rotation.of(ROPE))
    rows = ops.rows("qkv", new, qkv.shape[1])
    rows.values[:new] = qkv
    ops.rotate(rows, 0, model.layers[0].attention, NO_WEIGHTS, cache, shape)
    ours = ops.attend(rows, 0, model.layers[0].attention, cache, shape).values[:new]

    parts = qkv.astype(np.float64).reshape(new, HEADS + 2, SIZE)
    all_keys, all_values = keys.astype(np.float64), values.astype(np.float64)
    for t in range(new):
        all_keys[first + t] = rotated(parts[t, HEADS : HEADS + 1], first + t)[0]
        all_values[first + t] = parts[t, HEADS + 1]
    for t in range(new):
        position = first + t
        low = 0 if window is None else position + 1 - window
        scores = rotated(parts[t, :HEADS], position) @ all_keys[low : position + 1].T * SIZE**-0.5
        weights = np.exp(scores - scores.max(1, keepdims=True))
        expected = weights / weights.sum(1, keepdims=True) @ all_values[low : position + 1]
        np.testing.assert_allclose(ours[t].reshape(HEADS, SIZE), expected, rtol=1e-3, atol=2e-5)
