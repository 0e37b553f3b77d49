"""The ASGI layer below Quart: every response that is being sent, who is stalled, and what must be closed when it ends.

server.app wraps the Quart app in `Connections.serve`. It adds x-request-id, writes the access log (never a query, a prompt or
an answer), cuts off a client that stopped reading, and closes a request's streams however the request ends. The cost for
an event is one more call and two assignments; one task looks after all responses.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from server.transport import transport_of

__all__ = ["Connection", "Connections"]

access = logging.getLogger("rillet.access")
log = logging.getLogger("rillet.server")
SANE_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")
KEY = "rillet.connection"
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]


class Connection:
    """One request and its response. `on_end` closers run when it is over, whatever ended it."""

    __slots__ = ("_closers", "_send", "blocked_at", "gone", "request_id", "sender", "status", "unsent")

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send = send
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self.request_id = request_id
        self.gone = False                                # whether the client has left
        self.status = 0
        self.blocked_at: float | None = None             # since when the present send waits
        self.unsent = 0                                  # bytes that waited when the watch last looked
        self.sender: asyncio.Task[Any] | None = None

    @staticmethod
    def of(scope: object) -> "Connection":
        return cast("Connection", cast("dict[str, Any]", scope)[KEY])

    def on_end(self, closer: Callable[[], Awaitable[None]]) -> None:
        self._closers.append(closer)

    def check_there(self) -> None:
        """End the handler if the client has left. Quart cancels it for that, but asyncio.wait_for of Python 3.11 swallows
        a cancellation that comes together with its result: here, with the last bytes of the body."""
        if self.gone:
            raise asyncio.CancelledError("the client has left")

    async def send(self, message: Any) -> None:
        """Pass a message on, and let the watch see for how long it takes."""
        if self.sender is None:
            self.sender = asyncio.current_task()
            self.status = message.get("status", 0)
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", self.request_id)]}
        self.blocked_at = time.monotonic()
        await self._send(message)
        self.blocked_at = None

    def stalled_for(self, now: float) -> float:
        """Seconds for which the client took nothing of what waits for it."""
        if self.blocked_at is None:
            return 0.0
        transport = transport_of(self._send)
        unsent = transport.get_write_buffer_size() if transport is not None else 0
        if unsent < self.unsent:                         # slow, but reading
            self.blocked_at = now
        self.unsent = unsent
        return now - self.blocked_at

    def cut(self) -> None:
        """Drop what waits, close the socket and end the handler: nothing of this request stays."""
        transport = transport_of(self._send)
        if transport is not None:
            transport.abort()
        if self.sender is not None:
            self.sender.cancel()

    async def end(self) -> None:
        for closer in self._closers:
            await closer()


class Connections:
    """All of them. `stall_s`: how long a client may take nothing."""

    def __init__(self, stall_s: float) -> None:
        self.stall_s = stall_s
        self._live: set[Connection] = set()
        self._watch: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._live)

    async def wait_idle(self) -> None:
        """Until no response is being made or sent."""
        await self._idle.wait()

    async def serve(self, app: App, scope: Any, receive: Any, send: Send) -> None:
        """Run one request through the app."""
        begin = time.monotonic()
        connection = Connection(send, _request_id(scope["headers"]))
        scope[KEY] = connection
        self._live.add(connection)
        self._idle.clear()
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_stalls(), name="rillet-stalls")

        async def noticing_receive() -> Any:
            message = await receive()
            connection.gone = connection.gone or message["type"] == "http.disconnect"
            return message

        try:
            await app(scope, noticing_receive, connection.send)
        finally:
            self._live.discard(connection)
            if not self._live:
                self._idle.set()
            await connection.end()
            _log_access(scope, connection, time.monotonic() - begin)

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])

    async def _watch_stalls(self) -> None:
        """Lives while there is any response: looks eight times within the time allowed."""
        while self._live:
            await asyncio.sleep(self.stall_s / 8)
            now = time.monotonic()
            for connection in list(self._live):
                stalled = connection.stalled_for(now)
                if stalled >= self.stall_s:
                    name = connection.request_id.decode()
                    log.warning("%s: the client read nothing for %.0f s, it is cut off", name, stalled)
                    connection.cut()


def _request_id(headers: Any) -> bytes:
    for name, value in headers:
        if name.lower() == b"x-request-id" and SANE_ID.fullmatch(value):
            return bytes(value)
    return b"req-" + secrets.token_hex(12).encode()


def _log_access(scope: Any, connection: Connection, seconds: float) -> None:
    if access.isEnabledFor(logging.INFO):
        client = (scope.get("client") or ("-",))[0]
        path = scope.get("raw_path", b"")[:200].decode("ascii", "replace")       # still percent-encoded: no newlines
        status, request = connection.status or "-", connection.request_id.decode()
        access.info('%s "%s %s" %s %.3fs %s', client, scope["method"], path, status, seconds, request)
