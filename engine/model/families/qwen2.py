"""Qwen2 and Qwen2.5 (dense): GGUF metadata -> ModelSpec. Query, key and value have biases; rope pairs halves (NeoX)."""

from collections.abc import Mapping

from engine.errors import BadModelFile
from engine.model.families.gguf_dense import dense_spec
from engine.model.families.gguf_metadata import GgufMetadata
from engine.model.spec import ModelSpec
from engine.weights.tensors import RawTensor

__all__ = ["qwen2_from_gguf"]


def qwen2_from_gguf(metadata: GgufMetadata, tensors: Mapping[str, RawTensor]) -> ModelSpec:
    """The spec of a dense Qwen2. Raises BadModelFile and UnsupportedModel."""
    spec = dense_spec(metadata, tensors, interleaved=False)
    if not spec.layers[0].attention.qkv_bias:
        raise BadModelFile(
            "it is missing, and Qwen2 has it: download the file again", file=metadata.file, tensor="blk.0.attn_q.bias"
        )
    return spec
