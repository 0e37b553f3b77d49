"""The whole MLX runner against the CPU oracle: every family, in float32, steps with prompts, mixed ones and decoding.

On Linux it runs on mlx[cpu]: the same graph as on a Mac but for attention, cache writes and norms, which are MLX's own
operations there. The other tests put the Metal kernels in their place, executed by the shim.
"""

from dataclasses import replace

import numpy as np
import pytest

from backends.cpu.runner import CpuBackend
from backends.mlx.metal_cache import MetalCache
from backends.mlx.runner import MlxBackend
from engine.model.spec import Layer, ModelSpec
from tests.mlx.backends import loaded, logits_of_cpu, logits_of_mlx, metal_kernel
from tests.support.random_models import SMALL_MODELS, RandomSource, small_model
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


def with_heads_of_64(spec: ModelSpec) -> ModelSpec:
    """The same model with heads for which there are kernels."""

    def wide(layer: Layer) -> Layer:
        a = layer.attention
        rope = replace(a.rope, rotary_size=64 * a.rope.rotary_size // a.head_size)
        return replace(layer, attention=replace(a, heads=4, kv_heads=2, head_size=64, scale=0.125, rope=rope))

    return replace(spec, layers=tuple(wide(layer) for layer in spec.layers))


@pytest.mark.parametrize("case", SMALL_MODELS)
def test_a_family_says_what_the_oracle_says(case) -> None:
    with loaded(*small_model(case)) as (cpu, mlx):
        run(cpu, mlx, TOLERANCE)


@pytest.mark.parametrize("case", SMALL_MODELS)
def test_a_family_on_the_metal_kernels_says_what_the_oracle_says(case) -> None:
    spec, tensors = small_model(case)
    spec = with_heads_of_64(spec)
    with loaded(spec, RandomSource(spec, tensors.types), make_kernel=metal_kernel()) as (cpu, mlx):
        assert isinstance(mlx.session.cache, MetalCache)
        run(cpu, mlx, TOLERANCE)


def test_a_cache_of_eight_bits_is_close() -> None:
    """E4M3 keeps three bits behind the point: an error of 1/16 at most in each key and value."""
    spec, tensors = small_model("qwen3")
    spec = with_heads_of_64(spec)
    options = {"make_kernel": metal_kernel(), "fp8_kvcache": True}
    with loaded(spec, RandomSource(spec, tensors.types), **options) as (cpu, mlx):
        assert mlx.session.page_bytes == 2 * 2 * 64 * 2 * 32
        run(cpu, mlx, 6e-2)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("qwen2_moe", "f16"), *((c, d) for c in ("qwen3", "glm4", "k-quants", "old quants") for d in ("bf16", "f16"))],
)
def test_sixteen_bits_as_on_a_mac_are_close(case, dtype) -> None:
    """Activations, cache and kernels of 16 bits: errors of 2^-8 and 2^-11 at every rounding. (With bf16 a mixture of random
    weights takes another expert where two are nearly equal.)"""
    spec, tensors = small_model(case)
    with loaded(spec, tensors, make_kernel=metal_kernel(), dtype=dtype) as (cpu, mlx):
        run(cpu, mlx, {"bf16": 2e-2, "f16": 6e-3}[dtype])
