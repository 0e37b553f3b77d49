"""Llama 2 and 3, Mistral, SmolLM and what else calls itself `llama`: GGUF metadata -> ModelSpec.

llama.cpp's converter permutes the rows of query and key of this family, so that its rope pairs neighbours: interleaved.
"""

from collections.abc import Mapping

from engine.errors import UnsupportedModel
from engine.model.families.gguf_dense import dense_spec
from engine.model.families.gguf_metadata import GgufMetadata
from engine.model.spec import ModelSpec
from engine.weights.tensors import RawTensor

__all__ = ["llama_from_gguf"]


def llama_from_gguf(metadata: GgufMetadata, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    """The spec of a dense llama. Raises BadModelFile, and UnsupportedModel for Mixtral's experts."""
    if metadata.integer("expert_count", 0, 1 << 16, default=0):
        raise UnsupportedModel(
            f"{metadata.file}: it is a mixture of experts in the llama format (Mixtral), which Rillet does not have: take "
            "a dense model"
        )
    return dense_spec(metadata, tensors, interleaved=True)
