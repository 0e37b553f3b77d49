"""The MLX sampler alone: given the same logits it draws what the CPU backend draws. What is special about each part of it.

All settings, and what is a fault and what a border case, are in test_sampler_settings.py.
"""

import io

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

import mlx.core as mx

from backends.mlx import sampler
from backends.mlx.choosing import largest
from backends.mlx.philox import philox
from backends.mlx.sampler import draw, resolve
from engine.step import Bias, History
from tests.mlx.sampling import on_mlx, same
from tests.mlx.sampling_referee import uniform
from tests.support.sampling_steps import make_step, normal, on_cpu, random_step


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


def entries(*rows):
    """History of places, each a list of (token or reference, count, in prompt)."""
    flat = [entry for row in rows for entry in row]
    starts = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32)
    tokens, counts, in_prompt = zip(*flat, strict=True)
    return History(starts, np.array(tokens, np.int32), np.array(counts, np.int32), np.array(in_prompt))


def test_penalties_meet_a_token_that_was_drawn_in_the_step_before():
    """A reference and the same token by its number are one entry of the history."""
    logits = np.zeros((1, 50), np.float32)
    logits[0, [7, 9]] = 3, 2.5
    step = make_step(1, frequency=[0.3], history=entries([(7, 1, False), (-1, 1, False)]))
    assert same(logits, step, [7])[0].tolist() == [9]            # 3 - 2 x 0.3
    assert same(logits, step, [20])[0].tolist() == [7]


def test_each_penalty_is_by_its_formula():
    """Repetition for prompt and output, and by the logit's sign; frequency by count; presence once; each place its own."""
    logits = np.tile(np.float32([10, 9.5, -1, 8, -1.2]), (5, 1))
    logits[4, [0, 1, 3]] = -9
    history = entries(
        [(0, 2, False), (1, 1, True)],         # 10 / 1.25 - 2 x 0.5 - 0.25 = 6.75; 9.5 / 1.25 - 0.5 - 0.25 = 6.85: token 3
        [(0, 0, True), (3, 1, False)],         # 10 / 1.25 = 8: token 1, 9.5
        [],
        [(0, 0, False), (1, 3, False)],        # neither in prompt nor output: nothing
        [(2, 0, True)],                        # -1 x 1.25 is below -1.2
    )
    step = make_step(
        5, repetition=np.full(5, 1.25), frequency=np.full(5, 0.5), presence=np.full(5, 0.25), history=history,
    )  # fmt: skip
    assert same(logits, step)[0].tolist() == [3, 1, 0, 0, 4]
    often = entries(
        [(0, 2, False), (1, 1, True)],         # 10 - 2 x 0.7 = 8.6; 9.5 - 0.7 = 8.8
        [(0, 3, False), (1, 0, True)],         # 10 - 0.3 = 9.7, once for all three
        [(0, 3, True), (1, 0, False)],         # 10 / 2
    )
    alone = make_step(3, frequency=[0.7, 0, 0], presence=[0, 0.3, 0], repetition=[1, 1, 2], history=often)
    assert same(logits[:3], alone)[0].tolist() == [1, 0, 1]


def test_bias_may_name_a_token_twice_and_forbid_or_force():
    logits = np.zeros((4, 50), np.float32)
    logits[:, 9] = 0.75
    tokens, values = np.int32([4, 4, 9, 9, 30]), np.float32([0.5, 0.5, -100, -np.inf, 100])
    step = make_step(4, bias=Bias(np.int32([0, 2, 3, 4, 5]), tokens, values), temperature=[0, 0, 0, 1])
    assert on_mlx(logits, step).tokens.tolist() == [4, 0, 0, 30]
    warm = make_step(300, temperature=np.ones(300), bias=Bias(
        np.arange(301, dtype=np.int32), np.full(300, 9, np.int32), np.full(300, -np.inf, np.float32)
    ))  # fmt: skip
    drawn = on_mlx(np.tile(logits[:1], (300, 1)), warm).tokens
    assert 9 not in drawn
    assert len(set(drawn.tolist())) > 40


def test_bias_comes_before_the_grammar_and_the_grammar_rules():
    logits = normal(np.random.default_rng(7), 2, 3001)
    bias = Bias(np.int32([0, 1, 2]), np.int32([500, 500]), np.float32([100, 100]))
    mask, allowed = np.zeros((1, 94), np.uint32), np.array([0, 31, 32, 3000])
    np.bitwise_or.at(mask[0], allowed // 32, np.uint32(1) << (allowed % 32).astype(np.uint32))
    tokens, _ = same(logits, make_step(2, bias=bias, mask_at=np.int32([1]), grammar_masks=mask))
    assert tokens.tolist() == [500, allowed[logits[1, allowed].argmax()]]
    hot = make_step(
        300, sample_at=np.ones(300, np.int32), temperature=np.full(300, 5), mask_at=np.arange(300, dtype=np.int32)[::-1],
        grammar_masks=np.repeat(mask, 300, 0), seed=np.stack([np.arange(300)] * 2, 1),
    )  # fmt: skip
    assert set(same(logits, hot)[0].tolist()) == set(allowed.tolist())


def same_scores(logits, step):
    """Logprobs and alternatives: the ids exactly, the numbers as far as float32 goes."""
    ours, theirs = on_mlx(logits, step), on_cpu(logits, step)
    alike = ours.tokens == theirs.tokens
    assert (~alike).sum() <= 1
    np.testing.assert_array_equal(ours.top_ids[alike], theirs.top_ids[alike])
    np.testing.assert_allclose(ours.top_logprobs[alike], theirs.top_logprobs[alike], rtol=2e-6, atol=5e-6)
    np.testing.assert_allclose(ours.logprobs[alike], theirs.logprobs[alike], rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("vocabulary", [1, 5, 300, 4097, 50_000, pytest.param(151_936, marks=pytest.mark.full)])
def test_logprobs_are_of_the_raw_model_and_alternatives_are_in_order(vocabulary):
    rng = np.random.default_rng(vocabulary)
    for digits in (1, 9):
        logits = np.round(normal(rng, 24, vocabulary), digits)        # with one digit many are equal
        same_scores(logits, random_step(rng, 24, vocabulary, scored=True, forks=digits == 9))


def test_logprobs_are_those_of_float64():
    logits = normal(np.random.default_rng(8), 4, 5000)
    logits[3] -= 1000
    step = make_step(4, score=[-1, 4999, -1, 7], top_count=[0, 3, -1, 3], temperature=np.full(4, 2), top_k=np.ones(4))
    exact = logits - logits.max(1, keepdims=True).astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    best = np.argsort(-logits, axis=1, kind="stable")[:, :3]
    out = on_mlx(logits, step)
    np.testing.assert_allclose(out.logprobs, [exact[0].max(), exact[1, 4999], np.nan, exact[3, 7]], rtol=1e-5)
    assert out.top_ids.tolist() == [[-1] * 3, best[1].tolist(), [-1] * 3, best[3].tolist()]
    np.testing.assert_allclose(out.top_logprobs[[1, 3]], [exact[1, best[1]], exact[3, best[3]]], rtol=1e-5, atol=1e-4)
    assert np.isneginf(out.top_logprobs[[0, 2]]).all()


def test_more_alternatives_than_the_vocabulary_has_are_all_of_it():
    logits = np.float32([[1, 3, 1, 3, 2], [0, 0, 0, 0, 0]])
    out = on_mlx(logits, make_step(2, top_count=[9, 2]))
    assert out.top_ids.tolist() == [[1, 3, 4, 0, 2, -1, -1, -1, -1], [0, 1, *[-1] * 7]]
    assert np.isneginf(out.top_logprobs).tolist() == (out.top_ids < 0).tolist()
    same_scores(logits, make_step(2, top_count=[9, 2]))


def test_more_places_than_logits_exist_at_a_time():
    rng = np.random.default_rng(5)
    count = 2 * sampler.HEAD_ROWS + 3
    for forks in (False, True):
        logits, step = normal(rng, count, 64), random_step(rng, count, 64, scored=True, forks=forks)
        same(logits, step, borders=1)
        same_scores(logits, step)


def test_choices_at_one_token_draw_each_for_themselves():
    """n = 300 of one prompt: its logits are made once for as many places as there may be, the choice decides."""
    logits = normal(np.random.default_rng(6), 3, 900, 1)
    step = make_step(
        300, sample_at=np.full(300, 2), temperature=np.ones(300), draw_position=np.full(300, 11), choice=np.arange(300),
        seed=np.tile(np.uint32([5, 6]), (300, 1)),
    )  # fmt: skip
    tokens, _ = same(logits, step, borders=1)
    cumulated = np.cumsum(np.exp(logits[2].astype(np.float64)))
    by_hand = [np.searchsorted(cumulated, uniform((5, 6), 11, choice) * cumulated[-1], side="right") for choice in range(300)]
    assert tokens.tolist() == by_hand
    assert len(set(by_hand)) > 100


def test_draws_have_the_distribution_of_the_model():
    """Chi-square of 20,000 draws over 16 tokens, fixed seed: 15 degrees of freedom, 37.7 is p = 0.001."""
    logits = np.linspace(-1.5, 1.5, 16, dtype=np.float32)[None]
    step = make_step(20_000, sample_at=np.zeros(20_000, np.int32), temperature=np.ones(20_000))
    counts = np.bincount(on_mlx(logits, step).tokens, minlength=16)
    expected = 20_000 * np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert ((counts - expected) ** 2 / expected).sum() < 37.7


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


EVERYTHING = {"previous": 4, "scored": True, "forks": True}


def graph_of(places, vocabulary, **options):
    """Names of the operations in the graph of one step's draws."""
    rng = np.random.default_rng(3)
    fields = random_step(rng, places, vocabulary, **EVERYTHING)
    step = make_step(places, **{name: getattr(fields, name) for name in ("history", "bias", "seed")}, **options)
    raw, newest = mx.array(normal(rng, places, vocabulary)), mx.zeros(4, mx.int32)
    text = io.StringIO()
    mx.export_to_dot(text, draw(step, newest, lambda at: raw).tokens)
    return [line.split('"')[1] for line in text.getvalue().splitlines() if "shape=rectangle" in line]


def test_drawing_waits_for_nothing():
    """Lookahead: a step is queued while the one before it still runs, so nothing of it may be asked of the device.

    While mx.compile traces a function, MLX refuses to evaluate anything in it.
    """
    rng = np.random.default_rng(3)
    step = random_step(rng, sampler.HEAD_ROWS, 300, **EVERYTHING)

    def queued(raw, newest):
        return draw(step, newest, lambda at: raw[mx.array(at)]).arrays

    raw, newest = mx.array(normal(rng, sampler.HEAD_ROWS, 300)), mx.full(4, 3, mx.int32)
    assert len(mx.compile(queued)(raw, newest)) == 4
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda raw, newest: [each + each.sum().item() for each in queued(raw, newest)])(raw, newest)


def test_the_graph_does_not_grow_with_the_places():
    for options in ({}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition": 1.1}):
        sizes = [
            len(graph_of(places, 300, **{name: np.full(places, value) for name, value in options.items()}))
            for places in (5, 90)
        ]
        assert sizes[0] == sizes[1] > 5


@pytest.mark.parametrize(
    ("top_k", "widest"), [(20, (20, 2048)), (64, (64, 2048)), (1250, (1250, 10_000)), (1251, (10_000, 2048))]
)
def test_a_small_top_k_sorts_no_vocabulary(monkeypatch, top_k, widest):
    """The widest that is sorted, and the widest of which the largest are taken: up to 64 of them by parts, as on Metal that
    is a sort as well."""
    widths = {"sort": [], "partition": [], "topk": []}
    for name, seen in widths.items():
        whole = getattr(mx, name)

        def noted(x, *rest, function=whole, seen=seen, **options):
            seen.append(x.shape[-1])
            return function(x, *rest, **options)

        monkeypatch.setattr(mx, name, noted)
    graph_of(4, 10_000, temperature=np.ones(4), top_k=np.full(4, top_k), top_p=np.full(4, 0.9), top_count=np.full(4, 5))
    assert (max(widths["sort"] + widths["partition"]), max(widths["topk"])) == widest
