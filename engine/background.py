"""Host: an async engine on an event loop and a thread of its own, for callers that block; and how it ends with the process.

engine.synchronous is the only caller. Methods may be called from any thread but the host's own.
"""

import asyncio
import atexit
import concurrent.futures.thread  # noqa: F401 (it registers its own end, which _end_all must come before)
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar

from engine.api import Engine
from engine.errors import EngineClosed

__all__ = ["SLICE_S", "Host"]

T = TypeVar("T")
SLICE_S = 0.5                                            # of a wait: on Windows Ctrl-C is noticed only between two waits
EXIT_S = 10.0                                            # that the end of the process waits for an engine's end


class Host:
    """A thread with an event loop on which one async Engine lives. It knows no SynchronousEngine, so that one can be garbage.

    The thread is a daemon, and so is each thread that it starts: an engine that was forgotten keeps no process alive.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._make = make
        self._process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._loaded: Future[Engine] = Future()
        self._ending = asyncio.Event()
        self._lock = threading.Lock()
        self._open = False                               # calls are taken; changes under the lock
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="rillet-loop", daemon=True)

    def load(self) -> Engine:
        """Start the thread and wait until the engine is open. Raises what loading raises."""
        _hosts.add(self)
        self._thread.start()
        try:
            return _wait(self._loaded)
        except BaseException:                            # it failed, or an interrupt
            self.stop()
            raise

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner, suppress(asyncio.CancelledError):
                runner.run(self._live())
        finally:
            _hosts.discard(self)

    async def _live(self) -> None:
        try:
            opening = asyncio.current_task()
            assert opening is not None
            watching = asyncio.create_task(self._cancel_at_end(opening))
            async with self._make() as engine:
                watching.cancel()
                self._open = True
                self._loaded.set_result(engine)
                try:
                    await self._ending.wait()
                finally:
                    with self._lock:
                        self._open = False
        except BaseException as error:
            if self._loaded.done():
                raise
            cancelled = isinstance(error, asyncio.CancelledError)
            self._loaded.set_exception(EngineClosed("the engine was closed while it loaded") if cancelled else error)

    async def _cancel_at_end(self, opening: "asyncio.Task[Any]") -> None:
        await self._ending.wait()
        opening.cancel()

    def stop(self) -> None:
        """Begin to end; from any thread, also from the garbage collector."""
        self.call_soon(self._ending.set)

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until the engine is closed and the thread has ended."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def call(self, make: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        """Run make(engine) on the loop and wait for its result; an interrupt of the wait cancels it."""
        if os.getpid() != self._process:                 # a fork has no threads but its own
            raise EngineClosed("the engine was made in another process: make one after the fork")
        result: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(asyncio.create_task(make(self._loaded.result())))
            tasks[0].add_done_callback(lambda task: _hand_over(task, result))

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        try:
            with self._lock:
                if not self._open:
                    raise EngineClosed("the engine is closed: make a new one")
                self._loop.call_soon_threadsafe(begin)
            return _wait(result)
        except CancelledError:
            raise EngineClosed("the engine was closed during the call") from None
        except BaseException:                            # an interrupt may come at any point
            self.call_soon(cancel)
            raise

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function on the loop, if it still runs."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def start(self, coroutine: Coroutine[Any, Any, None], ended: Callable[[], object]) -> None:
        """On the loop: a task, and what to call when it ends in whatever way."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda task: ended())


def _hand_over(task: "asyncio.Task[T]", result: "Future[T]") -> None:
    if task.cancelled():
        result.cancel()
    elif (error := task.exception()) is not None:
        result.set_exception(error)
    else:
        result.set_result(task.result())


def _wait(future: "Future[T]") -> T:
    while True:
        try:
            return future.result(SLICE_S)
        except TimeoutError:
            if future.done():                            # then it is the call's own
                raise


_hosts: set[Host] = set()


def _end_all() -> None:
    """Before the process ends: every engine that was not closed."""
    hosts = [*_hosts]
    for host in hosts:
        host.stop()
    for host in hosts:
        host.join(EXIT_S)


# Earlier than atexit where Python lets us: concurrent.futures, on which a backend may run, refuses work before that. What
# was registered last is called first.
getattr(threading, "_register_atexit", atexit.register)(_end_all)
