"""What the backend and its ranks say to each other, as msgpack: load this, make pages, run this step, tell me what it drew.

A step's arrays travel as raw little-endian bytes. Each is checked against the type that engine/step.py declares and against
the others' lengths before anybody sees it; a frame that does not fit is a WireError. Nothing is pickled or evaluated.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, TypeVar, cast, get_args, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.backend import LoadOptions, MemoryStatistics
from engine.step import Bias, History, StepInput, StepOutput
from engine.wire import WireError

__all__ = [
    "Allocate", "Answer", "Close", "Drew", "Failed", "Join", "Load", "Loaded", "Loading", "Message", "Order", "Pages",
    "Ready", "Step", "Wait", "decode_answer", "decode_join", "decode_order", "encode", "for_followers", "pack_output",
    "pack_step", "unpack_output", "unpack_step",
]  # fmt: skip

Bundle = TypeVar("Bundle", StepInput, History, Bias, StepOutput)
MOST_AXIS = 1 << 31

# Axes of engine/step.py, and the arrays that have them; B+1 is one more than B.
AXES: dict[type, dict[str, str]] = {
    StepInput: {
        "C 2": "copies",
        "T": "tokens positions slots",
        "B+1": "row_starts",
        "B": "kv_lengths",
        "B W": "page_tables",
        "S": "sample_at temperature top_k top_p min_p repetition frequency presence draw_position choice score top_count",
        "S 2": "seed",
        "G": "mask_at",
        "G V": "grammar_masks",
        "H": "hidden_at",
    },
    History: {"S+1": "starts", "X": "tokens counts in_prompt"},
    Bias: {"S+1": "starts", "Y": "tokens values"},
    StepOutput: {"S": "tokens logprobs", "S K": "top_ids top_logprobs", "H D": "hidden"},
}


def _arrays_of(kind: type) -> dict[str, tuple[list[str], np.dtype[Any]]]:
    """Name -> axes, and the declared type, little-endian."""
    hints = get_type_hints(kind)
    names = {name: axes.split() for axes, those in AXES[kind].items() for name in those.split()}
    assert hints.keys() - names.keys() <= {"history", "bias"}, "engine/step.py has a field more"
    return {
        name: (axes, np.dtype(get_args(get_args(hints[name])[1])[0]).newbyteorder("<")) for name, axes in names.items()
    }


ARRAYS = {kind: _arrays_of(kind) for kind in AXES}


class Packed(msgspec.Struct, array_like=True):
    """An array."""

    shape: tuple[int, ...]
    data: bytes


class Message(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """One frame; the class's name travels with it."""


class Join(Message):
    """A rank's first words: who it is."""

    rank: int


class Load(Message):
    """Open options.checkpoint, see that it is the same model, and load the rank's part."""

    options: LoadOptions
    digest: str                      # of the whole ModelSpec


class Allocate(Message):
    budget_bytes: int | None         # of this rank


class Step(Message):
    arrays: dict[str, Packed]
    history: dict[str, Packed] | None = None
    bias: dict[str, Packed] | None = None


class Wait(Message):
    """Wait for the oldest step; the first rank says what it drew."""


class Close(Message):
    pass


class Ready(Message):
    """The rank has met the others."""


class Loading(Message):
    """The first rank's progress."""

    what: str
    done: int
    total: int


class Loaded(Message):
    memory: MemoryStatistics
    dtype: str                       # of the activations, which are summed


class Pages(Message):
    count: int
    memory: MemoryStatistics


class Drew(Message):
    arrays: dict[str, Packed]


class Failed(Message):
    """The rank's last words: a class of engine/errors.py, or any other, and what it said."""

    error: str
    text: str


Order = Load | Allocate | Step | Wait | Close
Answer = Ready | Loading | Loaded | Pages | Drew | Failed
ORDERS = msgspec.msgpack.Decoder(Order)
ANSWERS = msgspec.msgpack.Decoder(Answer)
JOIN = msgspec.msgpack.Decoder(Join)
ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return ENCODER.encode(message)


def decode_order(frame: bytes | bytearray) -> Order:
    return cast(Order, _decoded(ORDERS, frame))


def decode_answer(frame: bytes | bytearray) -> Answer:
    return cast(Answer, _decoded(ANSWERS, frame))


def decode_join(frame: bytes | bytearray) -> Join:
    return cast(Join, _decoded(JOIN, frame))


def _decoded(decoder: msgspec.msgpack.Decoder[Any], frame: bytes | bytearray) -> object:
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"a frame of {len(frame):,} bytes is no message: {error}") from error


# ---- steps and what they drew -----------------------------------------------------------------------------------------


def for_followers(step: StepInput) -> StepInput:
    """The step without what only the rank that draws reads: penalties, biases, masks of grammars (megabytes), states."""
    none = np.zeros(0, np.int32)
    return replace(
        step, history=None, bias=None, mask_at=none, grammar_masks=np.zeros((0, 0), np.uint32), hidden_at=none
    )


def pack_step(step: StepInput) -> Step:
    history, bias = step.history, step.bias
    return Step(_pack(step), None if history is None else _pack(history), None if bias is None else _pack(bias))


def unpack_step(message: Step) -> StepInput:
    """The step; its arrays are read-only. WireError if an array is missing, too many, or of another length."""
    sizes: dict[str, int] = {}
    step = _unpack(StepInput, message.arrays, sizes)
    history = None if message.history is None else _unpack(History, message.history, sizes)
    bias = None if message.bias is None else _unpack(Bias, message.bias, sizes)
    return replace(step, history=history, bias=bias)


def pack_output(output: StepOutput) -> Drew:
    return Drew(_pack(output))


def unpack_output(message: Drew) -> StepOutput:
    return _unpack(StepOutput, message.arrays, {})


def _pack(bundle: StepInput | History | Bias | StepOutput) -> dict[str, Packed]:
    packed = {}
    for name, (_, dtype) in ARRAYS[type(bundle)].items():
        array = np.asarray(getattr(bundle, name), dtype)
        packed[name] = Packed(array.shape, array.tobytes())
    return packed


def _unpack(kind: type[Bundle], packed: Mapping[str, Packed], sizes: dict[str, int]) -> Bundle:
    """sizes: axis -> length, of the arrays seen so far."""
    arrays = ARRAYS[kind]
    if packed.keys() != arrays.keys():
        wrong = sorted(packed.keys() ^ arrays.keys())[:5]
        raise WireError(f"a {kind.__name__} has other arrays than this version of Rillet knows: {wrong}")
    made: dict[str, Any] = {
        name: _array(f"{kind.__name__}.{name}", packed[name], axes, dtype, sizes) for name, (axes, dtype) in arrays.items()
    }
    return kind(**made)


def _array(name: str, packed: Packed, axes: list[str], dtype: np.dtype[Any], sizes: dict[str, int]) -> NDArray[Any]:
    shape = packed.shape
    fits = len(shape) == len(axes) and all(0 <= size < MOST_AXIS for size in shape)
    for size, axis in zip(shape, axes, strict=False):
        letter, _, more = axis.partition("+")
        size -= int(more or 0)
        fits = fits and size == (int(letter) if letter.isdigit() else sizes.setdefault(letter, size))
    if not fits:
        raise WireError(f"{name} has the shape {shape[:5]}, it must be ({', '.join(axes)}) with {sizes}")
    if len(packed.data) != prod(shape) * dtype.itemsize:
        raise WireError(f"{name} has {len(packed.data):,} bytes, the shape {shape} of {dtype.str} takes others")
    if dtype.kind == "b" and packed.data.strip(b"\0\1"):
        raise WireError(f"{name} has truth values that are neither 0 nor 1")
    return np.frombuffer(packed.data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
