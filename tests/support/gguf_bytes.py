"""A GGUF v3 writer for tests, written against the format's page, not against engine.weights.gguf_file.

It remembers where each length, count, type and offset stands (`marks`), so that a fuzz test can corrupt every one of them.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

MAGIC = 0x46554747
U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
FORMATS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", U64: "<Q"}


@dataclass
class GgufBytes:
    """Build with text(), number() ..., or encode_gguf(); `marks` are (name, offset, size in bytes)."""

    data: bytearray = field(default_factory=bytearray)
    marks: list[tuple[str, int, int]] = field(default_factory=list)

    def number(self, code: str, value: float, mark: str | None = None) -> None:
        packed = struct.pack(code, value)
        if mark:
            self.marks.append((mark, len(self.data), len(packed)))
        self.data += packed

    def text(self, value: str | bytes, mark: str) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.number("<Q", len(raw), f"length of {mark}")
        self.data += raw

    def value(self, value: object, mark: str) -> None:
        kind = kind_of(value)
        self.number("<I", kind, f"type of {mark}")
        if isinstance(value, list):
            self.array(value, mark)
        elif isinstance(value, str):
            self.text(value, mark)
        else:
            self.number(FORMATS[kind], value)

    def array(self, values: list, mark: str) -> None:
        kind = kind_of(values[0]) if values else U32
        if kind == U32 and any(value < 0 for value in values):
            kind = I32
        self.number("<I", kind, f"element type of {mark}")
        self.number("<Q", len(values), f"count of {mark}")
        for value in values:
            if isinstance(value, list):
                self.array(value, mark)
            elif isinstance(value, str):
                self.text(value, f"element of {mark}")
            else:
                self.number(FORMATS[kind], value)


def kind_of(value: object) -> int:
    match value:
        case bool():
            return BOOL
        case int():
            return I32 if value < 0 else U32 if value < 1 << 32 else U64
        case float():
            return F32
        case str():
            return STRING
        case list():
            return ARRAY
    raise TypeError(value)


def encode_gguf(
    metadata: Mapping[str, object],
    tensors: Mapping[str, tuple[Sequence[int], int, bytes]],
    *,
    version: int = 3,
    alignment: int = 32,
) -> GgufBytes:
    """tensors: name -> (shape in NumPy order, GGML's number of the storage type, its bytes)."""
    out = GgufBytes()
    out.number("<I", MAGIC, "magic")
    out.number("<I", version, "version")
    out.number("<Q", len(tensors), "count of tensors")
    out.number("<Q", len(metadata), "count of keys")
    for key, value in metadata.items():
        out.text(key, f"key {key}")
        out.value(value, key)
    offset = 0
    for name, (shape, type_id, raw) in tensors.items():
        out.text(name, f"tensor {name}")
        out.number("<I", len(shape), f"dimensions of {name}")
        for size in reversed(shape):
            out.number("<Q", size, f"size of {name}")
        out.number("<I", type_id, f"storage type of {name}")
        out.number("<Q", offset, f"offset of {name}")
        offset += len(raw) + -len(raw) % alignment
    for _, _, raw in tensors.values():
        out.data += bytes(-len(out.data) % alignment)
        out.data += raw
    return out


def matrix(values: np.ndarray) -> tuple[tuple[int, ...], int, bytes]:
    """A float32 array as encode_gguf takes it."""
    return values.shape, 0, values.astype(np.float32).tobytes()
