"""The one place that knows how hypercorn is built: what lies behind an ASGI `send`.

server.connections asks it for the socket's transport (to cut off a client that reads nothing); server.app for the event of
the server's end (to drain before connections are cut), for how long it then waits, and for the number of workers. Under
another server, or if this one changes, every answer is None: then a stalled answer is cancelled but its socket lives until
the client goes, draining starts with the lifespan's end, and each worker has an engine of its own.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import h11
from hypercorn.config import Config

from server import hypercorn_config

__all__ = [
    "Termination", "graceful_timeout_s", "grant_time", "release_reader", "terminated_of", "transport_of", "workers_of",
]  # fmt: skip

UNSAID = (Config.graceful_timeout, hypercorn_config.graceful_timeout)    # graceful timeouts that no operator has chosen


class Termination(Protocol):
    """hypercorn's event that is set when a signal ends the server, before connections are cut."""

    def wait(self) -> Coroutine[Any, Any, None]: ...


def _owner(method: Any) -> Any:
    return getattr(method, "__self__", None)


def transport_of(send: Callable[..., Any]) -> asyncio.WriteTransport | None:
    """The transport that `send` writes to: HTTPStream.send -> H11Protocol.send -> TCPServer.writer."""
    connection = _owner(getattr(_owner(getattr(_owner(send), "send", None)), "send", None))
    transport = getattr(getattr(connection, "writer", None), "transport", None)
    return transport if isinstance(transport, asyncio.WriteTransport) else None


async def release_reader(send: Callable[..., Any]) -> None:
    """Let hypercorn's reader of a closed connection end. A client that sends its next request early and leaves during the
    answer makes it wait for ever for its turn; a parser with nothing in it lets it see the connection's end."""
    transport, protocol = transport_of(send), _owner(getattr(_owner(send), "send", None))
    if transport is not None and transport.is_closing() and isinstance(getattr(protocol, "connection", None), h11.Connection):
        protocol.connection = h11.Connection(h11.SERVER)
        await protocol.can_read.set()


def terminated_of(send: Callable[..., Any]) -> Termination | None:
    """The event that the server sets when it begins to end."""
    terminated = getattr(getattr(_owner(send), "context", None), "terminated", None)
    return terminated if asyncio.iscoroutinefunction(getattr(terminated, "wait", None)) else None


def graceful_timeout_s(send: Callable[..., Any]) -> float | None:
    """How long the server lets answers go on after that."""
    timeout = getattr(getattr(_owner(send), "config", None), "graceful_timeout", None)
    return float(timeout) if isinstance(timeout, (int, float)) else None


def grant_time(send: Callable[..., Any], seconds: float) -> None:
    """Let the server wait so long for answers after its end has begun, unless somebody told it how long. `send` is the
    lifespan's: hypercorn looks at its settings again when it ends."""
    config = getattr(_owner(send), "config", None)
    if isinstance(config, Config) and config.graceful_timeout in UNSAID:
        config.graceful_timeout = max(config.graceful_timeout, seconds)


def workers_of(send: Callable[..., Any]) -> int | None:
    """How many workers the server runs; `send` is the lifespan's."""
    workers = getattr(getattr(_owner(send), "config", None), "workers", None)
    return workers if isinstance(workers, int) else None
