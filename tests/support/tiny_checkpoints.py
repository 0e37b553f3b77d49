"""The committed tiny checkpoints of every family, with their golden data: what golden/make_tiny_checkpoints.py wrote."""

import json
from collections.abc import Mapping
from pathlib import Path

from engine.model.families import gguf_parts, safetensors_parts, spec_from_config, spec_from_gguf
from engine.model.spec import ModelSpec
from engine.weights.gguf_file import GgufFile
from engine.weights.safetensors_file import SafetensorsFile
from engine.weights.tensors import Part, RawTensor

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = GOLDEN / "checkpoints"


def golden_cases() -> dict[str, dict]:
    cases = json.loads((GOLDEN / "checkpoints.json").read_text())
    return {name: case for name, case in cases.items() if isinstance(case, dict)}


def config_of(checkpoint: str, changes: Mapping[str, object] | None = None) -> dict:
    return json.loads((CHECKPOINTS / checkpoint / "config.json").read_text()) | (changes or {})


def tensors_of(checkpoint: str) -> dict[str, RawTensor]:
    """By their Hugging Face names, of all shards."""
    found: dict[str, RawTensor] = {}
    for path in sorted((CHECKPOINTS / checkpoint).glob("*.safetensors")):
        found |= SafetensorsFile(path).tensors
    return found


class Parts:
    """A TensorSource over tensors of a file and the parts that the families found in them."""

    def __init__(self, tensors: Mapping[str, RawTensor], parts: Mapping[str, Part]) -> None:
        self.tensors, self.parts = tensors, parts

    def names(self) -> list[str]:
        return list(self.parts)

    def tensor(self, name: str) -> RawTensor:
        part = self.parts[name]
        return part.of(self.tensors[part.name], name)

    def release(self, name: str) -> None:
        pass


def from_folder(checkpoint: str, changes: Mapping[str, object] | None = None) -> tuple[ModelSpec, Parts]:
    spec, tensors = spec_from_config(config_of(checkpoint, changes), "config.json"), tensors_of(checkpoint)
    return spec, Parts(tensors, safetensors_parts(spec, tensors, checkpoint))


def from_gguf(path: Path) -> tuple[ModelSpec, Parts]:
    file = GgufFile(path)
    spec = spec_from_gguf(file.metadata, file.tensors, path.name)
    return spec, Parts(file.tensors, gguf_parts(spec, file.tensors, path.name))
