"""Llama 2 and 3, SmolLM and what else calls itself `llama`, from GGUF and from config.json; in GGUF Mistral too.

llama.cpp's converter permutes the rows of query and key of this family, so that its rope pairs neighbours: interleaved.
"""

from collections.abc import Mapping

from engine.errors import UnsupportedModel
from engine.model.families.bounds import MAX_EXPERTS
from engine.model.families.config_decoder import config_decoder
from engine.model.families.config_json import ConfigJson
from engine.model.families.gguf_decoder import gguf_decoder
from engine.model.families.gguf_metadata import GgufMetadata
from engine.model.spec import ModelSpec
from engine.weights.tensors import RawTensor

__all__ = ["llama_from_config", "llama_from_gguf"]


def llama_from_gguf(metadata: GgufMetadata, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    """The spec of a dense llama. Raises BadModelFile, and UnsupportedModel for Mixtral's experts."""
    if metadata.integer("expert_count", 0, MAX_EXPERTS, default=0):
        raise UnsupportedModel(
            f"{metadata.file}: it is a mixture of experts in the llama format (Mixtral), which Rillet does not have: take "
            "a dense model"
        )
    return gguf_decoder(metadata, tensors, interleaved=True)


def llama_from_config(config: ConfigJson) -> ModelSpec:
    """Raises BadModelFile and UnsupportedModel."""
    config.must_be("mlp_bias", False)
    bias = config.boolean("attention_bias", False)
    return config_decoder(config, "llama", qkv_bias=bias, output_bias=bias)
