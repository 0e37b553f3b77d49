"""What every program at a terminal shares: how it logs, shows that a model loads, and ends.

engine.chat and engine.completion stand on it. stdout belongs to answers, everything here goes to stderr. Every RilletError
ends in one sentence, never in a traceback.
"""

import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from io import TextIOWrapper
from typing import Any, NoReturn, Protocol

from engine.api import Engine
from engine.config import EngineConfig
from engine.conversation import clean, on_interrupt
from engine.errors import ConfigError, RilletError
from engine.flags import Flag

__all__ = ["LOG_FLAGS", "exit_code", "log_to_stderr", "opened", "speak_utf8"]

LEVELS = ("debug", "info", "warning", "error")
INTERRUPTED = 130                                        # 128 + SIGINT, as shells count
LOG_FLAGS = (
    Flag("log", "log", bool, "the same as --log-level info"),
    Flag("log-level", "log_level", str, "debug, info, warning (default) or error: what is logged to stderr"),
)


def exit_code(program: str, run: Callable[[], object]) -> int:
    """Run a program. 0, or 1 after a RilletError, 2 for a wrong flag, 130 after Ctrl-C."""
    try:
        run()
    except BrokenPipeError:                              # whoever read the answers has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:                             # of writing the answers: a full disk
        print(f"{program}: {error.strerror or error}", file=sys.stderr)
        return 1
    except RilletError as error:
        print(f"{program}: {clean(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


@asynccontextmanager
async def opened(config: EngineConfig) -> AsyncIterator[Engine]:
    """The engine, loading visibly. Ctrl-C inside the block ends the process, but where the block handles it itself."""
    loading = _loading()

    def leave() -> NoReturn:
        """At once: loading runs in C on other threads, which no exception reaches."""
        loading.stop()
        os.write(2, b"\n")
        os._exit(INTERRUPTED)

    with on_interrupt(leave):
        async with AsyncExitStack() as stack:
            try:
                engine = await stack.enter_async_context(Engine(config, progress=loading))
            finally:
                loading.stop()
            yield engine


class _Loading(Protocol):
    """The `progress` of an Engine, and how it ends."""

    def __call__(self, what: str, done: int, total: int) -> None: ...
    def stop(self) -> None: ...


class _Stages:
    """Where stderr is no terminal: one line per stage."""

    def __init__(self) -> None:
        self._last: str | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._last:
            self._last = what
            print(f"{what} ...", file=sys.stderr, flush=True)

    def stop(self) -> None: ...


def _loading() -> _Loading:
    if not sys.stderr.isatty():
        return _Stages()
    from engine.terminal import LoadingBar

    return LoadingBar()


class _StderrHandler(logging.Handler):
    """One sentence per record on the stderr of the moment (a loading bar stands in for it); tracebacks at debug only."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger("rillet").getEffectiveLevel() > logging.DEBUG:
            record.exc_info = record.exc_text = None
        sys.stderr.write(clean(f"{record.levelname.lower()}: {self.format(record)}") + "\n")


def log_to_stderr(own: dict[str, Any]) -> None:
    """Log as the values of LOG_FLAGS say. Raises ConfigError."""
    level = own["log_level"] or ("info" if own["log"] else "warning")
    if level not in LEVELS:
        raise ConfigError(f"--log-level must be one of {', '.join(LEVELS)}, not {level!r}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_StderrHandler()], force=True)
    logging.getLogger("rillet").setLevel(level.upper())
    logging.getLogger("huggingface_hub").propagate = False                  # it prints its own warnings


def speak_utf8() -> None:
    """Whatever the locale says; bytes that are no UTF-8 become replacement characters."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
