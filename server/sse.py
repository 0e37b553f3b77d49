"""Deltas -> Server-Sent Events. server.chat and server.completions give a format, this gives bytes to Quart.

An event is one line of JSON and a blank line; everything that stays the same in a stream's chunks is encoded once. What
waits when the socket is free goes out in one write. A silent stream gets a comment now and then, an error becomes an event.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol

import msgspec
from quart import Response

from engine import Delta, RilletError, Usage
from server.answers import Answers
from server.errors import body
from server.responses import usage_body

__all__ = ["Envelope", "Format", "json_text", "sse_response"]

log = logging.getLogger("rillet.server")
KEEPALIVE = b": keepalive\n\n"
DONE = b"data: [DONE]\n\n"
WRITE_BYTES = 1 << 16                                    # events are joined into writes of about this size at most
encode = msgspec.json.Encoder().encode


def json_text(text: str) -> bytes:
    """A JSON string without any character at which some client splits lines (NEL, LS, PS; JSON escapes the others)."""
    data = encode(text)
    if text.isascii():
        return data
    return data.replace(b"\xc2\x85", b"\\u0085").replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")


class Envelope:
    """What is around the choices of every chunk of one stream."""

    def __init__(
        self, *, answer_id: str, kind: str, created: int, model: str, fingerprint: str, with_usage: bool
    ) -> None:  # fmt: skip
        fixed = {"id": answer_id, "object": kind, "created": created, "model": model, "system_fingerprint": fingerprint}
        self.head = b"data: " + encode(fixed)[:-1] + b',"choices":['
        self.tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        self.with_usage = with_usage

    def event(self, choice: bytes) -> bytes:
        return self.head + choice + self.tail

    def usage(self, usage: Usage) -> bytes:
        """The one chunk of usage, with no choices."""
        return self.head + b'],"usage":' + encode(usage_body(usage)) + b"}\n\n"


class Format(Protocol):
    """How one request's deltas become events."""

    @property
    def envelope(self) -> Envelope: ...

    def events(self, delta: Delta) -> bytes:
        """No, one or several events."""
        ...


def sse_response(answers: Answers, shape: Format, heartbeat_s: float) -> Response:
    response = Response(_events(answers, shape, heartbeat_s), content_type="text/event-stream")
    response.timeout = None                              # Quart would cut the stream after 60 s without a word
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    return response


async def _events(answers: Answers, shape: Format, heartbeat_s: float) -> AsyncIterator[bytes]:
    try:
        while True:
            try:
                delta = await _next(answers, heartbeat_s)
            except TimeoutError:
                yield KEEPALIVE
                continue
            if delta is None:
                break
            data = shape.events(delta)
            while answers.ready and len(data) < WRITE_BYTES and delta is not None:
                delta = await anext(answers, None)
                if delta is not None:
                    data += shape.events(delta)
            if data:
                yield data
            if delta is None:
                break
        if shape.envelope.with_usage:
            yield shape.envelope.usage(answers.usage)
    except Exception as error:                           # the status line is gone: an event must tell it
        if not isinstance(error, RilletError):
            log.error("a stream failed by a fault of the server: %s", type(error).__name__, exc_info=error)
        yield b"data: " + body(error) + b"\n\n"
    yield DONE


async def _next(answers: Answers, heartbeat_s: float) -> Delta | None:
    """The next delta, or None at the end; TimeoutError if nothing came for heartbeat_s (nothing is lost then)."""
    if answers.ready:
        return await anext(answers, None)
    async with asyncio.timeout(heartbeat_s):
        return await anext(answers, None)
