"""python -m engine.chat: chat with a model, in the terminal or through a pipe.

In a terminal engine.terminal takes over. From a pipe each line is one turn of the user, and stdout gets the answers alone,
one newline after each; everything else goes to stderr. engine.console says how it starts and ends.
"""

import sys
from collections.abc import Sequence
from typing import TextIO

import anyio
import anyio.to_thread

from engine.api import Engine
from engine.config import EngineConfig
from engine.console import LOG_FLAGS, exit_code, log_to_stderr, opened, speak_utf8
from engine.conversation import Conversation, clean
from engine.errors import ConfigError
from engine.flags import Flag, parse_flags
from engine.sampling import SamplingParams

__all__ = ["SAMPLING", "answer_lines", "chat_sampling", "main"]

SAMPLING = {"temperature": 0.7, "top_p": 0.95}
"""Of a chat, each where neither the flags nor the model say it."""

OWN = (
    Flag("system", "system", str, "system prompt"),
    Flag("i", "interactive", bool, "accepted for vllm.rs's sake: a chat always is interactive"),
    Flag("server", "server", bool, "not here: the server is `rillet serve`"),
    *LOG_FLAGS,
)


def main(arguments: Sequence[str] | None = None, program: str = "rillet chat") -> int:
    """Chat until the input ends. The exit code is 0, or 1 after a RilletError, 2 for a wrong flag, 130 after Ctrl-C."""
    return exit_code(program, lambda: _main(sys.argv[1:] if arguments is None else arguments, program))


def _main(arguments: Sequence[str], program: str) -> None:
    config, own = parse_flags(
        arguments, OWN, program=program,
        description="Chat with a model in the terminal, or through a pipe: one line in, one answer out.",
    )  # fmt: skip
    if own["server"]:
        raise ConfigError("--server is no flag of chat: start the server with `rillet serve`")
    log_to_stderr(own)
    speak_utf8()
    anyio.run(_chat, config, own["system"], backend="asyncio")


async def _chat(config: EngineConfig, system: str | None) -> None:
    async with opened(config) as engine:
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


if __name__ == "__main__":
    sys.exit(main(program="python -m engine.chat"))
