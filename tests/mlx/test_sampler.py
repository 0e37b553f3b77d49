"""The MLX sampler alone: given the same logits it draws what the CPU backend draws.

Its exponentials and sums are MLX's, in another order than the CPU's: a draw that falls on the border between two tokens, or
a cut of top-p that does, may come out as the other one: that is allowed for one place in 400, and for no greedy one.
"""

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

import mlx.core as mx

from backends.mlx import sampler
from backends.mlx.choosing import largest
from backends.mlx.philox import philox
from backends.mlx.sampler import draw, resolve
from engine.step import Bias, History
from tests.support.sampling_steps import make_step, normal, on_cpu, random_step

NOTHING = np.zeros(0, np.int32)


def on_mlx(logits, step, previous=NOTHING):
    made = []

    def rows(at):
        made.append(len(at))
        return mx.array(logits[at])

    drawn = draw(step, mx.array(np.array(previous, np.int32)), rows)
    assert max(made, default=0) <= sampler.HEAD_ROWS
    return drawn.output(np.zeros((0, 0), np.float32))


def same(logits, step, previous=NOTHING, *, off=0):
    """The CPU's draws, but for `off` of them."""
    ours, theirs = on_mlx(logits, step, previous).tokens, on_cpu(logits, step, np.array(previous, np.int32)).tokens
    different = np.flatnonzero(ours != theirs)
    assert len(different) <= off, (different, ours[different], theirs[different])
    return ours, len(different)


@pytest.mark.parametrize("vocabulary", [5, 320, 1000, 4097])
def test_every_combination_of_settings_draws_what_the_cpu_draws(vocabulary):
    differing, drawn = 0, 0
    for seed in range(20):
        rng = np.random.default_rng([seed, vocabulary])
        previous = rng.integers(0, vocabulary, 9).astype(np.int32)
        step = random_step(rng, 40, vocabulary, previous=9, forks=seed % 3 == 0)
        logits = normal(rng, 40, vocabulary)
        tokens, off = same(logits, step, previous, off=2)
        differing, drawn = differing + off, drawn + len(tokens)
    assert differing <= drawn // 400, differing


@pytest.mark.parametrize("vocabulary", [50_000, pytest.param(151_936, marks=pytest.mark.full)])
def test_large_vocabularies(vocabulary):
    rng = np.random.default_rng(vocabulary)
    same(normal(rng, 12, vocabulary), random_step(rng, 12, vocabulary), off=1)


def test_greedy_takes_the_lowest_id_of_equal_ones():
    logits = np.zeros((3, 1000), np.float32)
    logits[1, [700, 300, 999]] = 5
    logits[2] = -7
    tokens, _ = same(logits, make_step(3))
    assert tokens.tolist() == [0, 300, 0]


@pytest.mark.parametrize("kept", [1, 2, 7])
def test_top_k_keeps_the_lowest_ids_of_equal_ones(kept):
    logits = np.zeros((64, 900), np.float32)
    logits[:, 500:] = 1
    step = make_step(64, temperature=np.ones(64), top_k=np.full(64, kept), draw_position=np.arange(64))
    tokens, _ = same(logits, step)
    assert set(tokens.tolist()) <= set(range(500, 500 + kept))
    assert len(set(tokens.tolist())) == kept


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_gives_no_token_in_its_own_row_only(bad):
    rng = np.random.default_rng(1)
    logits = normal(rng, 4, 600)
    logits[2, 599] = bad
    step = make_step(4, temperature=[0, 1, 1, 1], top_k=[0, 5, 5, 5], top_count=[1, 1, 1, 1])
    tokens, _ = same(logits, step)
    assert (tokens == -1).tolist() == [False, False, True, False]
    out = on_mlx(logits, step)
    assert np.isnan(out.logprobs[2])
    assert np.isfinite(np.delete(out.logprobs, 2)).all()


def test_a_grammar_that_allows_nothing_gives_no_token():
    logits = normal(np.random.default_rng(2), 3, 70)
    masks = np.zeros((2, 3), np.uint32)
    masks[1] = 0x10
    step = make_step(3, temperature=[1, 0, 1], mask_at=np.array([2, 0], np.int32), grammar_masks=masks)
    tokens, _ = same(logits, step)
    assert tokens[2] == -1
    assert tokens[0] % 32 == 4


def test_penalties_meet_a_token_that_was_drawn_in_the_step_before():
    """A reference and the same token by its number are one entry of the history."""
    logits = np.zeros((1, 50), np.float32)
    logits[0, [7, 9]] = 3, 2.5
    history = History(
        np.array([0, 2], np.int32), np.array([7, -1], np.int32), np.array([1, 1], np.int32), np.array([False, False])
    )
    step = make_step(1, frequency=[0.3], history=history)
    assert same(logits, step, [7])[0].tolist() == [9]            # 3 - 2 x 0.3
    assert same(logits, step, [20])[0].tolist() == [7]


def test_bias_may_name_a_token_twice_and_forbid_or_force():
    logits = np.zeros((2, 50), np.float32)
    bias = Bias(np.array([0, 2, 3], np.int32), np.array([4, 4, 9], np.int32), np.array([0.5, 0.5, -100], np.float32))
    logits[:, 9] = 0.75
    tokens = on_mlx(logits, make_step(2, bias=bias)).tokens
    assert tokens.tolist() == [4, 0]


def test_logprobs_are_of_the_raw_model_and_alternatives_are_in_order():
    for seed in range(8):
        rng = np.random.default_rng(seed)
        vocabulary = int(rng.choice([5, 300, 9000]))
        logits = np.round(normal(rng, 24, vocabulary), 1)        # many are equal
        step = random_step(rng, 24, vocabulary, scored=True, forks=seed % 2 == 0)
        ours, theirs = on_mlx(logits, step), on_cpu(logits, step)
        alike = ours.tokens == theirs.tokens
        assert (~alike).sum() <= 1
        np.testing.assert_array_equal(ours.top_ids[alike], theirs.top_ids[alike])
        np.testing.assert_allclose(ours.top_logprobs[alike], theirs.top_logprobs[alike], rtol=5e-5, atol=5e-5)
        np.testing.assert_allclose(ours.logprobs[alike], theirs.logprobs[alike], rtol=5e-5, atol=5e-5)


def test_more_places_than_logits_exist_at_a_time():
    rng = np.random.default_rng(5)
    count = 2 * sampler.HEAD_ROWS + 3
    same(normal(rng, count, 64), random_step(rng, count, 64), off=1)


def test_a_step_without_places_draws_nothing():
    assert on_mlx(np.zeros((0, 9), np.float32), make_step(0)).tokens.shape == (0,)


def test_tokens_of_the_step_before_are_resolved_on_the_device():
    found = resolve(np.array([5, -1, -3, 7], np.int32), mx.array([40, 41, -1], mx.int32))
    assert np.array(found).tolist() == [5, 40, 0, 7]             # nothing was drawn at place 2


def test_random_words_are_philox_s():
    """Known answers of Philox4x32-10 from the authors' own Random123 (kat_vectors)."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, expected in (
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        words = philox(*(tuple(np.array([word], np.uint64) for word in words) for words in (counter, key)))
        assert tuple(int(word[0]) for word in words) == expected


@pytest.mark.parametrize("count", [5, 4096, 4097, 50_000])
@pytest.mark.parametrize("width", [1, 20, 64, 65])
def test_the_largest_are_found_by_parts(count, width):
    x = np.random.default_rng(count).integers(-1000, 1000, (3, count)).astype(np.float32)
    found = np.sort(np.array(largest(mx.array(x), width)), axis=1)
    np.testing.assert_array_equal(found, np.sort(x, axis=1)[:, -width:])


def test_drawing_waits_for_nothing():
    """Lookahead: a step is queued while the one before it still runs, so nothing of it may be asked of the device."""
    newest = mx.full(4, 3, mx.int32) + mx.zeros(4, mx.int32)
    rng = np.random.default_rng(3)
    step = random_step(rng, 4, 300, previous=4)
    raw = mx.array(normal(rng, 4, 300)) * 1
    evaluated = []
    kept = mx.eval
    mx.eval = lambda *arrays: evaluated.append(arrays)
    try:
        draw(step, newest, lambda at: raw)
    finally:
        mx.eval = kept
    assert evaluated == []
