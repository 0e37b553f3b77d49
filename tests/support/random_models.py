"""Small models of every family with random weights, large enough that rounding to bfloat16 averages out."""

from collections.abc import Mapping

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from engine.model.spec import Attention, Dense, FeedForward, Layer, Mixture, ModelSpec, Rope, YarnScaling
from engine.weights.tensors import STORAGE, RawTensor

__all__ = ["SMALL_MODELS", "RandomSource", "small_model"]

VOCABULARY, CONTEXT = 320, 512


def attention(hidden: int, head_size: int = 16, *, rope: Rope | None = None, **features: object) -> Attention:
    heads = hidden // head_size
    rope = rope or Rope(1e4, head_size, interleaved=False)
    return Attention(heads, max(1, heads // 2), head_size, head_size**-0.5, rope, **features)


def model(
    family: str, hidden: int, a: Attention, feed: FeedForward, *, tied: bool = False, post_norms: bool = False
) -> ModelSpec:
    return ModelSpec(family, VOCABULARY, hidden, (Layer(a, feed, post_norms),) * 2, 1e-5, tied, CONTEXT)


HALF, YARN = Rope(1e4, 16, interleaved=True), Rope(1e4, 16, False, YarnScaling(4.0, 16))
SMALL_MODELS: dict[str, tuple[ModelSpec, dict[str, str]]] = {
    "llama": (model("llama", 128, attention(128), Dense(192)), {}),
    "llama, output bias": (model("llama", 128, attention(128, output_bias=True), Dense(192)), {}),
    "mistral": (model("mistral", 128, attention(128, sliding_window=20), Dense(200)), {}),
    "qwen2": (model("qwen2", 128, attention(128, qkv_bias=True), Dense(192), tied=True), {}),
    "qwen3": (model("qwen3", 128, attention(128, 32, qk_norm=True), Dense(192), tied=True), {}),
    "glm4": (model("glm4", 128, attention(128, 32, rope=HALF, qkv_bias=True), Dense(192), post_norms=True), {}),
    "qwen2_moe": (model("qwen2_moe", 128, attention(128, qkv_bias=True), Mixture(8, 2, 64, False, 96)), {}),
    "qwen3_moe": (model("qwen3_moe", 128, attention(128, 32, qk_norm=True), Mixture(16, 4, 64, True)), {}),
    "yarn and a soft cap": (model("llama", 128, attention(128, rope=YARN, soft_cap=5.0), Dense(192, "gelu_tanh")), {}),
    "k-quants": (
        model("llama", 256, attention(256, 64), Dense(512)),
        {"": "Q4_K", "value": "Q6_K", "down": "Q6_K", "output": "Q6_K", "embedding": "Q6_K", "up": "Q5_K"},
    ),
    "old quants": (
        model("llama", 128, attention(128), Dense(160), tied=True),
        {"": "Q4_1", "key": "Q5_0", "value": "Q8_0", "down": "Q5_1", "attention_output": "Q4_0", "embedding": "Q8_0"},
    ),
    "quantized experts": (
        model("qwen3_moe", 128, attention(128, 32), Mixture(8, 2, 96, True)), {"": "Q4_0", "down": "Q8_0", "router": "F32"},
    ),
}  # fmt: skip
"""Name -> the spec, and storage types by the last part of a tensor's name ("": of the others; BF16 where nothing is said)."""


class RandomSource:
    """A TensorSource of normals whose rows have the length 1, whatever they are stored as; norms near 1, biases small."""

    def __init__(self, spec: ModelSpec, types: Mapping[str, str]) -> None:
        self.shapes, self.types = spec.shapes(), types

    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> RawTensor:
        shape, part = self.shapes[name], name.rpartition(".")[2]
        values = np.random.default_rng(list(name.encode())).standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            vector = (values / 4 if part.endswith("bias") else 1 + values / 8).astype(np.float32)
            return RawTensor(name, shape, STORAGE["F32"], vector.view(np.uint8), "memory")
        kind = STORAGE[self.types.get(part, self.types.get("", "BF16"))]
        scaled = values if part == "embedding" else values / np.float32(shape[1] ** 0.5)
        data = QUANTIZERS.get(kind.name, quantized)(scaled, kind.name)
        return RawTensor(name, shape, kind, np.ascontiguousarray(data).view(np.uint8).reshape(-1), "memory")

    def release(self, name: str) -> None:
        """Nothing is kept."""


def quantized(values: np.ndarray, kind: str) -> np.ndarray:
    return quantize(values, GGMLQuantizationType[kind])


def random_blocks(values: np.ndarray, kind: str) -> np.ndarray:
    """gguf does not quantize to K types: random blocks whose scales make weights of about the size of the values."""
    storage = STORAGE[kind]
    count = values.size // storage.block
    draw = np.random.default_rng(values.view(np.uint32)[0, :8].tolist())
    blocks = draw.integers(0, 256, (count, storage.bytes), dtype=np.uint8)
    for at, scale in K_SCALES[kind]:
        size = np.float16(scale * values.std() * 32)
        blocks[:, at : at + 2] = np.array([size], np.float16).view(np.uint8)
    return blocks


K_SCALES = {"Q4_K": ((0, 0.00013), (2, 0.0009)), "Q5_K": ((0, 0.000065), (2, 0.0009)), "Q6_K": ((208, 0.00003),)}
QUANTIZERS = dict.fromkeys(K_SCALES, random_blocks)


def small_model(name: str) -> tuple[ModelSpec, RandomSource]:
    spec, types = SMALL_MODELS[name]
    return spec, RandomSource(spec, types)
