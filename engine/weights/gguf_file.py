"""GgufFile: a GGUF v2 or v3 file as metadata and named tensors, read through one mapping of the file.

checkpoint.py opens it, the families and engine/text read its metadata. A model file is hostile until proven otherwise:
every length, count and offset is compared with the bytes that are left BEFORE it is used, so a file of n bytes never
costs more than a small multiple of n in time or memory. It never copies a tensor and never interprets weights.
Reader and cursor stay in one file, so that every bound can be seen beside what it guards.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np

from engine.errors import BadModelFile
from engine.weights.tensor_file import TensorFile
from engine.weights.tensors import STORAGE_BY_GGUF_ID, RawTensor, StorageType

__all__ = ["GgufFile", "MetadataValue"]

MetadataValue = str | int | float | bool | list["MetadataValue"]
"""What a metadata key may hold; arrays are lists."""

MAGIC = b"GGUF"
CURE = "the file is damaged, download it again"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}   # GGUF's numbers
COUNT = struct.Struct("<Q")
MAX_KEYS, MAX_TENSORS, MAX_NESTING = 65_536, 262_144, 2
MAX_ELEMENTS = 1 << 22                     # of all arrays; a 256k vocabulary, its types, scores and merges are 1.3 million
MAX_NAME_BYTES = 65_535                    # of a key; the format's own limit
MIN_ALIGNMENT, MAX_ALIGNMENT = 8, 1 << 20
MAX_HEADER_BYTES = 128 << 20               # a 256k vocabulary with its merges takes 20 MB


class GgufFile(TensorFile):
    """One open GGUF file. `metadata` and `tensors` are complete and checked."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 24, "GGUF")
        try:
            cursor = _Cursor(self._map, str(path))
            key_count, tensor_count = self._read_header(cursor)
            self.metadata: Mapping[str, MetadataValue] = MappingProxyType(_read_metadata(cursor, key_count))
            self.tensors = MappingProxyType(self._read_tensors(cursor, tensor_count))
        except BaseException:
            self.close()
            raise

    def _read_header(self, cursor: "_Cursor") -> tuple[int, int]:
        if cursor.take(4) != MAGIC:
            raise cursor.bad(f"it does not begin with {MAGIC!r}, so it is no GGUF file: name a .gguf file")
        version = cursor.number("I")
        if version & 0xFFFF == 0 and version:
            raise cursor.bad("it is a big-endian GGUF: convert it with gguf-py's gguf_convert_endian.py")
        if version not in (2, 3):
            raise cursor.bad(f"it is GGUF version {version}, readable are 2 and 3: convert the model again")
        tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
        # The least that one tensor or key can take: a length of 8 bytes, a type of 4, and what the kind needs besides.
        cursor.check_count(tensor_count, MAX_TENSORS, 24, "tensors")
        cursor.check_count(key_count, MAX_KEYS, 13, "metadata keys")
        return key_count, tensor_count

    def _read_tensors(self, cursor: "_Cursor", count: int) -> dict[str, RawTensor]:
        heads: list[tuple[str, tuple[int, ...], StorageType, int]] = []
        names: set[str] = set()
        for _ in range(count):
            head = _read_tensor_head(cursor)
            if head[0] in names:
                raise cursor.bad(f"the tensor is listed twice: {CURE}", tensor=head[0])
            names.add(head[0])
            heads.append(head)
        alignment = self._alignment(cursor)
        base = cursor.position + -cursor.position % alignment
        tensors: dict[str, RawTensor] = {}
        end_before, name_before = 0, ""
        for name, shape, storage, offset in sorted(heads, key=lambda head: head[3]):
            size = prod(shape) // storage.block * storage.bytes
            if offset % alignment:
                raise cursor.bad(f"its offset {offset:,} is no multiple of the alignment {alignment}: {CURE}", tensor=name)
            if offset < end_before:
                raise cursor.bad(f"its bytes overlap those of {name_before}: {CURE}", tensor=name)
            start, end = base + offset, base + offset + size
            if end > len(self._map):
                raise cursor.bad(
                    f"it needs bytes {start:,} to {end:,}, the file has {len(self._map):,}: {CURE}", tensor=name
                )
            data = np.frombuffer(self._map, np.uint8, size, start)
            tensors[name] = RawTensor(name, shape, storage, data, cursor.file)
            end_before, name_before = offset + size, name
        return {name: tensors[name] for name, _, _, _ in heads}

    def _alignment(self, cursor: "_Cursor") -> int:
        value = self.metadata.get("general.alignment", 32)
        if not isinstance(value, int) or not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise cursor.bad(
                f"general.alignment is {value!r}, it must be a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}: {CURE}"
            )
        return value


def _read_metadata(cursor: "_Cursor", count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for _ in range(count):
        key = cursor.string(MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.bad(f"metadata key {key!r} stands twice: {CURE}")
        with cursor.reading(key):
            metadata[key] = cursor.value(cursor.number("I"), 0)
    return metadata


def _read_tensor_head(cursor: "_Cursor") -> tuple[str, tuple[int, ...], StorageType, int]:
    """(name, shape in NumPy order, storage type, offset from the start of the data)"""
    name = cursor.string(MAX_NAME_BYTES)
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= 4:
        raise cursor.bad(f"it has {dimensions} dimensions, 1 to 4 are possible: {CURE}", tensor=name)
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]      # GGUF writes the fastest dimension first
    # One weight takes at least an eighth of a byte in any storage type, so a larger count cannot be in the file.
    if 0 in shape or prod(shape) > len(cursor.data) * 8:
        raise cursor.bad(f"its shape {shape} cannot be in a file of {len(cursor.data):,} bytes: {CURE}", tensor=name)
    type_id, offset = cursor.number("I"), cursor.number("Q")
    storage = STORAGE_BY_GGUF_ID.get(type_id)
    if storage is None:
        raise cursor.bad(
            f"its storage type is number {type_id}, which is unknown: upgrade the gguf package, or take another file",
            tensor=name,
        )
    if shape[-1] % storage.block:
        raise cursor.bad(
            f"its rows have {shape[-1]} weights, {storage.name} needs a multiple of {storage.block}: {CURE}", tensor=name
        )
    return name, shape, storage, offset


class _Cursor:
    """Reads a buffer front to back; nothing is taken that is not there."""

    def __init__(self, data: mmap.mmap, file: str) -> None:
        self.data = data
        self.file = file
        self.size = min(len(data), MAX_HEADER_BYTES)
        self.position = 0
        self.elements = 0                  # of the arrays so far: in memory one takes up to 100 bytes
        self.where = ""                    # the metadata key being read, for messages

    def bad(self, message: str, tensor: str | None = None) -> BadModelFile:
        return BadModelFile(f"{self.where}{message}", file=self.file, tensor=tensor)

    @contextmanager
    def reading(self, key: str) -> Iterator[None]:
        self.where = f"metadata key {key!r}: "
        yield
        self.where = ""

    def check_count(self, count: int, limit: int, least_bytes: int, what: str) -> None:
        rest = self.size - self.position
        if count > limit or count * least_bytes > rest:
            raise self.bad(
                f"{count:,} {what} are announced, there can be {limit:,} at most and {rest:,} bytes are left: {CURE}"
            )

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > self.size:
            raise self.bad(f"{length:,} bytes are wanted at byte {self.position:,} of {self.size:,}: {CURE}")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, code: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]
        return value

    def string(self, limit: int | None = None) -> str:
        length = self.number("Q")
        if limit is not None and length > limit:
            raise self.bad(f"a name of {length:,} bytes is announced, {limit:,} are allowed: {CURE}")
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, depth: int) -> MetadataValue:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(depth + 1)
        raise self.bad(f"its value type is number {kind}, which is unknown: {CURE}")

    def array(self, depth: int) -> list[MetadataValue]:
        if depth > MAX_NESTING:
            raise self.bad(f"its arrays are nested more than {MAX_NESTING} deep: {CURE}")
        kind, count = self.number("I"), self.number("Q")
        code = SCALARS.get(kind)
        # An element takes its size at least; a string its length of 8 bytes, an array its type and count.
        least = {STRING: 8, ARRAY: 12}.get(kind) if code is None else struct.calcsize("<" + code)
        if least is None:
            raise self.bad(f"its elements' type is number {kind}, which is unknown: {CURE}")
        self.check_count(count, MAX_ELEMENTS - self.elements, least, "array elements")
        self.elements += count
        if code is not None:
            return list(struct.unpack(f"<{count}{code}", self.take(count * least)))
        return self.strings(count) if kind == STRING else [self.array(depth + 1) for _ in range(count)]

    def strings(self, count: int) -> list[MetadataValue]:
        """`count` strings; the hot loop of opening a file (a vocabulary and its merges are 300k of them)."""
        data, size, position, length_at = self.data, self.size, self.position, COUNT.unpack_from
        result: list[MetadataValue] = []
        for _ in range(count):
            start = position + 8
            if start > size:
                raise self.bad(f"a string begins at byte {position:,} of {size:,}: {CURE}")
            position = start + length_at(data, position)[0]
            if position > size:
                raise self.bad(f"a string of {position - start:,} bytes is announced at byte {start:,} of {size:,}: {CURE}")
            result.append(data[start:position].decode("utf-8", "replace"))
        self.position = position
        return result
