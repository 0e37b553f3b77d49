"""Mixture of experts on the CPU: against a float64 loop over tokens, and bit equality in any company."""

import numpy as np
import pytest

from backends.cpu import mixture
from backends.cpu.kernels.vectors import has_byte_products
from backends.cpu.ops import Ops, Rows
from backends.cpu.weights import Loader, MixtureWeights
from engine.model.spec import Attention, Layer, Mixture, ModelSpec, Rope
from engine.weights.tensors import STORAGE, RawTensor
from tests.support.cpu_rows import rows_of

HIDDEN, WIDTH, SHARED, EXPERTS, TOKENS = 48, 32, 64, 8, 37


class Random:
    """A TensorSource of float32 normals that depend on the name only."""

    def __init__(self, spec: ModelSpec) -> None:
        self.shapes = spec.shapes()
        self.values = {}
        for number, (name, shape) in enumerate(self.shapes.items()):
            draw = np.random.default_rng(number)
            self.values[name] = draw.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)

    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> RawTensor:
        return RawTensor(name, self.shapes[name], STORAGE["F32"], self.values[name].view(np.uint8).reshape(-1), "memory")

    def release(self, name: str) -> None:
        pass


def made(spec: Mixture) -> tuple[Random, MixtureWeights]:
    attention = Attention(heads=1, kv_heads=1, head_size=4, scale=1.0, rope=Rope(1e4, 4, interleaved=False))
    model = ModelSpec("test", 4, HIDDEN, (Layer(attention, spec),), 1e-5, tied_output=True, context_length=8)
    source = Random(model)
    weights = Loader(model, source, "f32", lambda what, done, of: None).feed("layers.0.", spec)
    assert isinstance(weights, MixtureWeights)
    return source, weights


def rows(values: np.ndarray) -> Rows:
    return rows_of(values, integer=has_byte_products())


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def reference(x: np.ndarray, spec: Mixture, weights: dict[str, np.ndarray]) -> np.ndarray:
    """One token after another, as the papers write it, in float64."""
    w = {name.removeprefix("layers.0."): values.astype(np.float64) for name, values in weights.items()}

    def expert(token: np.ndarray, at: str) -> np.ndarray:
        return w[at + "down"] @ (silu(w[at + "gate"] @ token) * (w[at + "up"] @ token))

    out = np.zeros_like(x, np.float64)
    for t, token in enumerate(x.astype(np.float64)):
        logits = w["router"] @ token
        share = np.exp(logits - logits.max())
        share /= share.sum()
        chosen = np.argsort(-share, kind="stable")[: spec.experts_per_token]
        if spec.normalize_top_k:
            share = share / share[chosen].sum()
        out[t] = sum(share[e] * expert(token, f"experts.{e}.") for e in chosen)
        if spec.shared_width is not None:
            out[t] += expert(token, "shared_") / (1 + np.exp(-(w["shared_router"] @ token)))
    return out


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shared", [None, SHARED])
@pytest.mark.parametrize("per_token", [1, 3, EXPERTS])
def test_the_sum_over_experts_is_that_of_a_loop_over_tokens(normalize: bool, shared: int | None, per_token: int) -> None:
    spec = Mixture(EXPERTS, per_token, WIDTH, normalize, shared)
    source, weights = made(spec)
    x = np.random.default_rng(7).standard_normal((TOKENS, HIDDEN), dtype=np.float32)
    ours = mixture.feed(Ops(2, 1e-5), rows(x), spec, weights).values[:TOKENS]
    np.testing.assert_allclose(ours, reference(x, spec, source.values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, TOKENS])
def test_company_does_not_change_a_bit(count: int) -> None:
    spec = Mixture(EXPERTS, 3, WIDTH, True, SHARED)
    _, weights = made(spec)
    x = np.random.default_rng(7).standard_normal((TOKENS, HIDDEN), dtype=np.float32)
    ops = Ops(2, 1e-5)
    alone = np.array([mixture.feed(ops, rows(x[t : t + 1]), spec, weights).values[0].copy() for t in range(TOKENS)])
    for start in range(0, TOKENS - count + 1, count):
        together = mixture.feed(ops, rows(x[start : start + count]), spec, weights).values[:count]
        np.testing.assert_array_equal(together, alone[start : start + count])


def test_equal_logits_choose_the_lowest_experts() -> None:
    spec = Mixture(EXPERTS, 3, WIDTH, normalize_top_k=True)
    experts, shares = mixture.choose_experts(rows(np.zeros((2, EXPERTS), np.float32)), spec)
    assert experts.tolist() == [[0, 1, 2], [0, 1, 2]]
    np.testing.assert_allclose(shares, 1 / 3)
