"""`python -m server` and `rillet serve`: hypercorn in this process, with an orderly end and an exit code that tells.

With --workers above 1, server.supervisor runs as many such processes (server.worker). 0 after a drain that was asked for;
1 when the model could not be loaded, the port is taken or the engine died; 2 for a wrong flag; 3 when workers die as fast
as they are started. One line with the address goes to stdout when the model is ready, one sentence to stderr when something
failed.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from hypercorn.asyncio import serve
from hypercorn.config import Config

from engine import ConfigError
from server.app import RilletApp, create_app
from server.host import leave
from server.settings import ServerSettings, configure_logging, settings_from_flags, variables_of
from server.supervisor import CLOSE_S, FLUSH_S, Supervisor, check_platform

__all__ = ["Process", "main", "run"]

LOADING_CLOSE_S = 1.0                                    # and where there is no engine yet
FAILED, WRONG_FLAG, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        config, settings = settings_from_flags(given, os.environ, "python -m server")
        check_platform(settings.workers)
    except ConfigError as error:
        print(f"rillet: {error}", file=sys.stderr)
        return WRONG_FLAG
    try:
        listener = _listen(settings)
    except OSError as error:
        where, why = f"{settings.host}:{settings.port}", error.strerror or error
        print(f"rillet: cannot listen on {where}: {why}: choose another --host or --port", file=sys.stderr)
        return FAILED
    configure_logging(settings.log_level)
    if settings.workers > 1:
        with listener:
            return _supervise(Supervisor(settings, variables_of(config, settings), listener, _say))
    return run(create_app(config, settings), listener)


def _supervise(supervisor: Supervisor) -> int:
    try:
        code = asyncio.run(supervisor.run())
    except ConfigError as error:                         # no runtime directory
        print(f"rillet: {error}", file=sys.stderr)
        return FAILED
    if supervisor.failure is not None:
        print(f"rillet: {supervisor.failure}", file=sys.stderr, flush=True)
    return code


def _say(line: str) -> None:
    print(line, flush=True)


def run(app: RilletApp, listener: socket.socket) -> int:
    """Serve an app on a bound socket until a signal or its engine's failure; the exit code."""

    async def process() -> int:
        return await Process(app, listener).run()

    return asyncio.run(process())


def _listen(settings: ServerSettings) -> socket.socket:
    """The socket, bound before the model loads, so that a taken port is told at once."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    if os.name != "nt":                                  # there it would let two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _hypercorn_config(listener: socket.socket) -> Config:
    config = Config.from_object("server.hypercorn_config")
    config.workers = 1                                   # means nothing here, but 0 would warn
    config.loglevel = "WARNING"
    config.bind = [f"fd://{listener.detach()}"]
    config.graceful_timeout = FLUSH_S                    # we drained already
    return config


class Process:
    """One run of the server, from its start to its exit code. `say` gets the line with the address."""

    def __init__(self, app: RilletApp, listener: socket.socket, say: Callable[[str], None] = _say) -> None:
        self.app = app
        self._say = say
        host, port = listener.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._listener = listener
        self._asked_to_end = asyncio.Event()
        self._interrupts = 0

    async def run(self) -> int:
        self._catch_signals()
        ending = asyncio.Event()
        serving = asyncio.create_task(
            serve(self.app, _hypercorn_config(self._listener), shutdown_trigger=ending.wait)
        )
        code = await self._until_end(serving)
        ending.set()
        loading = self.app.host.state != "failed" and self.app.host.opened is None
        await asyncio.wait([serving], timeout=LOADING_CLOSE_S if loading else CLOSE_S)
        if not serving.done() or self.app.host.abandoned:
            leave(code)                                  # a connection that never ends, or what loads, must not keep us
        if (error := serving.exception()) is not None:
            print(f"rillet: the server failed: {type(error).__name__}: {error}", file=sys.stderr)
            return FAILED
        return code

    async def _until_end(self, serving: asyncio.Task[None]) -> int:
        """Until a signal (then drain), or until something failed."""
        host = self.app.host
        announced = asyncio.create_task(self._announce())
        asked = asyncio.create_task(self._asked_to_end.wait())
        failed = asyncio.create_task(host.wait_failed())
        try:
            await asyncio.wait([asked, failed, serving], return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                await self._flush()                      # the host has logged why
                return FAILED
            if serving.done():
                return FAILED
            await self._drain(failed)
            return 0 if host.failure is None else FAILED
        finally:
            for task in (announced, asked, failed):
                task.cancel()
            await asyncio.wait([announced, asked, failed])

    async def _announce(self) -> None:
        host = self.app.host
        await host.wait_settled()
        if host.failure is None and host.state == "ready":
            engine = host.engine
            self._say(f"Rillet serves {engine.model_name} at {self.url}/v1 on {engine.device}")

    async def _drain(self, failed: "asyncio.Task[Exception]") -> None:
        if open_answers := len(self.app.connections):
            answers = "1 answer" if open_answers == 1 else f"{open_answers} answers"
            print(
                f"rillet: ending; {answers} may go on for {self.app.settings.drain_s:g} s, Ctrl-C ends at once",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        drain = asyncio.create_task(self.app.host.drain(self.app.settings.drain_s))
        await asyncio.wait([drain, failed], return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        await asyncio.wait([drain])
        await self._flush()

    async def _flush(self) -> None:
        """Every stream has ended: let the last events go out."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.app.connections.wait_idle(), FLUSH_S)

    # ---- signals ----------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for name in ("SIGTERM", "SIGINT", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None:
                continue
            try:
                loop.add_signal_handler(number, self._on_signal, name)
            except NotImplementedError:                  # Windows
                signal.signal(number, self._from_handler(loop, name))

    def _from_handler(self, loop: asyncio.AbstractEventLoop, name: str) -> Callable[[int, object], None]:
        def handler(number: int, frame: object) -> None:
            loop.call_soon_threadsafe(self._on_signal, name)

        return handler

    def _on_signal(self, name: str) -> None:
        if name == "SIGINT":
            self._interrupts += 1
            if self._interrupts > 1:
                leave(INTERRUPTED)
        self._asked_to_end.set()


if __name__ == "__main__":
    sys.exit(main())
