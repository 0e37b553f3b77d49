"""GgufMetadata: TypedKeys of one architecture in a GGUF file.

The families ask it for numbers. A family that has read all it knows calls refuse_unread(): what is left under its
architecture's prefix would change the mathematics. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Mapping

from engine.errors import BadModelFile, UnsupportedModel
from engine.model.families.typed_keys import TypedKeys, short

__all__ = ["GgufMetadata"]


class GgufMetadata(TypedKeys):
    """The metadata of one file. Keys are given without the prefix `{architecture}.`"""

    cure = "download the file again, or take another conversion"
    # Keys that say nothing about the arithmetic of our decoders.
    harmless = frozenset({
        "attention.group_norm_epsilon",
        "attention.layer_norm_epsilon",    # of families with LayerNorm; ours read layer_norm_rms_epsilon
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "training_context_length",
    })

    def __init__(self, values: Mapping[str, object], file: str) -> None:
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str):
            raise BadModelFile(
                f"general.architecture is {short(architecture)}, it must be a name: {self.cure}", file=file
            )
        super().__init__(values, file, prefix=f"{architecture}.", model=architecture)
        self.architecture = architecture

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """As TypedKeys has it; a list of one integer per layer counts as that integer if all are equal."""
        value = self._get(key, default)
        if not isinstance(value, list):
            return super().integer(key, low, high, default)
        first = value[0] if value else None
        if isinstance(first, bool) or not isinstance(first, int) or not low <= first <= high:
            raise self.bad(key, value, f"integers from {low:,} to {high:,}")
        if any(each != first for each in value):
            raise UnsupportedModel(
                f"{self.file}: {self.prefix}{key} differs from layer to layer, which Rillet's {self.architecture} does "
                "not support: take another model"
            )
        return first
