"""`python -m server.worker LISTENER NEWS DIRECTORY [first]`: one of several workers, over the engine process of all.

server.supervisor starts it with the server's RILLET_* variables, two open descriptors (the listening socket, and a pipe for
the line with the address), and a standard input that ends with the supervisor: then this process drains and ends as well.
`first`: nobody has served yet, so a model that cannot be loaded ends it with NO_MODEL instead of being tried again.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from engine import RilletError
from server.__main__ import Process
from server.app import RilletApp, create_app
from server.host import leave
from server.runtime_directory import RuntimeDirectory
from server.settings import configure_logging, settings_from_environment
from server.shared_engine import SharedEngine
from server.supervisor import FAILED, NO_MODEL

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal or the supervisor's end; the exit code."""
    listener, news, path, *first = sys.argv[1:] if arguments is None else arguments
    try:
        config, settings = settings_from_environment(os.environ)
        configure_logging(settings.log_level)
        shared = SharedEngine(RuntimeDirectory(Path(path)))
    except RilletError as error:
        sys.stderr.write(f"rillet: {error}\n")
        return FAILED
    app = create_app(config, settings, make_engine=shared.engine, renews=True)

    @app.after_serving
    async def close() -> None:
        shared.close()

    threading.Thread(target=_watch_supervisor, name="rillet-supervisor", daemon=True).start()
    return asyncio.run(_serve(app, socket.socket(fileno=int(listener)), int(news), shared if first else None))


async def _serve(app: RilletApp, listener: socket.socket, news: int, first: SharedEngine | None) -> int:
    def say(line: str) -> None:
        with contextlib.suppress(OSError):               # the supervisor is gone
            os.write(news, line.encode() + b"\n")

    giving_up = asyncio.create_task(_give_up(app, first)) if first is not None else None
    code = await Process(app, listener, say).run()
    if giving_up is not None:
        giving_up.cancel()
    return code


async def _give_up(app: RilletApp, shared: SharedEngine) -> None:
    """End at once if the model cannot be loaded: the log has said why."""
    await app.host.wait_settled()
    if app.host.failure is not None and app.host.opened is None:
        shared.close()
        leave(NO_MODEL)


def _watch_supervisor() -> None:
    """On a thread: nothing is ever written to the standard input, but it ends with the supervisor, however that dies."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
