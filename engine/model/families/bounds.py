"""What a model's numbers may be at most: beyond any model that exists, and below what would exhaust memory by listing it."""

from engine.errors import BadModelFile

__all__ = ["MAX_CONTEXT", "MAX_EXPERTS", "MAX_HEADS", "MAX_LAYERS", "MAX_VOCABULARY", "MAX_WIDTH", "check_experts"]

MAX_LAYERS, MAX_HEADS, MAX_WIDTH, MAX_CONTEXT, MAX_VOCABULARY = 1024, 1 << 14, 1 << 22, 1 << 28, 1 << 24
MAX_EXPERTS = 4096
MAX_EXPERTS_IN_ALL = 1 << 17               # every expert of every layer has names of its own in ModelSpec.shapes


def check_experts(layers: int, experts: int, file: str) -> None:
    """Raises BadModelFile if so many experts cannot be."""
    if layers * experts > MAX_EXPERTS_IN_ALL:
        raise BadModelFile(
            f"it has {layers:,} layers of {experts:,} experts, {MAX_EXPERTS_IN_ALL:,} experts in all are the most: "
            "download the file again",
            file=file,
        )
