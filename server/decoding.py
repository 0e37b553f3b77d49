"""A body's bytes -> a checked request struct of server.protocol. server.asking calls it for both routes.

Whatever bytes come, the outcome is a request or an InvalidRequest that names the field where one is at fault; never another
error, and nothing of the body but names and numbers is told back.
"""

import asyncio
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from engine import InvalidRequest
from server.misspelt import refuse_misspelt
from server.protocol import Body
from server.unsupported import refuse_unsupported

__all__ = ["R", "decode", "json_object", "read_body", "shaped"]

LARGE_BYTES = 1 << 16                                    # about 0.2 ms of decoding
THREADS = 2
MAX_DIAGNOSED_BYTES = 1 << 20
_workers = ThreadPoolExecutor(THREADS, thread_name_prefix="rillet-decode")       # starts none before it is used
R = TypeVar("R", bound=Body)
S = TypeVar("S", bound=msgspec.Struct)


async def read_body(data: bytes, kind: type[R]) -> R:
    """decode(), off the loop where it may take long; at most THREADS such bodies at once."""
    if len(data) <= LARGE_BYTES:
        return decode(data, kind)
    return await asyncio.get_running_loop().run_in_executor(_workers, decode, data, kind)


def decode(data: bytes, kind: type[R]) -> R:
    """The request in a body. Raises InvalidRequest naming the field where one is at fault."""
    raw = json_object(data)
    refuse_unsupported(raw, kind.UNSUPPORTED, kind.CURES)
    refuse_misspelt(raw, kind.__struct_encode_fields__, kind.UNSUPPORTED)
    request = shaped(raw, kind)
    request.check()
    return request


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a body."""
    try:
        raw = msgspec.json.decode(data)
    except RecursionError:
        raise InvalidRequest("the body is nested too deep: flatten it") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8 (byte {error.start}): encode it so") from None
    except msgspec.MsgspecError as error:
        raise _malformed(data, str(error)) from None
    if not isinstance(raw, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(raw).__name__}")
    return raw


def shaped(raw: dict[str, Any], kind: type[S]) -> S:
    """The struct `kind` with the values of `raw`; InvalidRequest names the first field that does not fit."""
    try:
        return msgspec.convert(raw, kind)
    except RecursionError:
        raise InvalidRequest("the body is nested too deep: flatten it") from None
    except msgspec.ValidationError as error:
        raise _mistyped(str(error)) from None


def _mistyped(message: str) -> InvalidRequest:
    """`Expected `int | null`, got `str` - at `$.n`` -> n: expected ..., field n."""
    what, _, path = message.partition(" - at `$")
    field = re.sub(r"\[\.\.\.\]", "", path.rstrip("`")).lstrip(".") or None
    if missing := re.search(r"missing required field `(\w+)`", what):
        field = f"{field}.{missing[1]}" if field else missing[1]
        return InvalidRequest(f"{field} is missing", field=field)
    return InvalidRequest(f"{field or 'the body'}: {what[:1].lower()}{what[1:]}", field=field)


def _malformed(data: bytes, why: str) -> InvalidRequest:
    """Name the field if it is only a number that JSON does not have: NaN, Infinity, 1e999, or one with 5,000 digits."""
    if len(data) <= MAX_DIAGNOSED_BYTES:
        try:
            lax = json.loads(data, parse_int=_wide_int)
        except (ValueError, RecursionError):
            lax = None
        for field, value in lax.items() if isinstance(lax, dict) else ():
            if isinstance(value, float) and not math.isfinite(value):
                return InvalidRequest(f"{field[:64]} must be a finite number", field=field[:64])
    return InvalidRequest(f"the body is no JSON that can be read: {why[:200]}")


def _wide_int(text: str) -> int | float:
    return int(text) if len(text) <= 40 else math.inf
