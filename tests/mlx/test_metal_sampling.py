"""The kernel that cuts by top-k and top-p without a sort: against NumPy in float64, and in the sampler as the CPU draws."""

import logging
from functools import partial

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

import mlx.core as mx

from backends.mlx import sampler
from backends.mlx.metal_sampling import SamplingKernels
from backends.mlx.trial import sampling_works
from engine.errors import ConfigError
from tests.mlx.sampling import same
from tests.mlx.shim import ShimMetal
from tests.mlx.test_sampler_settings import ALONE, U_IS_0, V, every_combination, keys
from tests.support.sampling_steps import make_step, normal


def make_kernels(edits=None):
    if mx.metal.is_available() and not edits:
        return SamplingKernels()
    return SamplingKernels(ShimMetal((0,) if edits else (0, 1), edits).metal_kernel)


@pytest.fixture(scope="module")
def draw():
    return partial(sampler.draw, kernel=make_kernels().least_kept)


def cut(logits, temperature, top_k, top_p):
    """By a sort: the ids that are kept, and how near to a border the mass is, as a share of all of it."""
    order = np.argsort(-logits, kind="stable")
    order = order[: top_k or len(order)]
    mass = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
    passed = np.cumsum(mass) / mass.sum()
    kept = int((passed < top_p).sum()) + 1 if top_p < 1 else len(order)
    return set(order[:kept].tolist()), float(np.abs(passed - top_p).min()) if top_p < 1 else 1.0


def kept_by(kernels, logits, temperature, top_k, top_p):
    """The ids that the kernel's answer keeps, a set for each row."""
    x = mx.array(logits)
    count = np.where((top_k > 0) & (top_k < logits.shape[1]), top_k, logits.shape[1])
    cold = mx.array(1 / temperature.astype(np.float32))[:, None]
    least, ties = kernels.least_kept(x, x.max(axis=1, keepdims=True), cold, count, top_p.astype(np.float32))
    assert (least.shape, ties.shape) == ((len(x), 1), (len(x), 1))
    found = []
    for row, value, many in zip(logits, np.array(least)[:, 0], np.array(ties)[:, 0], strict=True):
        found.append(set(np.flatnonzero(row > value).tolist()) | set(np.flatnonzero(row == value)[:many].tolist()))
    return found


def check(kernels, vocabulary, rows=24, seed=0):
    rng = np.random.default_rng([seed, vocabulary])
    logits = normal(rng, rows, vocabulary)
    logits[1::3] = np.round(logits[1::3])                      # ties
    logits[2::3, rng.random(vocabulary) < 0.5] = -np.inf       # what a grammar forbids
    temperature = rng.choice([0.3, 1.0, 3.0], rows)
    top_k, top_p = rng.choice([0, 1, vocabulary // 2, vocabulary - 1], rows), rng.choice([0.05, 0.5, 0.9, 0.999, 1], rows)
    for row, found in enumerate(kept_by(kernels, logits, temperature, top_k, top_p)):
        right, border = cut(logits[row], temperature[row], int(top_k[row]), top_p[row])
        possible = np.isfinite(logits[row])
        right, found = ({id for id in each if possible[id]} for each in (right, found))
        where = row, top_k[row], top_p[row], len(found), len(right)
        assert found == right or (border < 1e-6 and len(found ^ right) == 1), where


@pytest.mark.parametrize("vocabulary", [8, 9, 31, 511, 512, 513, 1025, 5000])
def test_what_is_kept_is_what_a_sort_keeps(vocabulary):
    check(make_kernels(), vocabulary)


@pytest.mark.parametrize("row", [np.zeros(40), np.where(np.arange(40) % 2, 0.0, -0.0), np.full(40, -3e38), np.full(40, 3e38)])
def test_equal_logits_are_kept_by_their_number(row):
    logits = np.tile(row.astype(np.float32), (4, 1))
    top_k, top_p = np.array([0, 7, 0, 10]), np.array([0.5, 1, 0.01, 0.25])
    found = kept_by(make_kernels(), logits, np.ones(4), top_k, top_p)
    assert [sorted(each) for each in found] == [list(range(count)) for count in (20, 7, 1, 3)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_no_logits_ends_and_leaves_the_others(bad):
    logits = normal(np.random.default_rng(1), 3, 600)
    logits[1] = bad
    with np.errstate(invalid="ignore"):
        found = kept_by(make_kernels(), logits, np.ones(3), np.zeros(3, int), np.full(3, 0.9))
    for row in (0, 2):
        assert found[row] == cut(logits[row], 1.0, 0, 0.9)[0]


@pytest.mark.parametrize(("name", "value"), [case for case in ALONE if case[0] in ("top_k", "top_p")])
def test_a_setting_alone_draws_what_the_cpu_draws(draw, name, value):
    rng = np.random.default_rng(1)
    logits = normal(rng, 60, V)
    logits[::2] = np.round(logits[::2])
    step = make_step(60, temperature=np.ones(60), **{name: np.full(60, value)}, seed=keys(rng, 60))
    same(logits, step, borders=1, draw=draw)


@pytest.mark.parametrize(
    ("vocabulary", "seeds"), [(320, 6), (513, 4), (4097, 3), pytest.param(50_000, 4, marks=pytest.mark.full)]
)
def test_all_settings_together_draw_what_the_cpu_draws(draw, vocabulary, seeds):
    drawn, differing = every_combination(vocabulary, seeds, draw=draw)
    assert differing <= 1 + drawn // 1000, (differing, drawn)


@pytest.mark.parametrize("ties", [False, True])
def test_the_last_id_that_is_kept_is_the_cpus(draw, ties):
    """Where logits ascend with the ids and the uniform is 0, the token is the border of what is kept."""
    rng = np.random.default_rng(4)
    logits = np.sort(normal(rng, 60, 1500), axis=1)
    if ties:
        logits = np.round(logits * 8) / 8
    step = make_step(
        60, temperature=np.ones(60), draw_position=np.full(60, U_IS_0), top_k=rng.choice([0, 0, 5, 300], 60),
        top_p=rng.choice([0.1, 0.5, 0.9, 0.99, 0.9999, 1], 60),
    )  # fmt: skip
    same(logits, step, borders=2, draw=draw)


def test_with_the_kernel_no_vocabulary_is_sorted(draw, monkeypatch):
    widths = []
    for name in ("sort", "topk", "partition"):
        whole = getattr(mx, name)

        def noted(x, *rest, function=whole, **options):
            widths.append(x.shape[-1])
            return function(x, *rest, **options)

        monkeypatch.setattr(mx, name, noted)
    step = make_step(3, temperature=np.ones(3), top_k=[0, 65, 20], top_p=[0.9, 0.5, 1])
    mx.eval(draw(step, mx.zeros(0, mx.int32), lambda at: mx.array(normal(np.random.default_rng(2), 3, 1000)[at])).tokens)
    assert widths
    assert max(widths) <= 1000                                  # the third place's partial sort
    assert widths.count(1000) == 1


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
BROKEN = {
    "a barrier less behind the mass": (BARRIER + "\n        target", "target"),
    "ties are all kept": ("ceil((target - above) / unit)", "float(COUNT)"),
    "top-p takes no heed of top-k": ("rillet::key_of(numbers[at]) > lowest", "true"),
    "the least of top-k is left out of its mass": (" + held)", ")"),
    "-0 is less than 0": ("bits == 0x80000000u", "false"),
    "another row's settings": ("settings[row * 8 + 2]", "settings[2]"),
}


def check_all(kernels):
    for vocabulary in (40, 513, 1025):
        check(kernels, vocabulary)
    zeros = np.where(np.arange(40) % 2, 0.0, -0.0).astype(np.float32)[None]
    assert kept_by(kernels, zeros, np.ones(1), np.array([7]), np.ones(1)) == [set(range(7))]


@pytest.mark.skipif(mx.metal.is_available(), reason="a native kernel cannot be edited")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_copy_is_found(what):
    def edit(text):
        assert BROKEN[what][0] in text
        return text.replace(*BROKEN[what])

    kernels = make_kernels({"least_kept": edit})
    with pytest.raises(AssertionError):
        check_all(kernels)


@pytest.mark.skipif(mx.metal.is_available(), reason="a native kernel cannot be edited")
def test_a_device_that_computes_it_wrongly_sorts(caplog):
    wrong = make_kernels({"least_kept": lambda text: text.replace("number - highest", "number - 0.9f * highest")})
    with caplog.at_level(logging.WARNING):
        assert sampling_works(make_kernels(), 1000)
        assert not caplog.records
        assert not sampling_works(wrong, 1000)
    assert caplog.messages[0].startswith("sampling: MLX's own operations, which are slower, as the Metal kernel is wrong by")


@pytest.mark.parametrize("logits", [mx.zeros((2, 7)), mx.zeros((2, 64), mx.float16)])
def test_logits_that_the_kernel_is_not_for_are_refused(logits):
    one = mx.ones((2, 1))
    with pytest.raises(ConfigError, match="float32, V from 8 to"):
        SamplingKernels().least_kept(logits, one, one, np.array([3, 3]), np.ones(2, np.float32))
