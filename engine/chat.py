"""python -m engine.chat: chat with a model, in the terminal or through a pipe.

In a terminal engine.terminal takes over. From a pipe each line is one turn of the user, and stdout gets the answers alone,
one newline after each; everything else goes to stderr. Every RilletError ends in one sentence, never in a traceback.
"""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from io import TextIOWrapper
from typing import Any, NoReturn, Protocol, TextIO

import anyio
import anyio.to_thread

from engine.api import Engine
from engine.config import EngineConfig, Flag, parse_flags
from engine.conversation import Conversation, clean, on_interrupt
from engine.errors import ConfigError, RilletError
from engine.sampling import SamplingParams

__all__ = ["SAMPLING", "answer_lines", "main"]

SAMPLING = {"temperature": 0.7, "top_p": 0.95}
"""Of a chat, each where neither the flags nor the model say it."""

LEVELS = ("debug", "info", "warning", "error")
INTERRUPTED = 130                                        # 128 + SIGINT, as shells count
OWN = (
    Flag("system", "system", str, "system prompt"),
    Flag("i", "interactive", bool, "accepted for vllm.rs's sake: a chat always is interactive"),
    Flag("server", "server", bool, "not here: the server is `rillet serve`"),
    Flag("log", "log", bool, "the same as --log-level info"),
    Flag("log-level", "log_level", str, "debug, info, warning (default) or error: what is logged to stderr"),
)


def main(arguments: Sequence[str] | None = None, program: str = "rillet chat") -> int:
    """Chat until the input ends. The exit code is 0, or 1 after a RilletError, 2 for a wrong flag, 130 after Ctrl-C."""
    try:
        config, own = parse_flags(
            sys.argv[1:] if arguments is None else arguments, OWN, program=program,
            description="Chat with a model in the terminal, or through a pipe: one line in, one answer out.",
        )  # fmt: skip
        if own["server"]:
            raise ConfigError("--server is no flag of chat: start the server with `rillet serve`")
        _log_to_stderr(own)
        _speak_utf8()
        anyio.run(_chat, config, own["system"], backend="asyncio")
    except BrokenPipeError:                              # whoever read the answers has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except RilletError as error:
        print(f"{program}: {clean(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


async def _chat(config: EngineConfig, system: str | None) -> None:
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
            conversation = Conversation(engine, chat_sampling(engine), system)
            if sys.stdin.isatty() and sys.stdout.isatty():
                from engine.terminal import TerminalChat  # lazily: a pipe does without prompt_toolkit and rich

                await TerminalChat(conversation).run()
            else:
                await answer_lines(conversation, sys.stdin, sys.stdout)


async def answer_lines(conversation: Conversation, lines: TextIO, out: TextIO) -> None:
    """Each line that is not empty is one turn; its answer is written as it comes, with one newline at its end."""
    while line := await anyio.to_thread.run_sync(lines.readline):
        if not line.strip():
            continue
        newlines = ""                                    # held back until something follows them

        def show(text: str) -> None:
            nonlocal newlines
            text = newlines + clean(text)
            newlines = text[len(text.rstrip("\n")) :]
            out.write(text.removesuffix(newlines))
            out.flush()

        turn = await conversation.ask(line.rstrip("\r\n"), show)
        out.write("\n")
        out.flush()
        if turn.finish_reason == "length":
            print(f"(the answer was cut after {turn.answer_tokens:,} tokens)", file=sys.stderr)


def chat_sampling(engine: Engine) -> SamplingParams:
    """What a chat asks for where neither the flags nor the model decide."""
    said = engine.sampling_defaults
    temperature, top_p = (None if name in said else SAMPLING[name] for name in ("temperature", "top_p"))
    return SamplingParams(temperature=temperature, top_p=top_p)


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


def _log_to_stderr(own: dict[str, Any]) -> None:
    level = own["log_level"] or ("info" if own["log"] else "warning")
    if level not in LEVELS:
        raise ConfigError(f"--log-level must be one of {', '.join(LEVELS)}, not {level!r}")
    logging.basicConfig(level=logging.WARNING, handlers=[_StderrHandler()], force=True)
    logging.getLogger("rillet").setLevel(level.upper())
    logging.getLogger("huggingface_hub").propagate = False                  # it prints its own warnings


def _speak_utf8() -> None:
    """Whatever the locale says; bytes that are no UTF-8 become replacement characters."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main(program="python -m engine.chat"))
