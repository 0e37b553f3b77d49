"""The ASGI app. `create_app` builds one; `app` is what `hypercorn server.app:app` serves, configured by RILLET_* variables.

Importing this module loads nothing and reads no variable: `app` does both when the server starts it. Routes only translate;
the work is in server.chat, server.completions, server.admin.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import Any

from quart import Quart, Response, request
from werkzeug.exceptions import NotFound

from engine import Engine, EngineConfig, RilletError
from server import (
    admin,
    chat,
    completions,
    cors,
    embeddings,
    messages,
    metrics,
    ollama,
    openapi,
    page_routes,
    responses_api,
    tokenizing,
)
from server.addresses import explained
from server.auth import Keys
from server.bodies import Bodies
from server.connections import Connections
from server.errors import answer
from server.host import EngineHost, MakeEngine, leave
from server.runtime_directory import RuntimeDirectory
from server.settings import ServerSettings, configure_logging, settings_from_environment
from server.shared_engine import SharedEngine
from server.transport import Termination, graceful_timeout_s, grant_time, terminated_of, workers_of

__all__ = ["RilletApp", "app", "create_app"]

log = logging.getLogger("rillet.server")
# Each has register(app).
ROUTES = (
    cors, metrics, chat, messages, responses_api, completions, embeddings, ollama, tokenizing, admin, openapi, page_routes,
)  # fmt: skip
FAILED = 1                                               # exit code
FLUSH_S = 5.0                                            # for last events to reach their clients after the drain
LAST_WORDS_S = 2.0                                       # for which the app still answers why the engine failed


class RilletApp(Quart):
    """Quart with the engine's host and the layer of connections below it."""

    def __init__(self, host: EngineHost, settings: ServerSettings) -> None:
        super().__init__("server", static_folder=None)
        self.host = host
        self.settings = settings
        self.connections = Connections(settings.stall_s, Bodies(settings.bodies_bytes, settings.body_bytes))
        self.url_map.merge_slashes = False               # an address with // is unknown, not moved
        self.config["MAX_CONTENT_LENGTH"] = settings.body_bytes
        self.config["BODY_TIMEOUT"] = settings.body_s
        self.config["RESPONSE_TIMEOUT"] = None           # Connections watches; Quart would cut without a word
        self.before_serving(self._start)
        self.after_serving(self._close)

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await self.connections.serve(super().asgi_app, scope, receive, send)
        else:
            await super().asgi_app(scope, receive, send)

    async def _start(self) -> None:
        self.host.start()

    async def _close(self) -> None:
        await self.host.close()
        await self.connections.close()


def create_app(
    config: EngineConfig, settings: ServerSettings | None = None, *, make_engine: MakeEngine | None = None,
    renews: bool = False,
) -> RilletApp:  # fmt: skip
    """An app that loads its engine in the background once it is served. `make_engine` is used instead of the config's own
    engine: it gets a progress callback and returns an engine that was not entered. renews: it is asked for another one when
    that has failed."""
    settings = settings or ServerSettings()
    host = EngineHost(make_engine or (lambda progress: Engine(config, progress=progress)), renews=renews)
    app = RilletApp(host, settings)
    keys = Keys(settings.api_keys)

    @app.before_request
    async def check_key() -> None:
        shown = request.headers
        keys.check(request.method, request.path, shown.get("Authorization"), shown.get("x-api-key"))

    @app.errorhandler(Exception)
    async def tell(error: Exception) -> Response:
        if isinstance(error, NotFound):
            error = explained(app, request.path) or error
        own = next((module for module in (messages, ollama) if module.owns(request.path)), None)
        return answer(error) if own is None else answer(error, own.error_bytes)

    for module in ROUTES:
        module.register(app)
    return app


class _EnvironmentApp:
    """The app of the RILLET_* variables, made at the server's start. It owns what `python -m server` does otherwise: the
    end of the process when the engine fails, and draining when hypercorn was told to end. Where hypercorn runs several
    workers they share an engine process, and none of them ends because of it."""

    def __init__(self) -> None:
        self._app: RilletApp | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._watching = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            workers = workers_of(send)
            try:
                self._app = self._make((workers or 1) > 1)
            except RilletError as error:
                log.error("%s", error)
                if workers is not None:
                    leave(FAILED)                        # hypercorn would tell it with a traceback
                await receive()
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            grant_time(send, self._app.settings.drain_s + FLUSH_S)
        assert self._app is not None, "the server must speak ASGI's lifespan"
        terminated = terminated_of(send)
        if terminated is not None and not self._watching:
            self._watching = True
            drain = self._drain_at(self._app, terminated, graceful_timeout_s(send))
            self._tasks.append(asyncio.create_task(drain, name="rillet-drain"))
        await self._app(scope, receive, send)
        if scope["type"] == "lifespan" and self._app.host.abandoned:
            leave(0)                                     # hypercorn is done; what still loads would hold the process

    def _make(self, shares: bool) -> RilletApp:
        config, settings = settings_from_environment(os.environ)
        configure_logging(settings.log_level)
        for variable, flag in (("RILLET_HOST", "-b"), ("RILLET_PORT", "-b"), ("RILLET_WORKERS", "-w")):
            if variable in os.environ:
                log.warning("%s is for `python -m server`: give hypercorn its own %s", variable, flag)
        shared = SharedEngine(RuntimeDirectory.of_server()) if shares else None
        app = create_app(config, settings, make_engine=None if shared is None else shared.engine, renews=shares)

        @app.before_serving
        async def watch() -> None:
            self._outlive_terminate(app)
            if shared is None:
                self._tasks.append(asyncio.create_task(self._exit_on_failure(app), name="rillet-failure"))

        @app.after_serving
        async def stop() -> None:
            if shared is not None:
                shared.close()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

        return app

    def _outlive_terminate(self, app: RilletApp) -> None:
        """hypercorn tells its workers to end by an event, and leaves them SIGTERM's default, which cuts every answer: whoever
        sends it to the whole process group (systemd, timeout) or to a worker, and hypercorn itself to all workers that still
        drain once the first has ended. A worker that gets it drains; if it alone did, hypercorn starts another. With
        `-w 0` there are no workers, and hypercorn catches the signal itself."""
        if sys.platform != "win32" and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            def end() -> None:
                if not app.host.draining:
                    self._tasks.append(asyncio.create_task(self._end(app), name="rillet-end"))

            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)

    async def _end(self, app: RilletApp) -> None:
        _tell_end(app.settings.drain_s)
        await app.host.drain(app.settings.drain_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(app.connections.wait_idle(), LAST_WORDS_S)
        leave(0)

    async def _exit_on_failure(self, app: RilletApp) -> None:
        """hypercorn's own ways to end have the exit code 0."""
        await app.host.wait_failed()
        await asyncio.sleep(LAST_WORDS_S)
        log.info("the process ends, because the engine failed")
        leave(FAILED)

    async def _drain_at(self, app: RilletApp, terminated: Termination, graceful_s: float | None) -> None:
        """Last events must go out before hypercorn cuts connections."""
        await terminated.wait()
        if app.host.draining:                            # a signal came first
            return
        deadline_s = app.settings.drain_s
        if graceful_s is not None:
            deadline_s = min(deadline_s, max(0.0, graceful_s - 1.0))
        _tell_end(deadline_s)
        await app.host.drain(deadline_s)


def _tell_end(deadline_s: float) -> None:
    log.info("the server ends: running answers have %g s", deadline_s)


app = _EnvironmentApp()
