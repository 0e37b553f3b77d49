"""All layers in one call: the same bits as the loop over layers, for every kind of model that takes that way."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from backends.cpu.fused import Fused
from backends.cpu.kernels.vectors import has_byte_products
from backends.cpu.model import Model, make_cache
from backends.cpu.weights import load_weights
from engine.model.spec import Attention, Dense, Layer, ModelSpec, Rope
from engine.weights.tensors import STORAGE, RawTensor

pytestmark = pytest.mark.skipif(not has_byte_products(), reason="no AVX-512 with VNNI here")

HIDDEN, WIDTH, VOCABULARY, HEAD = 64, 96, 64, 16


def attention(**features: object) -> Attention:
    return Attention(4, 2, HEAD, HEAD**-0.5, Rope(1e4, HEAD, interleaved=False), **features)


def layers(**features: object) -> list[Layer]:
    return [Layer(attention(**features), Dense(WIDTH))] * 2


KINDS: dict[str, tuple[list[Layer], dict[str, str]]] = {
    "llama": (layers(), {}),
    "biases": (layers(qkv_bias=True), {}),
    "head norms": (layers(qk_norm=True), {}),
    "a window in one layer": ([*layers(), *layers(sliding_window=5)], {}),
    "a soft cap": (layers(soft_cap=2.0), {}),
    "gelu": ([Layer(attention(), Dense(WIDTH, "gelu_tanh"))] * 2, {}),
    "query, key, value of unlike types": (layers(), {"query": "Q8_0", "key": "Q5_1", "value": "Q4_0"}),
    "gate and up of unlike types": (layers(), {"gate": "Q8_0", "down": "Q5_0"}),
}


class Random:
    """A TensorSource of normals, in Q4_1 where `types` does not say another one; norms and biases in float32."""

    def __init__(self, spec: ModelSpec, types: dict[str, str]) -> None:
        self.shapes, self.types = spec.shapes(), types

    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> RawTensor:
        shape = self.shapes[name]
        values = np.random.default_rng(sum(name.encode())).standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            return RawTensor(name, shape, STORAGE["F32"], (1 + values / 4).view(np.uint8), "memory")
        kind = STORAGE[self.types.get(name.split(".")[-1], "Q4_1")]
        data = quantize(values / np.float32(shape[1] ** 0.5), GGMLQuantizationType(kind.gguf_id)).view(np.uint8).reshape(-1)
        return RawTensor(name, shape, kind, data, "memory")

    def release(self, name: str) -> None:
        pass


def model_of(layers: list[Layer], types: dict[str, str]) -> Model:
    spec = ModelSpec("test", VOCABULARY, HIDDEN, tuple(layers), 1e-5, tied_output=True, context_length=128)
    return Model(spec, load_weights(spec, Random(spec, types), "auto", lambda what, done, of: None), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_gives_the_bits_of_the_loop(kind: str, make_step) -> None:
    model = model_of(*KINDS[kind])
    assert model.fused is not None
    caches = [make_cache(model.spec, 8), make_cache(model.spec, 8)]
    pages = ([3, 1], [2, 5], [6])
    steps = [
        make_step([([5, 9, 60, 2, 33, 7, 1, 12, 50], 0, pages[0])]),
        make_step([([8], 9, pages[0])]),
        make_step([([4], 10, pages[0]), (list(range(40)), 0, pages[1]), ([11, 12], 0, pages[2])]),
        make_step([([4], 11, pages[0]), ([8], 40, pages[1]), ([3], 2, pages[2])]),
    ]
    fused = model.fused
    for step in steps:
        found = []
        for cache, way in zip(caches, (fused, None), strict=True):
            model.fused = way
            found.append(model.forward(step.tokens, model.shapes(step), cache).values[: len(step.tokens)].copy())
        np.testing.assert_array_equal(found[0], found[1])
        assert np.abs(found[0]).max() > 0.1
    np.testing.assert_array_equal(caches[0].keys, caches[1].keys)
    np.testing.assert_array_equal(caches[0].values, caches[1].values)


@pytest.mark.parametrize(
    ("changed", "types"),
    [
        (Layer(attention(), Dense(WIDTH), post_norms=True), {}),
        (Layer(attention(output_bias=True), Dense(WIDTH)), {}),
        (Layer(attention(), Dense(2 * WIDTH)), {}),
        (Layer(attention(), Dense(WIDTH)), {"down": "F16"}),
    ],
    ids=["post norms", "a bias of the output", "layers of unlike width", "a dense matrix"],
)
def test_what_the_call_leaves_out_goes_through_the_loop(changed: Layer, types: dict[str, str]) -> None:
    model = model_of([*layers(), changed], types)
    assert model.fused is None
    assert Fused.of(model.spec, model.weights.layers, model.ops) is None
