"""Every setting of the MLX sampler, alone and together, against the CPU backend's draws and a referee in float64.

A token that is not the CPU's must be a border case by the referee, see sampling_referee.py, and few may be. What the referee
and these cases are worth is tested too: with a small fault in a copy of the sampler they must fail.
"""

import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

import mlx.core as mx
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.mlx import choosing, sampler
from backends.mlx.philox import uniforms
from tests.mlx.sampling import on_mlx, same
from tests.mlx.sampling_referee import Verdict, judge, uniform
from tests.support.sampling_steps import make_step, normal, on_cpu, random_step

V = 1000
ALONE = [
    *(("temperature", value) for value in (0, 1e-6, 0.01, 0.7, 100)),
    *(("top_k", value) for value in (1, 2, 40, V // 8, V // 8 + 1, V // 2, V - 1, V, V + 9)),
    *(("top_p", value) for value in (1e-6, 0.29, 0.31, 0.5, 0.9, 0.999, 1 - 2**-24)),
    *(("min_p", value) for value in (1e-4, 0.02, 0.5, 1)),
]


def keys(rng, places):
    return rng.integers(0, 2**32, (places, 2), dtype=np.uint32)


@pytest.mark.parametrize(("name", "value"), ALONE)
def test_a_setting_alone_draws_what_the_cpu_draws(name, value):
    rng = np.random.default_rng(1)
    logits = normal(rng, 60, V)
    logits[::2] = np.round(logits[::2])                    # many ties in every other row
    step = make_step(60, **({"temperature": np.ones(60)} | {name: np.full(60, value), "seed": keys(rng, 60)}))
    same(logits, step, borders=1)


def every_combination(vocabulary, seeds, places=40, draw=sampler.draw):
    """Draws of steps with every setting at random; how many there were, and how many were not the CPU's."""
    drawn, differing = 0, 0
    for seed in range(seeds):
        rng = np.random.default_rng([seed, vocabulary])
        previous = rng.integers(-1, vocabulary, 9).astype(np.int32)
        step = random_step(rng, places, vocabulary, previous=9, forks=seed % 3 == 0)
        logits = normal(rng, places, vocabulary, (3, 1, 10)[seed % 3])
        if seed % 2:
            logits = np.round(logits * 4) / 4
        tokens, off = same(logits, step, previous, borders=places, draw=draw)
        drawn, differing = drawn + len(tokens), differing + off
    return drawn, differing


@pytest.mark.parametrize(
    ("vocabulary", "seeds"),
    [(1, 2), (5, 20), (320, 20), (513, 8), (1000, 10), (4097, 6), (50_000, 1), *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in [(5, 300), (1000, 150), (4097, 50), (50_000, 8), (151_936, 4)]
    )],
)  # fmt: skip
def test_all_settings_together_draw_what_the_cpu_draws(vocabulary, seeds):
    drawn, differing = every_combination(vocabulary, seeds)
    assert differing <= 1 + drawn // 1000, (differing, drawn)


def test_the_largest_vocabulary_draws_what_the_cpu_draws():
    rng = np.random.default_rng(2)
    step = make_step(
        6, temperature=[0, 1, 1, 0.7, 50, 1], top_k=[0, 20, 0, 40, 0, 100_000], top_p=[1, 0.95, 1, 0.9, 1, 0.9],
        min_p=[0, 0, 0.02, 0, 0, 0], seed=keys(rng, 6),
    )  # fmt: skip
    same(normal(rng, 6, 151_936), step, borders=1)


@pytest.mark.parametrize("kind", ["equal", "zeros", "huge", "one", "two", "steps", "up", "down", "far"])
def test_extreme_logits_draw_what_the_cpu_draws(kind):
    rng = np.random.default_rng(3)
    row = {
        "equal": np.full(777, -7.25), "zeros": np.where(rng.random(777) < 0.5, 0.0, -0.0),
        "huge": rng.choice([-1e30, 1e30, 1e-30], 777), "one": np.where(np.arange(777) == 600, 3e38, 0),
        "two": np.where(np.isin(np.arange(777), [90, 700]), 200, 0), "steps": rng.integers(-20, 20, 777),
        "up": np.linspace(-100, 0, 777), "down": np.linspace(60, -60, 777), "far": np.linspace(0, 1e5, 777),
    }[kind].astype(np.float32)  # fmt: skip
    step = make_step(
        48, temperature=np.resize([0, 1, 0.01, 100], 48), top_k=np.repeat([0, 1, 10, 400], 12),
        top_p=np.tile(np.repeat([1, 0.5, 0.999, 1 - 2**-24], 3), 4), min_p=np.resize([0, 0.3, 1, 0, 0], 48),
        seed=keys(rng, 48),
    )  # fmt: skip
    same(np.tile(row, (48, 1)), step, borders=1)


U_IS_0 = 14_883_995       # the position whose draw with seed 0 and choice 0 is 0: it takes the lowest id that is kept


@pytest.mark.parametrize("ties", [False, True])
def test_the_last_id_that_is_kept_is_the_cpus(ties):
    """Where logits ascend with the ids and the uniform is 0, the token is the border of what is kept."""
    assert uniform((0, 0), U_IS_0, 0) == 0
    rng = np.random.default_rng(4)
    logits = np.sort(normal(rng, 120, 1500), axis=1)
    if ties:
        logits = np.round(logits * 8) / 8
    step = make_step(
        120, temperature=np.ones(120), draw_position=np.full(120, U_IS_0), top_k=rng.choice([0, 0, 5, 300], 120),
        top_p=rng.choice([0.1, 0.5, 0.9, 0.99, 0.9999, 1], 120), min_p=rng.choice([0, 0, 0.01], 120),
    )  # fmt: skip
    tokens, _ = same(logits, step, borders=2)
    assert len(set(tokens.tolist())) > 20


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_step_draws_right_tokens(data):
    """The referee alone decides: a step that is drawn wrong here is a fault, however rare."""
    vocabulary = data.draw(st.sampled_from([1, 2, 7, 33, 320, 511, 512, 513, 1025]))
    places = data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    logits = normal(rng, places, vocabulary, data.draw(st.sampled_from([0, 0.1, 3, 30])))
    if data.draw(st.booleans()):
        logits = np.round(logits)

    def each(values):
        return data.draw(st.lists(values, min_size=places, max_size=places))

    fields = random_step(rng, places, vocabulary, previous=3, forks=data.draw(st.booleans()))
    step = make_step(
        places, sample_at=fields.sample_at, history=fields.history, bias=fields.bias, mask_at=fields.mask_at,
        grammar_masks=fields.grammar_masks, seed=keys(rng, places),
        temperature=each(st.just(0.0) | st.floats(1e-6, 100)), top_k=each(st.integers(0, vocabulary + 1)),
        top_p=each(st.just(1.0) | st.floats(1e-6, 1)), min_p=each(st.just(0.0) | st.floats(0, 1)),
        repetition=each(st.floats(0.25, 2)), frequency=each(st.floats(-2, 2)), presence=each(st.floats(-2, 2)),
        draw_position=each(st.integers(0, 2**31 - 1)), choice=each(st.integers(0, 127)),
    )  # fmt: skip
    previous = rng.integers(-1, vocabulary, 3).astype(np.int32)
    tokens = on_mlx(logits, step, previous).tokens
    assert Verdict.WRONG not in judge(logits, step, tokens, previous), (tokens, on_cpu(logits, step, previous).tokens)


def test_uniforms_are_those_of_the_referee_for_seeds_positions_and_choices():
    rng = np.random.default_rng(5)
    seed, position = keys(rng, 200), rng.integers(0, 2**31, 200).astype(np.int32)
    choice = np.arange(200, dtype=np.int32) % 130
    seed[:3], position[:2], choice[:2] = [[0, 0], [2**32 - 1] * 2, [0, 1]], [0, 2**31 - 1], [0, 2**31 - 1]
    expected = [uniform(*each) for each in zip(seed, position, choice, strict=True)]
    assert uniforms(seed, position, choice).tolist() == expected
    assert len(set(expected)) == 200


def test_a_scan_that_rounds_otherwise_draws_no_token_without_mass(monkeypatch):
    """On Metal a cumulated sum is made in parallel: it may rise where nothing was added, and fall by rounding."""
    whole, rng = mx.cumsum, np.random.default_rng(6)

    def uneven(a, **options):
        sums = whole(a, **options)
        if a.dtype != mx.float32:
            return sums
        return sums * mx.array(1 + 1e-4 * rng.standard_normal(sums.shape).astype(np.float32))

    monkeypatch.setattr(mx, "cumsum", uneven)
    mass = np.zeros((2000, 3000), np.float32)
    at = np.sort(rng.permuted(np.tile(np.arange(3000), (2000, 1)), axis=1)[:, :3], axis=1)
    np.put_along_axis(mass, at, 1, axis=1)
    borders = (rng.integers(0, 4, (2000, 1)) + 1e-4 * rng.standard_normal((2000, 1))) / 3
    tokens = np.array(choosing.draw(mx.array(mass), mx.array(np.clip(borders, 0, 1 - 2**-24).astype(np.float32))))
    assert (np.take_along_axis(mass, tokens[:, None], axis=1) > 0).all()
    assert (tokens[:, None] == at).any(axis=0).all()


@pytest.mark.parametrize("vocabulary", [3000, pytest.param(151_936, marks=pytest.mark.full)])
def test_flat_logits_differ_at_borders_only(vocabulary):
    """Where all tokens are nearly equal, a border is never far."""
    rng = np.random.default_rng(9)
    step = make_step(100, temperature=np.full(100, 50), top_p=np.resize([1, 0.9], 100), seed=keys(rng, 100))
    same(normal(rng, 100, vocabulary), step, borders=5)


# ---- the referee -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("off", "verdict"), [(5e-7, Verdict.BORDER), (2e-6, Verdict.WRONG), (0.01, Verdict.WRONG)])
def test_only_next_to_a_border_may_a_draw_be_its_neighbour(off, verdict):
    u = uniform((0, 0), 7, 0)
    step = make_step(2, temperature=np.ones(2), draw_position=[7, 7])
    logits = np.log([[u - off, 1 - u + off, 1e-30], [u + off, 1 - u - off, 1e-30]])
    assert judge(logits.astype(np.float64), step, [1, 0]) == [Verdict.RIGHT] * 2
    assert judge(logits.astype(np.float64), step, [0, 1]) == [verdict] * 2
    assert judge(logits.astype(np.float64), step, [2, 2]) == [Verdict.WRONG] * 2


@pytest.mark.parametrize(("off", "verdict"), [(5e-7, Verdict.BORDER), (1e-5, Verdict.WRONG)])
def test_only_a_border_of_top_p_may_move(off, verdict):
    u = uniform((0, 0), U_IS_0, 0)
    step = make_step(1, temperature=[1], draw_position=[U_IS_0], top_p=[0.75])
    logits = np.log([[0.25 - off, 0.75 + off]])            # the best alone reaches 0.75
    assert u == 0
    assert judge(logits, step, [1]) == [Verdict.RIGHT]
    assert judge(logits, step, [0]) == [verdict]


# ---- faults ----------------------------------------------------------------------------------------------------------------

FAULTS = {
    "ties to the highest id": ("choosing", "<= ties)", "> equal.sum(axis=1, keepdims=True) - ties)"),
    "top-p keeps one too few": ("choosing", "mx.minimum(before + 1,", "mx.minimum(mx.maximum(before, 1),"),
    "top-p is of the whole mass, not of the top k": ("choosing", "mx.arange(width) < looked_at,", "looked_at > 0,"),
    "min-p leaves its border out": ("choosing", "mass >= mx.array(settings.min_p)", "mass > mx.array(settings.min_p)"),
    "the first span is forgotten": ("choosing", "before = mx.where(span > 0,", "before = mx.where(span > 1,"),
    "a draw one thousandth off": ("choosing", "target = uniform *", "target = 0.999 * uniform *"),
    "temperature after the cuts": ("choosing", "mx.exp((ordered - top) * cold)", "mx.exp(ordered - top)"),
    "presence once a token": ("sampler", "frequency * count + presence", "(frequency + presence) * count"),
    "repetition by the sign of nothing": ("sampler", "mx.where(x > 0, x / repetition, x * repetition)", "x / repetition"),
    "a bias in place of a logit": ("sampler", ".add(values)", ".multiply(0).at[mx.array(place)].add(0)"),
    "masks in the order given": ("sampler", "row_of[self.step.mask_at[masked]", "row_of[np.sort(self.step.mask_at[masked])"),
    "the newest token not resolved": ("sampler", "mx.maximum(newest[places], 0)", "mx.maximum(places, 0)"),
}


def with_fault(name):
    """`draw` of a copy of the two modules, one of them changed."""
    where, before, after = FAULTS[name]
    modules = {}
    for module in (choosing, sampler):
        short = module.__name__.rsplit(".", 1)[1]
        text = Path(module.__file__).read_text()
        if short == where:
            assert before in text
            text = text.replace(before, after)
        modules[short] = copy = types.ModuleType(module.__name__)
        exec(compile(text, module.__file__, "exec"), vars(copy))
    modules["sampler"].choose = modules["choosing"].choose
    return modules["sampler"].draw


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_sampler_is_found_out(name):
    with pytest.raises(AssertionError, match="the CPU's"):
        every_combination(600, 12, 60, with_fault(name))
