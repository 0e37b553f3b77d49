"""What rank 0 and the other ranks say to each other, as msgpack: load this, make pages, run this step; done, failed, so many.

A step's arrays travel as raw little-endian bytes. Each is checked against the type that engine/step.py declares and against
the others' lengths before anybody sees it: a frame that does not fit is a WireError. Nothing here is pickled or evaluated.
"""

from dataclasses import fields, replace
from math import prod
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.backend import LoadOptions, MemoryStatistics
from engine.step import Bias, History, StepInput
from engine.wire import WireError

__all__ = [
    "Allocate", "Close", "Failed", "Join", "Load", "Loaded", "Packed", "Pages", "Ready", "Step", "decode_answer",
    "decode_join", "decode_order", "encode", "for_followers", "pack_step", "unpack_step",
]  # fmt: skip

Shape = tuple[str | int, ...]
MOST_AXIS = 1 << 31

# Letters of engine/step.py; S1 and B1 are one more than S and B.
STEP: dict[str, Shape] = {
    "copies": ("C", 2), "tokens": ("T",), "positions": ("T",), "slots": ("T",), "row_starts": ("B1",), "kv_lengths": ("B",),
    "page_tables": ("B", "W"), "sample_at": ("S",), "temperature": ("S",), "top_k": ("S",), "top_p": ("S",), "min_p": ("S",),
    "repetition": ("S",), "frequency": ("S",), "presence": ("S",), "seed": ("S", 2), "draw_position": ("S",),
    "choice": ("S",), "score": ("S",), "top_count": ("S",), "mask_at": ("G",), "grammar_masks": ("G", "V"),
    "hidden_at": ("H",),
}  # fmt: skip
OFF = {
    "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition": 1, "frequency": 0, "presence": 0, "score": -1,
    "top_count": -1,
}  # fmt: skip
HISTORY: dict[str, Shape] = {"starts": ("S1",), "tokens": ("X",), "counts": ("X",), "in_prompt": ("X",)}
BIAS: dict[str, Shape] = {"starts": ("S1",), "tokens": ("Y",), "values": ("Y",)}


def _dtypes(kind: type, names: dict[str, Shape]) -> dict[str, np.dtype[Any]]:
    """The declared type of each array of a dataclass, little-endian."""
    hints = get_type_hints(kind)
    return {name: np.dtype(get_args(get_args(hints[name])[1])[0]).newbyteorder("<") for name in names}


DTYPES: dict[type, dict[str, np.dtype[Any]]] = {
    kind: _dtypes(kind, names) for kind, names in ((StepInput, STEP), (History, HISTORY), (Bias, BIAS))
}
assert {*STEP, "history", "bias"} == {field.name for field in fields(StepInput)}, "engine/step.py has a field more"


class Packed(msgspec.Struct, array_like=True):
    """An array."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Message(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """One frame; the class's name travels with it."""


class Join(Message):
    """A rank's first words on a connection: who it is, and whether it is for orders or for what devices sum."""

    rank: int
    purpose: str                     # "orders" or "sums"


class Load(Message):
    """Open options.checkpoint, see that it is the same model, and load the rank's part."""

    options: LoadOptions
    digest: str                      # of the whole ModelSpec


class Allocate(Message):
    budget_bytes: int | None


class Step(Message):
    arrays: dict[str, Packed]
    history: dict[str, Packed] | None = None
    bias: dict[str, Packed] | None = None


class Close(Message):
    pass


class Ready(Message):
    """The rank has its device."""

    device: str


class Loaded(Message):
    memory: MemoryStatistics


class Pages(Message):
    count: int
    memory: MemoryStatistics


class Failed(Message):
    """The rank's last words: a class of engine/errors.py, or any other, and what it said."""

    error: str
    text: str


ORDERS = msgspec.msgpack.Decoder(Load | Allocate | Step | Close)
ANSWERS = msgspec.msgpack.Decoder(Ready | Loaded | Pages | Failed)
JOIN = msgspec.msgpack.Decoder(Join)
ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return ENCODER.encode(message)


def decode_order(frame: bytes | bytearray) -> Load | Allocate | Step | Close:
    order: Load | Allocate | Step | Close = _decoded(ORDERS, frame)
    return order


def decode_answer(frame: bytes | bytearray) -> Ready | Loaded | Pages | Failed:
    answer: Ready | Loaded | Pages | Failed = _decoded(ANSWERS, frame)
    return answer


def decode_join(frame: bytes | bytearray) -> Join:
    join: Join = _decoded(JOIN, frame)
    return join


def _decoded(decoder: msgspec.msgpack.Decoder[Any], frame: bytes | bytearray) -> Any:
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"a frame of {len(frame):,} bytes is no message: {error}") from error


# ---- steps ------------------------------------------------------------------------------------------------------------


def for_followers(step: StepInput) -> StepInput:
    """The step without what only whoever samples reads, such as the masks of a grammar (megabytes): all places are greedy."""
    none, places = np.zeros(0, np.int32), step.place_count
    off = {name: np.full(places, value, DTYPES[StepInput][name]) for name, value in OFF.items()}
    return replace(
        step, **off, history=None, bias=None, mask_at=none, grammar_masks=np.zeros((0, 0), np.uint32), hidden_at=none
    )


def pack_step(step: StepInput) -> Step:
    history, bias = step.history, step.bias
    return Step(
        _pack(step, STEP), None if history is None else _pack(history, HISTORY), None if bias is None else _pack(bias, BIAS)
    )


def unpack_step(message: Step) -> StepInput:
    """The step; its arrays are read-only. WireError if an array is missing, too many, of another type or length."""
    sizes: dict[str, int] = {}
    arrays = _unpack(message.arrays, StepInput, STEP, sizes)
    history = None if message.history is None else History(**_unpack(message.history, History, HISTORY, sizes))
    bias = None if message.bias is None else Bias(**_unpack(message.bias, Bias, BIAS, sizes))
    for letter in ("B", "S"):
        if sizes.get(letter + "1", sizes[letter] + 1) != sizes[letter] + 1:
            raise WireError(f"a step has {sizes[letter]} of {letter}, but {sizes[letter + '1']} borders between them")
    return StepInput(**arrays, history=history, bias=bias)


def _pack(of: StepInput | History | Bias, names: dict[str, Shape]) -> dict[str, Packed]:
    dtypes = DTYPES[type(of)]
    arrays = ((name, np.asarray(getattr(of, name), dtypes[name])) for name in names)
    return {name: Packed(array.dtype.str, array.shape, array.tobytes()) for name, array in arrays}


def _unpack(
    packed: dict[str, Packed], kind: type, names: dict[str, Shape], sizes: dict[str, int]
) -> dict[str, NDArray[Any]]:
    """sizes: letter -> length, of the arrays seen so far."""
    if packed.keys() != names.keys():
        wrong = sorted(packed.keys() ^ names.keys())[:5]
        raise WireError(f"a {kind.__name__} has other arrays than this version of Rillet knows: {wrong}")
    return {name: _array(f"{kind.__name__}.{name}", packed[name], DTYPES[kind][name], names[name], sizes) for name in names}


def _array(name: str, packed: Packed, dtype: np.dtype[Any], wanted: Shape, sizes: dict[str, int]) -> NDArray[Any]:
    shape = packed.shape
    if packed.dtype != dtype.str:
        raise WireError(f"{name} is of type {packed.dtype[:20]!r}, it must be {dtype.str}")
    if len(shape) != len(wanted) or not all(0 <= size < MOST_AXIS for size in shape):
        raise WireError(f"{name} has the shape {shape[:5]}, it must be {wanted}")
    for size, letter in zip(shape, wanted, strict=True):
        if size != (letter if isinstance(letter, int) else sizes.setdefault(letter, size)):
            raise WireError(f"{name} has the shape {shape}, it must be {wanted} with {sizes}")
    if len(packed.data) != prod(shape) * dtype.itemsize:
        raise WireError(f"{name} has {len(packed.data):,} bytes, the shape {shape} of {dtype.str} takes others")
    if dtype.kind == "b" and packed.data.strip(b"\0\1"):
        raise WireError(f"{name} has truth values that are neither 0 nor 1")
    return np.frombuffer(packed.data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
