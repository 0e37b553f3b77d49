"""A GGUF model that lies in one file or in several (`name-00001-of-00003.gguf`), all of them open.

checkpoint.py calls open_gguf() with the path of the only file, or of any part. The parts are found by their names, and what
each says of itself (`split.no`, `split.count`, `split.tensors.count`) must agree. The first one has the model's metadata.
Format: https://github.com/ggml-org/llama.cpp/tree/master/tools/gguf-split
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from engine.errors import BadModelFile
from engine.weights.gguf_file import GgufFile, MetadataValue
from engine.weights.tensors import RawTensor

__all__ = ["open_gguf", "whole_name"]

PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.ASCII)
CURE = "download the parts again"


def whole_name(path: Path) -> str:
    """The model's name: that of its file, without what says which part it is."""
    found = PART.fullmatch(path.stem)
    return found["name"] if found else path.stem


def open_gguf(
    path: Path, opened: ExitStack
) -> tuple[list[GgufFile], Mapping[str, MetadataValue], dict[str, RawTensor]]:
    """The model's files, which `opened` closes, the metadata of the first and the tensors of all.

    Raises ModelNotFound, and BadModelFile for a part that is missing or does not belong to the others.
    """
    given = _open(path, opened)
    count = _number(given, "split.count") if "split.count" in given.metadata else 1
    if count <= 1:
        return [given], given.metadata, dict(given.tensors)
    paths = _part_paths(path, count)
    for missing in (part for part in paths if not part.is_file()):
        raise BadModelFile(f"this part of {count} is missing: download it beside the others", file=str(missing))
    files = [given if part.name == path.name else _open(part, opened) for part in paths]
    tensors: dict[str, RawTensor] = {}
    for number, file in enumerate(files):
        for key, right in (("split.no", number), ("split.count", count)):
            if (value := _number(file, key)) != right:
                raise BadModelFile(f"{key} is {value}, its name says {right}: {CURE}", file=str(file.path))
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise BadModelFile(f"{tensors[name].file} has it too: {CURE}", file=str(file.path), tensor=name)
            tensors[name] = tensor
    if (total := _number(files[0], "split.tensors.count")) != len(tensors):
        raise BadModelFile(
            f"split.tensors.count is {total:,}, its {count} parts have {len(tensors):,}: {CURE}", file=str(files[0].path)
        )
    return files, files[0].metadata, tensors


def _open(path: Path, opened: ExitStack) -> GgufFile:
    file = GgufFile(path)
    opened.callback(file.close)
    return file


def _part_paths(path: Path, count: int) -> list[Path]:
    found = PART.fullmatch(path.stem)
    if found is None or int(found["count"]) != count or not 1 <= int(found["number"]) <= count:
        raise BadModelFile(
            f"it is one of {count} parts, which are found by their names: call it as it was called, such as "
            f"{whole_name(path)}-00001-of-{count:05d}.gguf",
            file=str(path),
        )
    return [path.with_name(f"{found['name']}-{number:05d}-of-{count:05d}{path.suffix}") for number in range(1, count + 1)]


def _number(file: GgufFile, key: str) -> int:
    value = file.metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1 << 31:
        raise BadModelFile(f"{key} is {str(value)[:40]}, it must be a count: {CURE}", file=str(file.path))
    return value
