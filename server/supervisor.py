"""Supervisor: what `--workers 4` runs. It starts the workers on one listening socket, puts another in the place of one that
dies, and ends them all together. server.__main__ makes it; it has no model and answers no request.

Every worker is a `python -m server.worker`, all of them share one engine process (server.shared_engine), which outlives each
of them. A worker ends by itself when the supervisor is gone: its standard input is a pipe whose other end is held only here.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from engine import ConfigError
from server.host import leave
from server.runtime_directory import RuntimeDirectory
from server.settings import ServerSettings

__all__ = ["CLOSE_S", "FAILED", "FLUSH_S", "NO_MODEL", "Supervisor", "check_platform"]

log = logging.getLogger("rillet.server")
COMMAND = (sys.executable, "-m", "server.worker")
FAILED, WORKERS_DIE, NO_MODEL, INTERRUPTED = 1, 3, 4, 130    # exit codes; NO_MODEL is a worker's
FLUSH_S = 5.0                                            # for a worker's last events to reach their clients after the drain
CLOSE_S = 10.0                                           # for its hypercorn and engine to end after that
KILL_S = 5.0                                             # beyond both, after which a worker that still ends is killed
EARLY_S = 10.0                                           # a worker that dies sooner may not be able to live at all
MOST_EARLY_ENDS = 5
FIRST_PAUSE_S = 0.1                                      # before another one is started; doubled with each early end


def check_platform(workers: int) -> None:
    """Raises ConfigError where a process cannot inherit a listening socket."""
    if workers > 1 and sys.platform == "win32":
        cure = f"`hypercorn -w {workers} -c python:server.hypercorn_config server.app:app`"
        raise ConfigError(f"--workers must be 1 on Windows, not {workers}: use {cure}")


class Supervisor:
    """`variables` are the RILLET_* ones of the workers and their engine, `say` gets the line with the address. `failure` is a
    sentence if the server did not end because it was asked to."""

    def __init__(
        self, settings: ServerSettings, variables: Mapping[str, str], listener: socket.socket, say: Callable[[str], None]
    ) -> None:
        self.failure: str | None = None
        self._settings = settings
        others = {name: text for name, text in os.environ.items() if not name.startswith("RILLET_")}
        self._environ = {**others, **variables}
        self._listener = listener
        self._say = say
        self._served = 0                                 # workers that were ready, with those in place of others
        self._code = 0
        self._ending = asyncio.Event()
        self._running: set[asyncio.subprocess.Process] = set()
        self._interrupts = 0

    async def run(self) -> int:
        """Until a signal, or until workers cannot live; the exit code. ConfigError if there is no runtime directory."""
        self._directory = RuntimeDirectory.new()
        self._listener.listen()                          # a client that comes while no worker is there waits for one
        self._catch_signals()
        with self._pipes():
            workers = [asyncio.create_task(self._keep_one()) for _ in range(self._settings.workers)]
            await self._ending.wait()
            self._signal(signal.SIGTERM)
            _, late = await asyncio.wait(workers, timeout=self._settings.drain_s + FLUSH_S + CLOSE_S + KILL_S)
            if late:
                log.error("%d workers do not end: they are killed", len(late))
                self._kill()
            await asyncio.gather(*workers)
        return self._code

    @contextlib.contextmanager
    def _pipes(self) -> Iterator[None]:
        """One that ends with this process, one for what the workers say."""
        self._life, life_end = os.pipe()
        news, self._news = os.pipe()
        loop = asyncio.get_running_loop()
        loop.add_reader(news, self._hear, news)
        try:
            yield
        finally:
            loop.remove_reader(news)
            for descriptor in (self._life, life_end, news, self._news):
                os.close(descriptor)

    def _hear(self, news: int) -> None:
        """Each worker that is ready tells the same address; it is passed on when all are."""
        for line in os.read(news, 4096).decode().splitlines():
            self._served += 1
            if self._served == self._settings.workers:
                self._say(f"{line}, {self._served} workers")

    # ---- one worker -------------------------------------------------------------------------------------------------

    async def _keep_one(self) -> None:
        """One worker after the other, until the end."""
        early = 0
        while not self._ending.is_set():
            started = time.monotonic()
            code = await self._run_one()
            if code == NO_MODEL and not self._served:
                self._fail(FAILED, "the model could not be loaded: the log tells why")
                return
            if self._ending.is_set():
                if code not in (0, -signal.SIGTERM, -signal.SIGINT):     # by the signal itself: it was not yet up
                    self._code = self._code or (code if code > 0 else FAILED)
                return
            early = early + 1 if time.monotonic() - started < EARLY_S else 0
            how = f"by signal {-code}" if code < 0 else f"with code {code}"
            if early == MOST_EARLY_ENDS:
                why = f"a worker ended {early} times within {EARLY_S:.0f} s of its start, at last {how}"
                self._fail(WORKERS_DIE, f"{why}: the log may tell why")
                return
            log.warning("a worker ended %s: another one is started", how)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), FIRST_PAUSE_S * 2**early)

    async def _run_one(self) -> int:
        """From a worker's start to its exit code."""
        listener = self._listener.fileno()
        arguments = [str(listener), str(self._news), str(self._directory.path), *([] if self._served else ["first"])]
        try:
            process = await asyncio.create_subprocess_exec(
                *COMMAND, *arguments, stdin=self._life, pass_fds=(listener, self._news), env=self._environ
            )
        except OSError as error:                         # no memory, no descriptors, too many processes
            log.error("no worker can be started: %s", error)
            return FAILED
        self._running.add(process)
        if self._ending.is_set():
            process.terminate()
        try:
            return await process.wait()
        finally:
            self._running.discard(process)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _fail(self, code: int, sentence: str) -> None:
        if not self._ending.is_set():
            self._code, self.failure = code, sentence
            self._ending.set()

    def _signal(self, number: signal.Signals) -> None:
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._ending.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)

    def _kill(self) -> None:
        if sys.platform != "win32":
            self._signal(signal.SIGKILL)

    def _interrupt(self) -> None:
        """Ctrl-C reaches the workers too; the second one ends all at once."""
        self._interrupts += 1
        self._ending.set()
        if self._interrupts > 1:
            self._kill()
            leave(INTERRUPTED)
