"""The registry of families: one screen per family turns metadata into a ModelSpec, and a table names its tensors.

engine.weights.checkpoint calls it. To add a dense family: a file beside this one, and a line in GGUF_FAMILIES.
"""

from collections.abc import Callable, Mapping

from engine.errors import UnsupportedModel
from engine.model.families.gguf_dense import LAYER_NAMES, MODEL_NAMES, READ_WITH_THE_SPEC
from engine.model.families.gguf_metadata import GgufMetadata
from engine.model.families.llama import llama_from_gguf
from engine.model.families.qwen2 import qwen2_from_gguf
from engine.model.spec import ModelSpec
from engine.weights.tensors import RawTensor

__all__ = ["GGUF_FAMILIES", "canonical_names", "spec_from_gguf"]

GgufFamily = Callable[[GgufMetadata, Mapping[str, RawTensor]], ModelSpec]

GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": llama_from_gguf,
    "qwen2": qwen2_from_gguf,
}


def spec_from_gguf(values: Mapping[str, object], tensors: Mapping[str, RawTensor], file: str) -> ModelSpec:
    """What the model in `file` is. `tensors` by their GGUF names. Raises UnsupportedModel and BadModelFile."""
    metadata = GgufMetadata(values, file)
    family = GGUF_FAMILIES.get(metadata.architecture)
    if family is None:
        raise UnsupportedModel(
            f"{file}: its architecture is {metadata.architecture[:80]!r}, Rillet has {', '.join(sorted(GGUF_FAMILIES))}: "
            "take one of these"
        )
    return family(metadata, tensors)


def canonical_names(tensors: Mapping[str, RawTensor], file: str) -> dict[str, str]:
    """Canonical name -> GGUF name, for every tensor of the file.

    Raises UnsupportedModel for a tensor whose name says nothing here: left out, it would change the mathematics.
    """
    names: dict[str, str] = {}
    for name in tensors:
        if name in READ_WITH_THE_SPEC:
            continue
        canonical = _canonical(name)
        if canonical is None:
            raise UnsupportedModel(
                f"{file}: it has a tensor {name!r} that Rillet does not know; leaving it out would change the model's "
                "answers: upgrade Rillet, or take another conversion"
            )
        names[canonical] = name
    return names


def _canonical(name: str) -> str | None:
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    block, _, rest = name.partition(".")
    index, _, part = rest.partition(".")
    if block != "blk" or part not in LAYER_NAMES or not (index.isascii() and index.isdigit()) or str(int(index)) != index:
        return None
    return f"layers.{index}.{LAYER_NAMES[part]}"
