"""Every feature of a spec in tiny models, against transformers (golden/make_tiny_models.py), in float32 and as stored."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from backends.cpu.runner import CpuBackend
from engine.backend import LoadOptions
from engine.model.spec import Attention, Dense, Layer, Llama3Scaling, ModelSpec, Rope, YarnScaling
from engine.weights.tensors import STORAGE, RawTensor

MAKER = Path(__file__).parents[1] / "golden" / "make_tiny_models.py"
found = importlib.util.spec_from_file_location("make_tiny_models", MAKER)
assert found is not None
assert found.loader is not None
maker = importlib.util.module_from_spec(found)
found.loader.exec_module(maker)
GOLDEN = json.loads(MAKER.with_name("tiny_models.json").read_text())

HIDDEN, WIDTH, VOCABULARY, HEAD = 48, 72, 64, 16


def attention(rope: Rope, **features: object) -> Attention:
    return Attention(heads=4, kv_heads=2, head_size=HEAD, scale=HEAD**-0.5, rope=rope, **features)


LAYERS = {
    "llama": Layer(attention(Rope(1e4, HEAD, False, Llama3Scaling(8.0, 1.0, 4.0, 16))), Dense(WIDTH)),
    "qwen2": Layer(attention(Rope(1e6, HEAD, False), qkv_bias=True), Dense(WIDTH)),
    "qwen3": Layer(attention(Rope(1e4, HEAD, False, YarnScaling(4.0, 32)), qk_norm=True), Dense(WIDTH)),
    "mistral": Layer(attention(Rope(1e4, HEAD, False), sliding_window=9), Dense(WIDTH)),
    "glm4": Layer(attention(Rope(1e4, HEAD // 2, True), qkv_bias=True), Dense(WIDTH), post_norms=True),
}
NAMES = {
    "attention_norm": "input_layernorm.weight", "feed_norm": "post_attention_layernorm.weight",
    "query": "self_attn.q_proj.weight", "key": "self_attn.k_proj.weight", "value": "self_attn.v_proj.weight",
    "query_bias": "self_attn.q_proj.bias", "key_bias": "self_attn.k_proj.bias", "value_bias": "self_attn.v_proj.bias",
    "query_norm": "self_attn.q_norm.weight", "key_norm": "self_attn.k_norm.weight",
    "attention_output": "self_attn.o_proj.weight", "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight", "attention_post_norm": "post_self_attn_layernorm.weight",
    "feed_post_norm": "post_mlp_layernorm.weight",
}  # fmt: skip
TOP = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "output": "lm_head.weight"}


class Formula:
    """A TensorSource whose weights are the maker's formula."""

    def __init__(self, spec: ModelSpec) -> None:
        self.shapes = spec.shapes()

    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> RawTensor:
        shape = self.shapes[name]
        values = self.values(name, shape)
        return RawTensor(name, shape, STORAGE["F32"], np.ascontiguousarray(values).view(np.uint8).reshape(-1), "formula")

    def values(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name in TOP:
            return maker.weight(TOP[name], shape)
        _, number, part = name.split(".")
        at = f"model.layers.{number}."
        if part in ("gate", "up") and "layers.0.feed_post_norm" in self.shapes:        # glm4 stores the two as one
            both = maker.weight(at + "mlp.gate_up_proj.weight", (2 * WIDTH, HIDDEN))
            return both[:WIDTH] if part == "gate" else both[WIDTH:]
        return maker.weight(at + NAMES[part], shape)

    def release(self, name: str) -> None:
        pass


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_logprobs_are_those_of_transformers(family: str, dtype: str, make_step) -> None:
    spec = ModelSpec(family, VOCABULARY, HIDDEN, (LAYERS[family],) * 2, 1e-5, tied_output=False, context_length=128)
    backend = CpuBackend()
    backend.load(spec, Formula(spec), LoadOptions(dtype=dtype), lambda what, done, of: None)
    backend.allocate_cache(1 << 20)
    at = [0, 13, 47]
    step = make_step([(maker.TOKENS, 0, [2, 1])], at, top_count=np.full(3, VOCABULARY, np.int32))
    out = backend.wait(backend.submit(step))
    backend.close()
    logprobs = np.empty((3, VOCABULARY))
    np.put_along_axis(logprobs, out.top_ids.astype(np.int64), out.top_logprobs, 1)
    np.testing.assert_allclose(logprobs, GOLDEN[family], atol=1e-4 if dtype == "f32" else 0.1)
