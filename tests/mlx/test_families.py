"""The whole MLX runner against the CPU oracle: every family, in float32, steps with prompts, mixed ones and decoding.

On Linux it runs on mlx[cpu]: the same graph as on a Mac but for attention, the cache writes and the norms, which are MLX's own
operations there. A second test puts the Metal kernels in their place, executed by the shim.
"""

import mlx.core as mx
import numpy as np
import pytest

from backends.cpu.runner import CpuBackend
from backends.mlx.metal_cache import MetalCache
from backends.mlx.runner import MlxBackend
from engine.backend import LoadOptions
from tests.mlx.backends import logits_of_cpu, logits_of_mlx, loaded
from tests.support.random_models import SMALL_MODELS, small_model
from tests.support.steps import build_step

TOLERANCE = 1e-4
PAGES = ([4, 2, 9], [1, 3])
PROMPTS = (list(range(3, 40)), [7, 50, 12, 9, 33])


def check(ours: np.ndarray, drawn: np.ndarray, exact: np.ndarray, tolerance: float) -> None:
    """Logits within the tolerance, relative to the largest; and the same token where its lead is beyond doubt."""
    scale = np.abs(exact).max(1, keepdims=True)
    error = np.abs(ours - exact) / scale
    assert error.max() < tolerance, error.max()
    top = np.sort(exact, axis=1)
    sure = (top[:, -1] - top[:, -2]) / scale[:, 0] > 4 * tolerance
    np.testing.assert_array_equal(drawn[sure], exact.argmax(1)[sure])


def run(cpu: CpuBackend, mlx: MlxBackend, tolerance: float) -> None:
    """Chunks of one prompt, a chunk beside a decoding row, then both decode; mlx is given what the oracle drew."""
    history, newest = [[], []], [0, 0]

    def feed(*parts: tuple[int, list[int]]):
        rows = []
        for row, tokens in parts:
            rows.append((tokens, len(history[row]), PAGES[row]))
            history[row].extend(tokens)
        return build_step(rows)

    plans = [
        lambda: feed((0, PROMPTS[0][:30])),
        lambda: feed((0, [newest[0]]), (1, PROMPTS[1][:3])),
        lambda: feed((0, [newest[0]]), (1, PROMPTS[1][3:])),
        *[lambda: feed((0, [newest[0]]), (1, [newest[1]]))] * 4,
    ]
    for plan in plans:
        step = plan()
        exact = logits_of_cpu(cpu, step)
        ours, drawn = logits_of_mlx(mlx, step)
        check(ours, drawn, exact, tolerance)
        for place, token in enumerate(exact.argmax(1).tolist()):
            newest[place] = token


@pytest.mark.parametrize("case", SMALL_MODELS)
def test_a_family_says_what_the_oracle_says(case) -> None:
    with loaded(*small_model(case)) as (cpu, mlx):
        run(cpu, mlx, TOLERANCE)
