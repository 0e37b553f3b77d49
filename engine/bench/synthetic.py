"""Models without weights: random blocks in the shape and the storage types of a real model, made when they are asked for.

They show speed, not sense. The mixes of types are those of llama.cpp's quantization of the same name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as TokenizerBackend
from tokenizers import models

from engine.errors import ConfigError
from engine.model.spec import Attention, Dense, FeedForward, Layer, Mixture, ModelSpec, Rope
from engine.text.tokenizer import Tokenizer
from engine.weights.checkpoint import Checkpoint
from engine.weights.tensors import STORAGE, RawTensor

__all__ = ["MODELS", "TYPES", "synthetic_checkpoint"]


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a model card."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: FeedForward
    theta: float = 1e6
    qk_norm: bool = False
    qkv_bias: bool = False
    tied: bool = False
    post_norms: bool = False
    rotary_size: int | None = None


MODELS: dict[str, Shape] = {
    "smollm2-135m": Shape(49152, 576, 30, 9, 3, 64, Dense(1536), 1e5, tied=True),
    "qwen2.5-0.5b": Shape(151936, 896, 24, 14, 2, 64, Dense(4864), qkv_bias=True, tied=True),
    "qwen3-0.6b": Shape(151936, 1024, 28, 16, 8, 128, Dense(3072), qk_norm=True, tied=True),
    "qwen3-4b": Shape(151936, 2560, 36, 32, 8, 128, Dense(9728), qk_norm=True, tied=True),
    "qwen3-8b": Shape(151936, 4096, 36, 32, 8, 128, Dense(12288), qk_norm=True),
    "llama-3.1-8b": Shape(128256, 4096, 32, 32, 8, 128, Dense(14336), 5e5),
    "glm-4-9b": Shape(151552, 4096, 40, 32, 2, 128, Dense(13696), 1e4, post_norms=True, rotary_size=64),
    "qwq-32b": Shape(152064, 5120, 64, 40, 8, 128, Dense(27648), qkv_bias=True),
    "qwen3-30b-a3b": Shape(151936, 2048, 48, 32, 4, 128, Mixture(128, 8, 768, normalize_top_k=True), qk_norm=True),
}
CONTEXT = 32_768

# (storage type of most matrices, of value and down where llama.cpp gives them more bits, of the output)
TYPES: dict[str, tuple[str, str, str]] = {
    "f32": ("F32", "F32", "F32"),
    "f16": ("F16", "F16", "F16"),
    "bf16": ("BF16", "BF16", "BF16"),
    "q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "q6_k": ("Q6_K", "Q6_K", "Q6_K"),
    "q5_k_m": ("Q5_K", "Q6_K", "Q6_K"),
    "q4_k_m": ("Q4_K", "Q6_K", "Q6_K"),
    "q3_k_m": ("Q3_K", "Q5_K", "Q6_K"),
    "q2_k": ("Q2_K", "Q3_K", "Q6_K"),
    "q4_0": ("Q4_0", "Q4_0", "Q6_K"),
    "q4_1": ("Q4_1", "Q4_1", "Q6_K"),
}
# Rows that are no multiple of 256 cannot have blocks of 256.
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# Where a block has its float16 scales, and how large one is so that weights are about 1 / sqrt(columns) for 1,024 columns.
SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 0.007),), "Q4_1": ((0, 0.007), (2, -0.05)), "Q5_0": ((0, 0.003),), "Q5_1": ((0, 0.003), (2, -0.05)),
    "Q8_0": ((0, 0.0004),), "Q2_K": ((80, 0.003), (82, 0.004)), "Q3_K": ((108, 0.0008),),
    "Q4_K": ((0, 0.00013), (2, 0.0009)), "Q5_K": ((0, 0.000065), (2, 0.0009)), "Q6_K": ((208, 0.00003),),
}  # fmt: skip
POOL_BLOCKS = 4096                       # different blocks of a type; they repeat


def synthetic_checkpoint(wanted: str) -> Checkpoint:
    """"name:type" -> a Checkpoint of random weights. ConfigError with the names there are."""
    name, colon, kind = wanted.lower().partition(":")
    if name not in MODELS or (colon and kind not in TYPES):
        raise ConfigError(f"--synthetic {wanted}: write NAME:TYPE with one of {', '.join(MODELS)} and {', '.join(TYPES)}")
    spec = _spec(name, MODELS[name])
    return Checkpoint(
        path=Path(f"synthetic-{name}-{kind or 'bf16'}"),
        name=f"synthetic-{name}-{kind or 'bf16'}",
        spec=spec,
        tensors=RandomTensors(spec, TYPES[kind or "bf16"]),
        tokenizer=tokenizer_of(spec.vocabulary_size),
        template=None,
        end_ids=frozenset(),
        sampling_defaults={},
    )


def _spec(name: str, shape: Shape) -> ModelSpec:
    interleaved = shape.rotary_size is not None
    rope = Rope(shape.theta, shape.rotary_size or shape.head_size, interleaved)
    attention = Attention(
        shape.heads, shape.kv_heads, shape.head_size, shape.head_size**-0.5, rope, shape.qkv_bias, qk_norm=shape.qk_norm
    )
    layer = Layer(attention, shape.feed_forward, shape.post_norms)
    return ModelSpec(name, shape.vocabulary, shape.hidden, (layer,) * shape.layers, 1e-6, shape.tied, CONTEXT)


def tokenizer_of(size: int) -> Tokenizer:
    """Token i writes the letter i mod 26: enough to stream something."""
    backend = TokenizerBackend(models.BPE({chr(97 + i): i for i in range(26)}, []))
    pieces = tuple(bytes([97 + i % 26]) for i in range(size))
    return Tokenizer(backend, pieces=pieces, special_ids=frozenset(), bos_id=None, eos_id=None, end_ids=frozenset())


class RandomTensors:
    """A CheckpointTensors that makes a tensor when it is asked for one, and keeps nothing but some blocks of each type."""

    def __init__(self, spec: ModelSpec, mix: tuple[str, str, str]) -> None:
        self._shapes = spec.shapes()
        self._mix = mix
        self._layers = len(spec.layers)
        self._pools: dict[str, NDArray[np.uint8]] = {}

    def names(self) -> Iterable[str]:
        return self._shapes.keys()

    def tensor(self, name: str) -> RawTensor:
        shape = self._shapes[name]
        kind = STORAGE[self._type(name, shape)]
        if len(shape) == 1:
            values = np.ones(shape, np.float32) if "norm" in name else np.zeros(shape, np.float32)
            return RawTensor(name, shape, kind, values.view(np.uint8), "synthetic")
        count = shape[0] * shape[1] // kind.block
        data = np.resize(self._pool(kind.name), (count, kind.bytes))
        return RawTensor(name, shape, kind, data.reshape(-1), "synthetic")

    def _type(self, name: str, shape: tuple[int, ...]) -> str:
        most, more, output = self._mix
        part = name.rpartition(".")[2]
        if len(shape) == 1 or part in ("router", "shared_router"):
            return "F32"
        chosen = most
        if name in ("embedding", "output"):
            chosen = output
        elif part in ("value", "down") and self._gets_more(int(name.split(".")[1])):
            chosen = more
        return FALLBACK.get(chosen, chosen) if shape[1] % STORAGE[chosen].block else chosen

    def _gets_more(self, layer: int) -> bool:
        """llama.cpp's rule: the first and last eighth of the layers, and every third one between."""
        eighth = self._layers // 8
        return layer < eighth or layer >= 7 * self._layers // 8 or (layer - eighth) % 3 == 2

    def _pool(self, kind: str) -> NDArray[np.uint8]:
        if kind not in self._pools:
            self._pools[kind] = _blocks(kind)
        return self._pools[kind]

    def release(self, name: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


def _blocks(kind: str) -> NDArray[np.uint8]:
    """Some random blocks, (POOL_BLOCKS, bytes)."""
    draw = np.random.default_rng(0)
    storage = STORAGE[kind]
    values = draw.standard_normal((POOL_BLOCKS, storage.block), dtype=np.float32) / np.float32(32)
    dense: Mapping[str, NDArray[np.generic]] = {
        "F32": values, "F16": values.astype(np.float16), "BF16": (values.view(np.uint32) >> 16).astype(np.uint16),
    }  # fmt: skip
    if kind in dense:
        return np.ascontiguousarray(dense[kind]).view(np.uint8)
    blocks = draw.integers(0, 256, (POOL_BLOCKS, storage.bytes), dtype=np.uint8)
    for at, scale in SCALES[kind]:
        blocks[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    return blocks
