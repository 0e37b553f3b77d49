"""The ASGI layer below Quart: every response that is being sent, who is stalled, and what must be closed when it ends.

server.app wraps the Quart app in `Connections.serve`. It adds x-request-id, counts, writes the access log (never a query, a
prompt or an answer), lets large bodies in by turns, cuts off a client that stopped reading, and closes a request's streams
however the request ends. The cost for an event is one more call and two assignments; one task looks after all responses.
"""

import asyncio
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, cast

from server.bodies import SMALL_BYTES, Bodies
from server.transport import release_reader, transport_of

__all__ = ["Connection", "Connections"]

access = logging.getLogger("rillet.access")
log = logging.getLogger("rillet.server")
SANE_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")
KEY = "rillet.connection"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
WATCHED = frozenset({"/metrics", "/health", "/ready"})    # by the page, by Prometheus, by who keeps servers alive
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]


class Connection:
    """One request and its response. `on_end` closers run when it is over, whatever ended it."""

    __slots__ = (
        "_bodies", "_closers", "_send", "blocked_at", "body_bytes", "gone", "held_bytes", "request_id", "route", "sender",
        "status", "unread", "unsent",
    )  # fmt: skip

    def __init__(self, send: Send, request_id: bytes, bodies: Bodies) -> None:
        self._send = send
        self._bodies = bodies
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self.request_id = request_id
        self.gone = False                                # whether the client has left
        self.route = "none"                              # the rule of the address, once it is known
        self.body_bytes = 0                              # that have come
        self.held_bytes = 0                              # of the place for its body
        self.unread = False                              # whether more of its body may come
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

    async def take_place(self, scope: Any, size: int) -> None:
        """`size` more bytes of the body have come: if it is a large one, wait until there is room for all of it."""
        self.body_bytes += size
        if self.body_bytes > SMALL_BYTES and not self.held_bytes and not self.status:
            wanted = self._bodies.size_of(dict(scope["headers"]).get(b"content-length"))
            await self._bodies.take(wanted)
            self.held_bytes = wanted

    def leave_place(self) -> None:
        """The body is no longer kept."""
        self._bodies.free(self.held_bytes)
        self.held_bytes = 0

    async def send(self, message: Any) -> None:
        """Pass a message on, and let the watch see for how long it takes."""
        if self.sender is None:
            self.sender = asyncio.current_task()
            self.status = message.get("status", 0)
            self.leave_place()                           # it answers, so it has read
            more = [(b"x-request-id", self.request_id)]
            if self.unread:                              # hypercorn closes it after the answer: the client must know
                more.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", ()), *more]}
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
    """All of them. `stall_s`: how long a client may take nothing; `bodies`: the places for what clients send."""

    def __init__(self, stall_s: float, bodies: Bodies) -> None:
        self.stall_s = stall_s
        self.bodies = bodies
        self.answered: Counter[tuple[str, str, str]] = Counter()         # method, route, class of the status
        self.stalled_total = 0
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
        connection = Connection(send, _request_id(scope["headers"]), self.bodies)
        connection.unread = _has_body(scope)
        scope[KEY] = connection
        scope["path"] = scope["path"] or "/"             # of `GET ?x HTTP/1.1`, at which Quart would fail
        self._live.add(connection)
        self._idle.clear()
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_stalls(), name="rillet-stalls")

        async def noticing_receive() -> Any:
            message = await receive()
            if message["type"] == "http.disconnect":
                connection.gone = True
            else:
                connection.unread &= message.get("more_body", False)
                await connection.take_place(scope, len(message.get("body", b"")))
            return message

        try:
            await app(scope, noticing_receive, connection.send)
        finally:
            connection.leave_place()
            await release_reader(send)
            self._live.discard(connection)
            if not self._live:
                self._idle.set()
            await connection.end()
            self._count(scope["method"], connection)
            _log_access(scope, connection, time.monotonic() - begin)

    def _count(self, method: str, connection: Connection) -> None:
        """Labels that no client can make many of."""
        status = f"{connection.status // 100}xx" if connection.status else "left"
        self.answered[method if method in METHODS else "other", connection.route, status] += 1

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
                    self.stalled_total += 1
                    log.warning("%s: the client read nothing for %.0f s, it is cut off", name, stalled)
                    connection.cut()


def _has_body(scope: Any) -> bool:
    """Of HTTP/1; a later one has no use for it."""
    return scope["http_version"].startswith("1") and any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in scope["headers"]
    )


def _request_id(headers: Any) -> bytes:
    for name, value in headers:
        if name.lower() == b"x-request-id" and SANE_ID.fullmatch(value):
            return bytes(value)
    return b"req-" + secrets.token_hex(12).encode()


def _log_access(scope: Any, connection: Connection, seconds: float) -> None:
    """What asks every few seconds how the server is must not bury the rest."""
    level = logging.DEBUG if connection.route in WATCHED else logging.INFO
    if access.isEnabledFor(level):
        client = (scope.get("client") or ("-",))[0]
        path = scope.get("raw_path", b"")[:200].decode("ascii", "replace")       # still percent-encoded: no newlines
        status, request = connection.status or "-", connection.request_id.decode()
        access.log(level, '%s "%s %s" %s %.3fs %s', client, scope["method"], path, status, seconds, request)
