"""Raw logprobs and alternatives on the device, against the CPU backend and against float64 in NumPy."""

import numpy as np
import pytest

from engine.errors import StepFailed
from tests.cuda.sampling_reference import on_device, ready
from tests.support.sampling_steps import make_step, normal, on_cpu, random_step


@pytest.fixture(scope="module")
def device():
    return ready()


def same(device, logits, step, previous=(), **options):
    previous = np.array(previous, np.int32)
    drawn, expected = on_device(device, logits, step, previous, **options), on_cpu(logits, step, previous)
    np.testing.assert_array_equal(drawn.top_ids, expected.top_ids)
    np.testing.assert_allclose(drawn.logprobs, expected.logprobs, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(drawn.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=1e-5)
    return drawn


@pytest.mark.parametrize("seed", [0, 1, 5])
@pytest.mark.parametrize(("vocabulary", "places"), [(1, 6), (100, 30), (1000, 40), (1300, 20)])
def test_scores_are_those_of_the_cpu_for_random_settings(vocabulary, places, seed):
    rng = np.random.default_rng(vocabulary + seed)
    step = random_step(rng, places, vocabulary, scored=True, forks=seed == 1)
    same(ready(seed=seed), normal(rng, places, vocabulary), step, head_rows=7)


def test_scores_are_those_of_the_cpu_for_a_large_vocabulary(device):
    rng = np.random.default_rng(2)
    same(device, normal(rng, 4, 151_936), make_step(4, top_count=[128, 20, 0, -1], score=[-1, 151_935, 0, -1]))


@pytest.mark.parametrize("values", [[3.0], [1.0, 1.25], [0.0, -0.0], [1e30, -1e30], [2e38]])
def test_ties_among_alternatives_go_to_the_lowest_ids(device, values):
    rng = np.random.default_rng(3)
    logits = rng.choice(np.float32(values), (8, 1100)).astype(np.float32)
    drawn = same(device, logits, make_step(8, top_count=[1, 2, 5, 20, 100, 127, 128, 0]))
    best = np.argsort(-logits[6], kind="stable")[:128]
    assert drawn.top_ids[6].tolist() == best.tolist()


def test_logprobs_are_those_of_float64_and_of_the_raw_model(device):
    rng = np.random.default_rng(4)
    logits = normal(rng, 3, 2500, 6)
    step = make_step(3, top_count=[-1, 5, 3], score=[-1, 123, -1], temperature=np.full(3, 2), top_k=np.ones(3))
    drawn = same(device, logits, step)
    exact = logits.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    assert np.isnan(drawn.logprobs[0])
    np.testing.assert_allclose(drawn.logprobs[1:], [exact[1, 123], exact[2, logits[2].argmax()]], atol=1e-5)
    assert drawn.top_ids[2, 3:].tolist() == [-1, -1]
    assert np.isneginf(drawn.top_logprobs[2, 3:]).all()
    np.testing.assert_allclose(drawn.top_logprobs[1], np.sort(exact[1])[::-1][:5], atol=1e-5)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_do_not_hang_the_device(device, broken):
    logits = normal(np.random.default_rng(5), 2, 1100)
    logits[0] = broken
    logits[1, 7] = broken
    drawn = on_device(device, logits, make_step(2, top_count=[20, 128]), check=False)
    assert drawn.status.tolist() == [1, 1]


def test_more_alternatives_than_there_is_room_for_are_refused(device):
    with pytest.raises(StepFailed, match="129 alternatives are asked for, the most is 128"):
        on_device(device, normal(np.random.default_rng(6), 1, 300), make_step(1, top_count=[129]))


MUTATIONS = {
    "parts of the sum": "parts[threadIdx.x / WARP] = sum;",
    "the alternatives": "= candidate(x[i], i);",
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_removed_barrier_is_found_out(name):
    def without(text):
        at = text.index("    __syncthreads();\n", text.index(MUTATIONS[name]))
        return text[:at] + text[at:].replace("    __syncthreads();\n", "", 1)

    rng = np.random.default_rng(7)
    logits = normal(rng, 6, 1500)
    found = 0
    for seed in (0, 1, 2):
        try:
            same(ready(seed=seed, edits={"scoring.cu": without}), logits, make_step(6, top_count=np.full(6, 128)))
        except (AssertionError, StepFailed):
            found += 1
    assert found > 0
