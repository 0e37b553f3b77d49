"""What engine.remote and engine.remote_service say to each other, as msgspec structs; and how errors cross the wire.

A frame of engine.wire is a list of messages. They are decoded into these types and no others; parameters and errors are made
anew from their fields, by their own constructors, so that what arrives is checked as if a caller had given it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, get_origin

import msgspec
import numpy as np

from engine import errors
from engine.deltas import Delta
from engine.errors import BadModelFile, InvalidRequest, Overloaded, RequestError, RilletError
from engine.metrics import Histogram
from engine.model_facts import ModelFacts
from engine.sampling import SamplingParams
from engine.sequence import Logprob, TokenLogprobs
from engine.text.grammar import Grammar

__all__ = [
    "Admitted", "Call", "Close", "Failed", "Item", "Loading", "Method", "PackedError", "Ready", "Refused", "Returned", "Stop",
    "Taken", "decode_from_client", "decode_from_service", "decode_value", "encode", "frame_of", "pack_delta", "pack_error",
    "pack_logprobs", "pack_params", "unpack_delta", "unpack_error", "unpack_logprobs", "unpack_params",
]  # fmt: skip

Method = Literal["stream", "embed", "tokenize", "infill", "apply_chat_template", "look"]
PackedLogprobs = tuple[int, float, tuple[tuple[int, float], ...]]        # token, its logprob, the most probable ones


class PackedError(msgspec.Struct, array_like=True):
    kind: str                                            # a class of engine.errors, or "" for any other
    message: str
    fields: dict[str, str | float | None]


class PackedDelta(msgspec.Struct, array_like=True):
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PackedLogprobs] | None
    finish_reason: str | None
    stop_reason: str | int | None
    last: bool                                           # of its request: it has the usage


# ---- from a client ----------------------------------------------------------------------------------------------------


class Call(msgspec.Struct, array_like=True, tag=1):
    """Call a method of the engine. `number` names the call, and for "stream" the stream, as long as the connection lives."""

    number: int
    method: Method
    arguments: dict[str, Any]


class Stop(msgspec.Struct, array_like=True, tag=2):
    """Cancel a stream; its last deltas are still wanted."""

    number: int


class Close(msgspec.Struct, array_like=True, tag=3):
    """Drop a call or a stream: nothing more of it is wanted."""

    number: int


class Taken(msgspec.Struct, array_like=True, tag=4):
    """So many items of a stream were read, as many more may come."""

    number: int
    items: int


# ---- from the service -------------------------------------------------------------------------------------------------


class Loading(msgspec.Struct, array_like=True, tag=1):
    what: str
    done: int
    total: int


class Ready(msgspec.Struct, array_like=True, tag=2):
    """What does not change while an engine lives."""

    model_name: str
    model_names: tuple[str, ...]
    context_length: int
    max_num_seqs: int
    device: str
    has_chat_template: bool
    model_facts: ModelFacts
    sampling_defaults: dict[str, int | float]
    dialect: tuple[str | None, str | None, str | None]   # source of the chat template, names of tools and reasoning
    pieces: tuple[bytes, ...]
    special_ids: frozenset[int]
    bos_id: int | None
    drops_first_space: bool


class Failed(msgspec.Struct, array_like=True, tag=3):
    """Loading failed, or the engine is dead."""

    error: PackedError


class Returned(msgspec.Struct, array_like=True, tag=4):
    number: int
    value: msgspec.Raw


class Refused(msgspec.Struct, array_like=True, tag=5):
    number: int
    error: PackedError


class Admitted(msgspec.Struct, array_like=True, tag=6):
    number: int
    prompt: tuple[int, ...]


class Item(msgspec.Struct, array_like=True, tag=7):
    """What is new of a stream; the client may have a few that it did not say to be Taken, not more."""

    number: int
    completion_tokens: int
    cached_tokens: int
    deltas: list[PackedDelta]
    prompt_logprobs: list[PackedLogprobs] | None = None
    ended: bool = False
    error: PackedError | None = None


FromClient = Call | Stop | Close | Taken
FromService = Loading | Ready | Failed | Returned | Refused | Admitted | Item


# ---- bytes ------------------------------------------------------------------------------------------------------------


def _encodable(value: Any) -> Any:
    match value:
        case Histogram():
            return (value.bounds, value.counts, value.total)
        case np.ndarray():
            return value.tolist() if value.dtype.kind in "iub" else value.astype(np.float32).tobytes()
        case np.generic():
            return value.item()
        case Mapping():
            return dict(value)
    raise InvalidRequest(f"{repr(value)[:40]} cannot be sent to the engine: give texts, numbers, lists and dicts")


def _decoded(kind: Any, value: Any) -> Any:
    if kind is Histogram:
        histogram = Histogram(tuple(value[0]))
        histogram.counts, histogram.total = value[1], value[2]
        return histogram
    if get_origin(kind) is Counter:
        return Counter(value)
    if get_origin(kind) is np.ndarray:
        return np.frombuffer(value, np.float32)
    raise TypeError(f"nothing is known of {kind}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encodable)
decode_from_client = msgspec.msgpack.Decoder(list[FromClient]).decode
decode_from_service = msgspec.msgpack.Decoder(list[FromService]).decode


def encode(message: object) -> bytes:
    """One message or value. InvalidRequest for what has no place in one; halves of surrogate pairs become U+FFFD."""
    try:
        return _encoder.encode(message)
    except UnicodeEncodeError:
        return _encoder.encode(_whole_texts(msgspec.to_builtins(message, enc_hook=_encodable, builtin_types=(bytes,))))
    except (TypeError, OverflowError, RecursionError) as error:
        raise InvalidRequest(f"the request cannot be sent to the engine: {error}") from None


def frame_of(messages: list[bytes]) -> bytes:
    """Encoded messages as the one list that a frame is."""
    return b"\xdd" + len(messages).to_bytes(4, "big") + b"".join(messages)


def decode_value(data: bytes | msgspec.Raw, kind: Any) -> Any:
    return msgspec.msgpack.decode(data, type=kind, dec_hook=_decoded)


def _whole_texts(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case list() | tuple():
            return [_whole_texts(item) for item in value]
        case dict():
            return {_whole_texts(key): _whole_texts(item) for key, item in value.items()}
    return value


# ---- parameters, errors, deltas ---------------------------------------------------------------------------------------


def pack_params(params: SamplingParams) -> dict[str, Any]:
    """The fields that were said."""
    said = {field.name: getattr(params, field.name) for field in fields(params)}
    return {name: value for name, value in said.items() if value is not None and value != ()}


def unpack_params(said: dict[str, Any]) -> SamplingParams:
    """Raises what SamplingParams raises."""
    if "grammar" in said:
        said["grammar"] = msgspec.convert(said["grammar"], Grammar)
    return SamplingParams(**said)


FIELDS: tuple[tuple[type[RilletError], tuple[str, ...]], ...] = (
    (RequestError, ("field",)),
    (Overloaded, ("retry_after_s",)),
    (BadModelFile, ("file", "tensor")),
)


def pack_error(error: BaseException) -> PackedError:
    known = isinstance(error, RilletError) and type(error).__name__ in errors.__all__
    kind, message = type(error).__name__, str(error)
    names = [name for base, names in FIELDS if isinstance(error, base) for name in names]
    sayable = (message if known else f"{kind}: {message}").encode("utf-8", "replace").decode()
    return PackedError(kind if known else "", sayable, {name: getattr(error, name) for name in names})


def unpack_error(packed: PackedError) -> Exception:
    """The same class with the same words and fields; RuntimeError for what was no RilletError."""
    if packed.kind not in errors.__all__:
        return RuntimeError(f"a fault in the engine process: {packed.message}")
    kind: type[RilletError] = getattr(errors, packed.kind)
    error = kind.__new__(kind)
    error.args = (packed.message,)
    for name in [name for base, names in FIELDS if issubclass(kind, base) for name in names]:
        setattr(error, name, packed.fields.get(name))
    return error


def pack_logprobs(logprobs: list[TokenLogprobs]) -> list[PackedLogprobs]:
    return [
        (each.token_id, each.logprob, tuple([(top.token_id, top.logprob) for top in each.top])) for each in logprobs
    ]


def unpack_logprobs(packed: list[PackedLogprobs]) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(token, logprob, tuple([Logprob(*each) for each in top])) for token, logprob, top in packed
    ]


def pack_delta(delta: Delta) -> PackedDelta:
    logprobs = None if delta.logprobs is None else pack_logprobs(delta.logprobs)
    return PackedDelta(
        delta.index, delta.text, delta.token_ids, logprobs, delta.finish_reason, delta.stop_reason, delta.usage is not None
    )


def unpack_delta(packed: PackedDelta) -> Delta:
    logprobs = None if packed.logprobs is None else unpack_logprobs(packed.logprobs)
    return Delta(packed.index, packed.text, packed.token_ids, logprobs, packed.finish_reason, packed.stop_reason)
