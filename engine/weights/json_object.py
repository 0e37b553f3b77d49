"""JSON objects of model folders (config.json, the shards' index, a safetensors header), read within bounds.

Hostile until proven otherwise: the bytes, the nesting and the number of values are bounded, because a value of two bytes
takes up to a hundred in memory; a key with two meanings is refused, because readers would differ on it.
"""

import json
from collections.abc import Callable
from pathlib import Path

from engine.errors import BadModelFile, ModelNotFound

__all__ = ["parse_object", "read_object"]

MAX_FILE_BYTES = 64 << 20                  # the index of a model of 92,000 tensors takes 9 MB
MAX_VALUES = 2_000_000
CURE = "the file is damaged, download it again"


def read_object(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises ModelNotFound if there is no such file, BadModelFile for anything but an object."""
    try:
        if path.exists() and not path.is_file():                         # opening a pipe would wait for ever
            raise BadModelFile(f"it is no file: {CURE}", file=str(path))
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: no such file: check the folder, or download the model again") from None
    except OSError as error:
        raise ModelNotFound(f"{path}: cannot be read ({error.strerror}): check the path and its rights") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadModelFile(f"it has more than {MAX_FILE_BYTES:,} bytes: {CURE}", file=str(path))
    return parse_object(data, lambda message: BadModelFile(message, file=str(path)))


def parse_object(data: bytes, bad: Callable[[str], BadModelFile]) -> dict[str, object]:
    """The JSON object in `data`; bad(message) makes the error that is raised for anything else."""
    if (values := sum(map(data.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise bad(f"its JSON has up to {values:,} values, {MAX_VALUES:,} are allowed: {CURE}")
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise bad(f"its JSON cannot be read ({str(error)[:100]}): {CURE}") from None
    if not isinstance(parsed, dict):
        raise bad(f"its JSON is no object: {CURE}")
    return parsed


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        keys: set[str] = set()
        for key, _ in pairs:
            if key in keys:
                raise ValueError(f"{key[:60]!r} stands twice")
            keys.add(key)
    return members
