"""Tokens drawn on the device: those of the CPU backend from the same logits, for every combination of settings."""

import numpy as np
import pytest
from numba import njit

from backends.cpu.kernels import arithmetic
from backends.cuda.device import Kernel
from backends.cuda.sampling import drawn_tokens
from engine.errors import StepFailed
from engine.step import Bias, History
from tests.cuda.devices import make_device
from tests.cuda.sampling_reference import on_device, ready
from tests.support.sampling_steps import make_step, normal, on_cpu, random_step

FILES = ("sampling.cu", "resolve.cu")
EXTREMES = ["equal", "huge", "tiny", "zeros", "one", "two", "steps", "range", "-range"]


@pytest.fixture(scope="module")
def device():
    return ready(FILES)


def same(device, logits, step, previous=(), **options):
    previous = np.array(previous, np.int32)
    drawn = on_device(device, logits, step, previous, **options)
    np.testing.assert_array_equal(drawn.tokens, on_cpu(logits, step, previous).tokens)
    return drawn.tokens


def extreme(kind, vocabulary, rng):
    """Logits at the edges of what sampling may see."""
    row = np.zeros(vocabulary, np.float32)
    match kind:
        case "equal":
            row[:] = -7.25
        case "huge":
            row[:] = rng.choice([-1e30, 1e30, 1e-30], vocabulary)
        case "tiny":
            row[:] = rng.choice([1e-40, -1e-40, 1e-45, 0.0, -0.0], vocabulary)
        case "zeros":
            row[:] = np.where(rng.random(vocabulary) < 0.5, 0.0, -0.0)
        case "one":
            row[rng.integers(vocabulary)] = 3e38
        case "two":
            row[rng.choice(vocabulary, 2, replace=False)] = 200
        case "steps":
            row[:] = rng.integers(-20, 20, vocabulary)
        case "range":
            row[:] = np.linspace(-100, 0, vocabulary)
        case "-range":
            row[:] = np.linspace(60, -60, vocabulary)
    return row


# ---- arithmetic ------------------------------------------------------------------------------------------------------------

EXPONENTIALS = """#include "sampling.cuh"
__global__ void exponentials(const float* x, float* y, int count) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) y[i] = exponential(x[i]);
}
"""


@njit
def cpu_exponentials(x, y):
    for i in range(x.shape[0]):
        y[i] = arithmetic.exponential(x[i])


def exponentials_agree(count):
    kernel = Kernel("exponentials.cu", "exponentials")
    device = make_device(texts={"exponentials.cu": EXPONENTIALS})
    device.prepare([kernel])
    negative = np.linspace(0x80000000, 0xC2B00000, count, dtype=np.uint64).astype(np.uint32).view(np.float32)   # -0 to -88
    x = np.concatenate([negative, np.linspace(-90, 90, count, dtype=np.float32), np.float32([0, -87, 88, -1e30, 1e30])])
    there, expected = device.put(np.zeros_like(x)), np.empty_like(x)
    device.stream().launch(kernel, (64, 1, 1), 256, 0, device.put(x), there, np.int32(len(x)))
    cpu_exponentials(x, expected)
    np.testing.assert_array_equal(device.get(there).view(np.uint32), expected.view(np.uint32))


def test_the_exponential_has_the_bits_of_the_cpus():
    exponentials_agree(1_000_000)


@pytest.mark.full
def test_the_exponential_has_the_bits_of_the_cpus_at_many_values():
    exponentials_agree(30_000_000)


# ---- all settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2, 7])
@pytest.mark.parametrize(("vocabulary", "places"), [(1, 5), (31, 20), (100, 60), (513, 40), (1000, 60), (1025, 40)])
def test_tokens_are_those_of_the_cpu_for_random_settings(vocabulary, places, seed):
    rng = np.random.default_rng(vocabulary + seed)
    logits = normal(rng, places, vocabulary)
    previous = rng.integers(0, vocabulary, 9) if vocabulary > 300 else ()
    step = random_step(rng, places, vocabulary, previous=len(previous), forks=seed == 2)
    same(ready(FILES, seed=seed), logits, step, previous, head_rows=23)


@pytest.mark.parametrize(("vocabulary", "places"), [(49_152, 8), (151_936, 4), (262_144, 2)])
def test_tokens_are_those_of_the_cpu_for_large_vocabularies(device, vocabulary, places):
    rng = np.random.default_rng(vocabulary)
    same(device, normal(rng, places, vocabulary), random_step(rng, places, vocabulary))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(60))
def test_tokens_are_those_of_the_cpu_for_many_random_settings(device, seed):
    rng = np.random.default_rng(1000 + seed)
    vocabulary, places = int(rng.choice([77, 500, 3001, 20_000, 151_936])), 20
    logits = normal(rng, places, vocabulary, rng.choice([0.1, 1, 3, 10]))
    if seed % 3 == 0:
        logits = np.round(logits * 4) / 4          # many ties
    previous = rng.integers(0, vocabulary, 9)
    same(device, logits, random_step(rng, places, vocabulary, previous=9, forks=seed % 2 == 0), previous, head_rows=7)


@pytest.mark.parametrize("kind", EXTREMES)
def test_tokens_are_those_of_the_cpu_for_extreme_logits(device, kind):
    rng = np.random.default_rng(3)
    vocabulary, places = 777, 48
    logits = np.stack([extreme(kind, vocabulary, rng) for _ in range(places)])
    step = make_step(
        places, temperature=np.resize([0, 1, 0.01, 100], places), top_k=np.repeat([0, 1, 10, 400], 12),
        top_p=np.tile(np.repeat([1, 0.5, 0.999, 1 - 2**-24], 3), 4), min_p=np.resize([0, 0.3, 1, 0, 0], places),
        seed=rng.integers(0, 2**32, (places, 2), dtype=np.uint32),
    )  # fmt: skip
    same(device, logits, step)


@pytest.mark.parametrize("top_p", [0.1, 0.29, 0.31, 0.5, 0.9, 1 - 2**-24, 1e-30])
def test_ties_at_the_border_of_top_p_keep_the_lowest_ids(device, top_p):
    rng = np.random.default_rng(4)
    logits = np.full((60, 3001), -40, np.float32)
    logits[:, [5, 300, 1000, 1001, 1002, 2000, 2001, 2002, 2900, 3000]] = 1
    keys = rng.integers(0, 2**32, (60, 2), dtype=np.uint32)
    step = make_step(60, temperature=np.ones(60), top_p=np.full(60, top_p), seed=keys)
    same(device, logits, step)


@pytest.mark.parametrize("path", ["exact = false &&", "exact = border.reached ||"])
def test_both_ways_to_cut_by_mass_give_the_same_set(path):
    """The fast one proves that it may be taken; here the slow one is always taken, and the fast one wherever it reaches."""
    edits = {"sampling.cu": lambda text: text.replace("exact = border.reached &&", path)}
    forced = ready(("sampling.cu",), edits=edits)
    rng = np.random.default_rng(8)
    logits = normal(rng, 40, 2000)
    step = make_step(
        40, temperature=np.resize([0.3, 1, 2], 40), top_p=np.resize([0.3, 0.9, 0.95, 0.99], 40),
        top_k=np.resize([0, 0, 50], 40), seed=rng.integers(0, 2**32, (40, 2), dtype=np.uint32),
    )  # fmt: skip
    same(forced, logits, step)
    same(forced, np.sort(logits, axis=1), border_step(40, top_p=np.resize([0.3, 0.9, 0.999], 40)))


U_IS_0 = 14_883_995      # the position whose draw with seed 0 and choice 0 is 0: it takes the lowest id that is kept


def border_step(places, **fields):
    """Where logits ascend with the ids, the tokens of such a step are the borders of what is kept."""
    return make_step(places, temperature=np.ones(places), draw_position=np.full(places, U_IS_0), **fields)


@pytest.mark.parametrize("seed", range(3))
def test_the_border_of_a_set_is_the_cpus_to_the_last_id(device, seed):
    rng = np.random.default_rng(seed)
    logits = np.sort(normal(rng, 60, 1500), axis=1)
    if seed == 1:
        logits = np.round(logits * 8) / 8
    top_p = rng.choice([0.1, 0.5, 0.9, 0.99, 0.9999, 1 - 2**-20, 1], 60)
    tokens = same(device, logits, border_step(60, top_p=top_p, top_k=rng.choice([0, 0, 5, 300], 60)))
    assert len(set(tokens.tolist())) > 10


def border_where_sums_round(device):
    """Masses so much smaller than the largest that the CPU's doubles round, and top_p so near to 1 that they decide."""
    rng = np.random.default_rng(6)
    logits = np.sort(rng.uniform(-26, -22, (100, 1500)).astype(np.float32), axis=1)
    logits[:, -1] = 0
    return same(device, logits, border_step(100, top_p=np.full(100, 1 - 2**-24)))


def test_rounding_of_the_cpus_sums_is_followed_where_it_matters(device):
    tokens = border_where_sums_round(device)
    assert tokens.min() > 0
    assert tokens.max() < 1499


def test_that_case_is_one_for_the_slow_way_to_cut():
    edits = {"sampling.cu": lambda text: text.replace("    slots[0] = prefix;\n", "    slots[0] = prefix + 9;\n")}
    with pytest.raises(AssertionError, match="not equal"):
        border_where_sums_round(ready(("sampling.cu",), edits=edits))


# ---- greedy ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 31, 1023, 1024, 1025, 3001])
def test_greedy_takes_the_largest_wherever_it_stands_and_ties_go_to_the_lowest_id(device, vocabulary):
    rng = np.random.default_rng(vocabulary)
    at = sorted({0, 1, 31, 32, 1023, 1024, vocabulary // 2, vocabulary - 1} & set(range(vocabulary)))
    logits = -np.abs(normal(rng, len(at), vocabulary)) - 1
    logits[np.arange(len(at)), at] = -0.5
    assert same(device, logits, make_step(len(at))).tolist() == at
    logits[:, -1] = -0.5
    assert same(device, logits, make_step(len(at))).tolist() == at


def test_zero_and_minus_zero_are_a_tie(device):
    logits = np.full((2, 2100), -1, np.float32)
    logits[0, [70, 2000]] = [-0.0, 0.0]
    logits[1, [70, 2000]] = [0.0, -0.0]
    assert same(device, logits, make_step(2)).tolist() == [70, 70]


# ---- what is wrong ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("broken", [np.nan, -np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_draw_nothing_there_and_change_nothing_elsewhere(device, broken, temperature, bias):
    logits = normal(np.random.default_rng(0), 3, 1500)
    logits[1, 1499] = broken
    biases = Bias(np.int32([0, 1, 2, 3]), np.int32([3, 3, 3]), np.float32([1, 1, 1])) if bias else None
    step = make_step(3, temperature=np.full(3, temperature), top_p=np.full(3, 0.5), bias=biases)
    whole = on_device(device, normal(np.random.default_rng(0), 3, 1500), step)
    drawn = on_device(device, logits, step, check=False)
    assert drawn.status.tolist() == [0, 1, 0]
    assert drawn_tokens(drawn.tokens, drawn.status).tolist() == [whole.tokens[0], -1, whole.tokens[2]]
    assert drawn.tokens[1] == 0                    # a token that exists, for the step that may be queued already


def test_a_grammar_that_allows_nothing_draws_nothing(device):
    step = make_step(2, mask_at=np.int32([1]), grammar_masks=np.zeros((1, 32), np.uint32))
    logits = normal(np.random.default_rng(0), 2, 1000)
    drawn = on_device(device, logits, step, check=False)
    assert drawn_tokens(drawn.tokens, drawn.status).tolist() == [logits[0].argmax(), -1]


# ---- company ---------------------------------------------------------------------------------------------------------------


def test_a_draw_does_not_depend_on_company_blocks_or_chunks(device):
    rng = np.random.default_rng(9)
    logits = normal(rng, 30, 600)
    step = random_step(rng, 30, 600, forks=True)
    expected = same(device, logits, step)
    for options in ({"most_places": 1}, {"most_places": 3, "head_rows": 5}, {"head_rows": 1}):
        np.testing.assert_array_equal(on_device(device, logits, step, **options).tokens, expected)


def test_one_token_may_be_drawn_from_at_many_places(device):
    rng = np.random.default_rng(10)
    logits = normal(rng, 40, 300)
    step = make_step(
        150, sample_at=rng.integers(0, 40, 150), temperature=np.ones(150), choice=np.arange(150),
        draw_position=np.full(150, 7),
    )  # fmt: skip
    same(device, logits, step, head_rows=16)


# ---- broken kernels --------------------------------------------------------------------------------------------------------


def without(file_text, before, after="    __syncthreads();\n"):
    """The text without the first barrier behind `before`."""
    at = file_text.index(after, file_text.index(before))
    return file_text[:at] + file_text[at + len(after) :]


MUTATIONS = {
    "the total without a barrier": ("sampling.cu", "room.spans[n] = total;"),
    "masses without a barrier": ("sampling.cu", "row.mass[i] = mass;"),
    "a cut without a barrier": ("sampling.cu", "row.mass[i] = 0.0f;"),
    "penalties without a barrier": ("sampling.cu", "*at = value;"),
    "bins without a barrier": ("sampling.cuh", "bins[j] = 0;"),
    "a histogram without a barrier": ("sampling.cuh", "add_to(&bins"),
    "a maximum without a barrier": ("sampling.cuh", "if (lane == 0) slots[warp] = value;"),
    "a rank without a barrier": ("sampling.cuh", "slots[warp] = sum;"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_removed_barrier_is_found_out(name):
    file, before = MUTATIONS[name]
    barrier = "        __syncthreads();\n" if name.startswith(("bins", "a histogram", "a cut")) else "    __syncthreads();\n"
    edits = {file: lambda text: without(text, before, barrier)}
    rng = np.random.default_rng(11)
    logits = np.round(normal(rng, 40, 1200) * 2) / 2
    step = random_step(rng, 40, 1200)
    if name.startswith("penalties"):               # a bias on each token that is penalised, by another thread
        starts, tokens = np.arange(41, dtype=np.int32) * 90, np.tile(np.arange(90, dtype=np.int32), 40)
        ones = np.ones(len(tokens), np.int32)
        step = make_step(
            40, repetition=np.full(40, 1.7), history=History(starts, tokens, ones, ones > 0),
            bias=Bias(starts, tokens[::-1].copy(), np.full(len(tokens), 9, np.float32)),
        )  # fmt: skip
    found = 0
    for seed in (0, 1, 2, 3):
        try:
            same(ready(("sampling.cu", "resolve.cu"), seed=seed, edits=edits), logits, step)
        except (AssertionError, StepFailed):
            found += 1
    assert found > 0
