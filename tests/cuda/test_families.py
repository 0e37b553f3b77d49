"""The whole CUDA runner on the emulated device against the CPU oracle: every family, steps with prompts, graphs, both caches.

The oracle computes in float32, the CUDA backend in bfloat16. It is given the tokens that the oracle drew, so that one
rounding does not change everything that follows.
"""

import numpy as np
import pytest

from backends.cpu.runner import CpuBackend
from backends.cuda.runner import CudaBackend
from engine.backend import LoadOptions
from tests.cuda.devices import make_device
from tests.support.random_models import SMALL_MODELS, small_model
from tests.support.steps import build_step

TOLERANCE = 2e-2
PAGES = ([4, 2, 9], [1, 3])
PROMPTS = (list(range(3, 40)), [7, 50, 12, 9, 33])


def quiet(what: str, done: int, of: int) -> None:
    """Progress that nobody watches."""


def logits_of_cpu(backend: CpuBackend, step) -> np.ndarray:
    session = backend.session

    def run() -> np.ndarray:
        states = session.model.forward(step.tokens, session.model.shapes(step), session.cache)
        return session.model.logits(session.model.final_states(states, step.sample_at.astype(np.intp))).copy()

    return backend.compute.submit(run).result()


def logits_of_cuda(backend: CudaBackend, step) -> tuple[np.ndarray, np.ndarray]:
    """(S, V), and what was drawn greedily."""
    out = backend.wait(backend.submit(step))
    room = backend.session.ops.workspace["logits"]
    return backend.device.get(room.first(step.place_count)), out.tokens


@pytest.fixture
def both(request: pytest.FixtureRequest):
    case, options = request.param
    spec, tensors = small_model(case)
    cpu = CpuBackend()
    cpu.load(spec, tensors, LoadOptions(dtype="f32"), quiet)
    cpu.allocate_cache(4 << 20)
    cuda = CudaBackend(make_device(seed=3), max_batch_tokens=64, max_num_seqs=4)
    cuda.load(spec, tensors, LoadOptions(max_num_seqs=4, context_length=128, **options), quiet)
    cuda.allocate_cache(16 * cuda.session.layout.page_bytes)
    yield cpu, cuda
    cpu.close()
    cuda.close()


def check(ours: np.ndarray, drawn: np.ndarray, exact: np.ndarray, tolerance: float) -> None:
    """Logits within the tolerance, relative to the largest; and the same token where its lead is beyond doubt."""
    scale = np.abs(exact).max(1, keepdims=True)
    error = np.abs(ours - exact) / scale
    assert error.max() < tolerance, error.max()
    top = np.sort(exact, axis=1)
    sure = (top[:, -1] - top[:, -2]) / scale[:, 0] > 4 * tolerance
    np.testing.assert_array_equal(drawn[sure], exact.argmax(1)[sure])


def steps_of():
    """What runs: both prompts at once, then a chunk beside a decoding row, then decoding of both."""
    history = [[], []]

    def feed(*parts: tuple[int, list[int]]):
        rows = []
        for row, tokens in parts:
            rows.append((tokens, len(history[row]), PAGES[row]))
            history[row].extend(tokens)
        return build_step(rows)

    return feed


@pytest.mark.parametrize("both", [pytest.param((case, {}), id=case) for case in SMALL_MODELS], indirect=True)
def test_a_family_says_what_the_oracle_says(both) -> None:
    run(*both, TOLERANCE)


@pytest.mark.parametrize("both", [pytest.param(("qwen3", {"fp8_kvcache": True}), id="qwen3")], indirect=True)
def test_a_cache_of_eight_bits_is_close(both) -> None:
    """E4M3 keeps three bits behind the point: an error of 1/16 at most in each key and value."""
    run(*both, 6e-2)


def run(cpu: CpuBackend, cuda: CudaBackend, tolerance: float) -> None:
    feed = steps_of()
    newest = [0, 0]
    plans = [
        lambda: feed((0, PROMPTS[0][:30])),
        lambda: feed((0, [newest[0]]), (1, PROMPTS[1][:3])),
        lambda: feed((0, [newest[0]]), (1, PROMPTS[1][3:])),
        *[lambda: feed((0, [newest[0]]), (1, [newest[1]]))] * 4,
    ]
    replays = 0
    for plan in plans:
        step = plan()
        exact = logits_of_cpu(cpu, step)
        ours, drawn = logits_of_cuda(cuda, step)
        check(ours, drawn, exact, tolerance)
        for place, token in enumerate(exact.argmax(1).tolist()):
            newest[place] = token
        replays += step.token_count == step.row_count
    assert replays == 4
    assert set(cuda.session.graphs.graphs) == {2}
