"""Which safetensors files of a folder are the model, and all their tensors under one roof.

checkpoint.py calls open_safetensors() for a folder. Either model.safetensors is the whole model, or an index beside the
shards tells in which of them each tensor lies. Files that neither names are left alone, and no name leads out of the folder.
Links are followed: a snapshot of the hub's cache is made of them.
"""

import re
from contextlib import ExitStack
from pathlib import Path

from engine.errors import BadModelFile, ModelNotFound, UnsupportedModel
from engine.weights.json_object import read_object
from engine.weights.safetensors_file import SafetensorsFile
from engine.weights.tensors import RawTensor

__all__ = ["open_safetensors"]

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,200}\.safetensors")
OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def open_safetensors(folder: Path, opened: ExitStack) -> tuple[list[SafetensorsFile], dict[str, RawTensor]]:
    """The model's files, which `opened` closes, and their tensors by name.

    Raises ModelNotFound and UnsupportedModel if the folder has no model that is read here, BadModelFile for a shard that is
    missing or does not hold what the index says.
    """
    if (folder / WHOLE).exists():
        file = _open(folder / WHOLE, opened)
        return [file], dict(file.tensors)
    if not (folder / INDEX).exists():
        raise _no_model(folder)
    shard_of = _read_index(folder / INDEX)
    names = sorted(set(shard_of.values()))
    for name in names:
        if not (folder / name).is_file():
            raise BadModelFile(
                f"{INDEX} names this shard, which is missing: download it into the folder", file=str(folder / name)
            )
    shards = {name: _open(folder / name, opened) for name in names}
    return list(shards.values()), _unite(shards, shard_of)


def _open(path: Path, opened: ExitStack) -> SafetensorsFile:
    file = SafetensorsFile(path)
    opened.callback(file.close)
    return file


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> the name of its shard."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadModelFile("weight_map must say where each tensor is: download it again", file=str(path))
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
            raise BadModelFile(
                f"its shard is {str(name)[:80]!r}, it must be the name of a .safetensors file in the folder: download the "
                "index again",
                file=str(path),
                tensor=tensor[:200],
            )
    return weight_map


def _unite(shards: dict[str, SafetensorsFile], shard_of: dict[str, str]) -> dict[str, RawTensor]:
    """Every tensor of the shards, those that the index forgot too: the families refuse what they do not know."""
    tensors: dict[str, RawTensor] = {}
    for shard, file in shards.items():
        for name, tensor in file.tensors.items():
            if shard_of.get(name, shard) != shard:
                continue                   # a copy; the index says which one counts
            if name in tensors:
                raise BadModelFile(
                    f"{tensors[name].file} has it too, and {INDEX} does not say which counts: download the folder again",
                    file=str(file.path),
                    tensor=name,
                )
            tensors[name] = tensor
    for name, shard in shard_of.items():
        if name not in tensors:
            raise BadModelFile(
                f"{INDEX} says that it is in this shard, but it is not: download both again",
                file=str(shards[shard].path),
                tensor=name[:200],
            )
    return tensors


def _no_model(folder: Path) -> ModelNotFound | UnsupportedModel:
    found = sorted({path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern)})
    if not found:
        return ModelNotFound(f"{folder}: it has neither {WHOLE} nor {INDEX}: name a model's folder, or a .gguf file")
    listed = ", ".join(found[:4])
    if any(re.search(r"-of-\d+\.safetensors$", name) for name in found):
        return ModelNotFound(f"{folder}: it has shards ({listed}) but no {INDEX}: download that file too")
    return UnsupportedModel(
        f"{folder}: it has {listed}, Rillet reads {WHOLE} or {INDEX} with its shards: take the conversion for transformers, "
        "or name a .gguf file"
    )
