"""SafetensorsFile: a safetensors file as named tensors, read through one mapping of the file.

safetensors_folder.py opens it. The header is hostile until proven otherwise: its length is compared with the file before a
byte of it is parsed, every tensor with the bytes that are there. It never copies a tensor and never interprets weights.
The safetensors library is not used, because it has no BF16 in NumPy and gives copies.
Format: https://huggingface.co/docs/safetensors/index#format
"""

from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np

from engine.errors import BadModelFile, UnsupportedModel
from engine.weights.json_object import parse_object
from engine.weights.tensor_file import TensorFile
from engine.weights.tensors import STORAGE, RawTensor, StorageType

__all__ = ["SafetensorsFile"]

CURE = "the file is damaged, download it again"
MAX_HEADER_BYTES = 100_000_000             # the format's own limit
MAX_TENSORS, MAX_NAME, MAX_DIMENSIONS, MAX_SIZE = 262_144, 1024, 8, 1 << 48
ABOUT = "__metadata__"                     # texts that say how the file was made

# The format's element types and how many of them take how many bytes; Rillet computes with those that GGUF has too.
BLOCKS = {
    "F64": (1, 8), "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "I64": (1, 8), "I32": (1, 4), "I16": (1, 2), "I8": (1, 1),
    "U64": (1, 8), "U32": (1, 4), "U16": (1, 2), "U8": (1, 1), "BOOL": (1, 1), "C64": (1, 8),
    "F8_E4M3": (1, 1), "F8_E5M2": (1, 1), "F8_E8M0": (1, 1), "F8_E4M3FNUZ": (1, 1), "F8_E5M2FNUZ": (1, 1),
    "F6_E2M3": (4, 3), "F6_E3M2": (4, 3), "F4": (2, 1),
}   # fmt: skip
TYPES = {name: STORAGE.get(name, StorageType(name, block, size, -1)) for name, (block, size) in BLOCKS.items()}


class SafetensorsFile(TensorFile):
    """One open safetensors file. `tensors` is complete and checked; a type that nobody computes with is only named."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 8, "safetensors")
        try:
            self.tensors = MappingProxyType(self._read_tensors())
        except BaseException:
            self.close()
            raise

    def _bad(self, message: str, tensor: str | None = None) -> BadModelFile:
        return BadModelFile(message, file=str(self.path), tensor=tensor)

    def _read_tensors(self) -> dict[str, RawTensor]:
        length, size = int.from_bytes(self._map[:8], "little"), len(self._map) - 8
        if length > min(size, MAX_HEADER_BYTES):
            raise self._bad(f"a header of {length:,} bytes is announced, {size:,} follow: {CURE}, or name another file")
        heads = parse_object(self._map[8 : 8 + length], self._bad)
        self._check_about(heads.pop(ABOUT, {}))
        if len(heads) > MAX_TENSORS:
            raise self._bad(f"it has {len(heads):,} tensors, {MAX_TENSORS:,} are allowed: {CURE}")
        base, end_before, name_before = 8 + length, 0, "the header"
        places = sorted((*self._place(name, head), name) for name, head in heads.items())
        tensors: dict[str, RawTensor] = {}
        for start, end, name in places:
            if start != end_before:
                how = "overlap" if start < end_before else "leave a gap after"
                raise self._bad(f"its bytes {start:,} to {end:,} {how} those of {name_before}: {CURE}", name)
            if base + end > len(self._map):
                raise self._bad(f"it needs bytes to {base + end:,}, the file has {len(self._map):,}: {CURE}", name)
            tensors[name] = self._tensor(name, heads[name], base + start, end - start)
            end_before, name_before = end, name
        if base + end_before != len(self._map):
            raise self._bad(f"its tensors end at byte {base + end_before:,} of {len(self._map):,}: {CURE}")
        return {name: tensors[name] for name in heads}

    def _check_about(self, about: object) -> None:
        if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
            raise self._bad(f"{ABOUT} must be texts only: {CURE}")

    def _place(self, name: str, head: object) -> tuple[int, int]:
        """The tensor's first byte and the one after its last, counted from the end of the header."""
        if len(name) > MAX_NAME or not name.isprintable():
            raise self._bad(f"a tensor is named {name[:60]!r}: {CURE}")
        if not isinstance(head, dict) or head.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"its head must have dtype, shape and data_offsets: {CURE}", name)
        offsets = head["data_offsets"]
        if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._bad(f"its data_offsets are {str(offsets)[:60]}, they must be two that rise: {CURE}", name)
        return offsets[0], offsets[1]

    def _tensor(self, name: str, head: object, start: int, length: int) -> RawTensor:
        assert isinstance(head, dict)
        kind, sizes = head["dtype"], head["shape"]
        if not isinstance(kind, str) or kind not in TYPES:
            raise UnsupportedModel(
                f"{self.path}: tensor {name} is of type {str(kind)[:40]!r}, which Rillet does not know: upgrade Rillet, or "
                "take another file"
            )
        if not _sizes(sizes) or len(sizes) > MAX_DIMENSIONS:
            raise self._bad(
                f"its shape is {str(sizes)[:60]}, it must be up to {MAX_DIMENSIONS} sizes to {MAX_SIZE:,}: {CURE}", name
            )
        storage = TYPES[kind]
        if prod(sizes) * storage.bytes != length * storage.block:
            raise self._bad(f"its shape {tuple(sizes)} of {kind} does not take the {length:,} bytes it has: {CURE}", name)
        data = np.frombuffer(self._map, np.uint8, length, start)
        return RawTensor(name, tuple(sizes), storage, data, str(self.path))


def _sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= MAX_SIZE for value in values)
