"""Mistral, from config.json: a llama whose layers all slide if a window is stated. Its GGUF files call themselves llama."""

from engine.model.families.bounds import MAX_CONTEXT, MAX_LAYERS
from engine.model.families.config_decoder import config_decoder, layer_types_windows
from engine.model.families.config_json import ConfigJson
from engine.model.spec import ModelSpec

__all__ = ["mistral_from_config"]


def mistral_from_config(config: ConfigJson) -> ModelSpec:
    """Raises BadModelFile and UnsupportedModel."""
    window = config.optional_integer("sliding_window", 1, MAX_CONTEXT)
    slides = [window is not None] * config.integer("num_hidden_layers", 1, MAX_LAYERS)
    config.must_be("attention_bias", False)
    config.must_be("mlp_bias", False)
    return config_decoder(config, "mistral", windows=layer_types_windows(config, window, slides))
