"""Qwen2, Qwen2.5 and Qwen3, dense and with experts. Rope pairs halves (NeoX) in every format.

Query, key and value have biases in Qwen2, norms per head in Qwen3. Qwen2's experts have a shared one beside them.
"""

from collections.abc import Mapping

from engine.model.families.bounds import MAX_LAYERS
from engine.model.families.config_decoder import config_decoder, layer_types_windows, mixtures, qwen_windows
from engine.model.families.config_json import ConfigJson
from engine.model.families.gguf_decoder import gguf_decoder, gguf_mixture
from engine.model.families.gguf_metadata import GgufMetadata
from engine.model.spec import ModelSpec
from engine.weights.tensors import RawTensor

__all__ = [
    "qwen2_from_config",
    "qwen2_from_gguf",
    "qwen2moe_from_config",
    "qwen2moe_from_gguf",
    "qwen3_from_config",
    "qwen3_from_gguf",
    "qwen3moe_from_config",
    "qwen3moe_from_gguf",
]

Tensors = Mapping[str, RawTensor]


def qwen2_from_gguf(metadata: GgufMetadata, tensors: Tensors) -> ModelSpec:
    """As all functions here: raises BadModelFile and UnsupportedModel."""
    return gguf_decoder(metadata, tensors, interleaved=False, qkv_bias=True)


def qwen3_from_gguf(metadata: GgufMetadata, tensors: Tensors) -> ModelSpec:
    return gguf_decoder(metadata, tensors, interleaved=False, qk_norm=True)


def qwen2moe_from_gguf(metadata: GgufMetadata, tensors: Tensors) -> ModelSpec:
    mixture = gguf_mixture(metadata, normalize_top_k=False, shared=True)
    return gguf_decoder(metadata, tensors, interleaved=False, feed_forward=mixture)


def qwen3moe_from_gguf(metadata: GgufMetadata, tensors: Tensors) -> ModelSpec:
    mixture = gguf_mixture(metadata, normalize_top_k=True, shared=False)
    return gguf_decoder(metadata, tensors, interleaved=False, qk_norm=True, feed_forward=mixture)


def qwen2_from_config(config: ConfigJson) -> ModelSpec:
    return config_decoder(config, "qwen2", qkv_bias=True, windows=qwen_windows(config))


def qwen3_from_config(config: ConfigJson) -> ModelSpec:
    bias = config.boolean("attention_bias", False)
    return config_decoder(
        config,
        "qwen3",
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        head_size_stated=True,
        windows=qwen_windows(config),
    )


def qwen2moe_from_config(config: ConfigJson) -> ModelSpec:
    return config_decoder(
        config,
        "qwen2moe",
        qkv_bias=config.boolean("qkv_bias", True),
        windows=_no_windows(config),
        feed_forwards=mixtures(config, shared=True),
    )


def qwen3moe_from_config(config: ConfigJson) -> ModelSpec:
    bias = config.boolean("attention_bias", False)
    return config_decoder(
        config,
        "qwen3moe",
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        windows=_no_windows(config),
        feed_forwards=mixtures(config, shared=False),
    )


def _no_windows(config: ConfigJson) -> list[int | None]:
    """No model with experts slides, and transformers 4 and 5 disagree on which of its layers would."""
    config.must_be("use_sliding_window", False)
    config.ignore("sliding_window", "max_window_layers")
    return layer_types_windows(config, None, [False] * config.integer("num_hidden_layers", 1, MAX_LAYERS))
