"""GLM-4-0414, from GGUF and from config.json.

Half of each head is rotated, in neighbouring pairs in every format; each branch is normed once more before it is added;
gate and up are one tensor, the gate's rows first.
"""

from collections.abc import Mapping

from engine.model.families.config_decoder import config_decoder
from engine.model.families.config_json import ConfigJson
from engine.model.families.gguf_decoder import gguf_decoder
from engine.model.families.gguf_metadata import GgufMetadata
from engine.model.spec import ModelSpec
from engine.weights.tensors import RawTensor

__all__ = ["glm4_from_config", "glm4_from_gguf"]


def glm4_from_gguf(metadata: GgufMetadata, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    """Raises BadModelFile and UnsupportedModel."""
    return gguf_decoder(metadata, tensors, interleaved=True, post_norms=True)


def glm4_from_config(config: ConfigJson) -> ModelSpec:
    """Raises BadModelFile and UnsupportedModel."""
    return config_decoder(
        config,
        "glm4",
        qkv_bias=config.boolean("attention_bias", True),
        head_size_stated=True,
        interleaved=True,
        rotary_share=0.5,
        post_norms=True,
    )
