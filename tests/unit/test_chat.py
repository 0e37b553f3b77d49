"""Chat, through a pipe and in a terminal: in this process with a script for a model, and as a person runs it."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import anyio
import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from engine import ContextTooLong, Engine, EngineConfig, Message, SamplingParams
from engine.chat import SAMPLING, answer_lines, chat_sampling, main
from engine.conversation import Conversation, Turn, clean, read_messages
from engine.errors import InvalidRequest
from engine.stream import Delta, Usage
from engine.terminal import TerminalChat
from engine.weights.checkpoint import Checkpoint
from tests.support.toy import ToyBackend

CHAT = [sys.executable, "-P", "-m", "engine.chat"]
PATIENCE_S = 240.0                                      # of a test that may have to compile the kernels first


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"                                    # prompt_toolkit knows no other


# ---- a model that says what it is told to -------------------------------------------------------------------------------


class Script:
    """Stands for Engine and Stream: each question is answered with the next list of pieces. "..." waits for cancel()."""

    context_length = 100
    model_name, device = "script", "paper"

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[list[Message]] = []
        self.cancelled = anyio.Event()
        self.waiting = anyio.Event()
        self.usage = Usage(0, 0, 0)

    async def stream(self, messages: list[Message], sampling: SamplingParams) -> "Script":
        self.asked.append(messages)
        if sum(len(message.content) for message in messages) > self.context_length:
            raise ContextTooLong("the prompt has 101 tokens, the context length is 100: shorten it")
        self.cancelled, self.usage = anyio.Event(), Usage(10 * len(messages), 0, 0)
        return self

    async def tokenize(self, messages: list[Message]) -> list[int]:
        length = sum(len(message.content) for message in messages)
        if length > self.context_length:
            raise ContextTooLong("the prompt has 101 tokens, the context length is 100: shorten it")
        return [0] * length

    def cancel(self) -> None:
        self.cancelled.set()

    async def __aenter__(self) -> "Script":
        return self

    async def __aexit__(self, *error: object) -> None: ...

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for piece in self.answers.pop(0):
            if piece == "...":
                self.waiting.set()
                await self.cancelled.wait()
                yield Delta(0, finish_reason="abort")
                return
            self.usage = Usage(self.usage.prompt_tokens, self.usage.completion_tokens + 1, 0)
            yield Delta(0, text=piece, token_ids=[1])
        yield Delta(0, finish_reason="stop", usage=self.usage)


def conversation(script: Any, system: str | None = None) -> Conversation:
    return Conversation(script, SamplingParams(), system)


async def piped(script: Script, text: str, system: str | None = None) -> str:
    out = io.StringIO()
    with anyio.fail_after(20):
        await answer_lines(conversation(script, system), io.StringIO(text), out)
    return out.getvalue()


def test_no_escape_sequence_reaches_a_terminal() -> None:
    dirty = "a\x1b[31mred\x1b]0;title\x07\x9b2J\r\b\x00\x7f\n\tb é 你 👍"
    assert clean(dirty) == "a[31mred]0;title2J\n\tb é 你 👍"


@pytest.mark.anyio
async def test_each_line_is_answered_with_one_newline_at_the_end() -> None:
    script = Script(["Hel", "lo\n", "\n"], ["one\n", "two"], [])
    assert await piped(script, "hi\n\n   \nmore\r\nlast") == "Hello\none\ntwo\n\n"
    assert [messages[-1].content for messages in script.asked] == ["hi", "more", "last"]


@pytest.mark.anyio
async def test_the_whole_history_is_asked_again() -> None:
    script = Script(["A\x1b"], ["B"])
    assert await piped(script, "a\nb\n", system="Be brief.") == "A\nB\n"
    system, a, b = Message("system", "Be brief."), Message("user", "a"), Message("user", "b")
    assert script.asked == [[system, a], [system, a, Message("assistant", "A\x1b"), b]]


@pytest.mark.anyio
async def test_an_answer_flows_piece_by_piece() -> None:
    class Pipe(io.StringIO):
        flushed: tuple[str, ...] = ()

        def flush(self) -> None:
            self.flushed += (self.getvalue(),)

    out = Pipe()
    await answer_lines(conversation(Script(["a", "b"])), io.StringIO("q\n"), out)
    assert out.flushed == ("a", "ab", "ab\n")


@pytest.mark.anyio
async def test_a_question_that_does_not_fit_is_not_kept() -> None:
    chat = conversation(Script(["A"], ["B"]))
    await chat.ask("a", lambda text: None)
    with pytest.raises(ContextTooLong):
        await chat.ask("x" * 101, lambda text: None)
    assert [message.content for message in chat.messages] == ["a", "A"]
    chat.reset()
    assert (chat.messages, chat.tokens_left) == ([], 100)


@pytest.mark.anyio
@pytest.mark.parametrize(("pieces", "kept"), [(["said", "..."], ["q", "said"]), (["..."], [])])
async def test_a_stopped_answer_keeps_what_was_said(pieces: list[str], kept: list[str]) -> None:
    script = Script(pieces)
    chat = conversation(script)
    turns = []
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:

            async def ask() -> None:
                turns.append(await chat.ask("q", lambda text: None))

            group.start_soon(ask)
            await script.waiting.wait()
            chat.stop()
    assert turns[0].finish_reason == "abort"
    assert [message.content for message in chat.messages] == kept


def test_a_turn_tells_its_figures() -> None:
    turn = Turn(150, 50, 11, 1, 0.5, 2.0, "stop")
    assert str(turn) == (
        "prompt 150 tokens (50 cached), 200.0 tokens/s | answer 11 tokens, 5.0 tokens/s | first token after 0.50 s"
    )
    assert str(Turn(150, 0, 0, 0, 0.0, 0.0, "abort")) == "prompt 150 tokens"


@pytest.mark.anyio
async def test_saved_and_loaded_again(tmp_path: Path) -> None:
    chat = conversation(Script(), "Be brief.")
    chat.turns = [Message("user", "q\n"), Message("assistant", "ä\x1b")]
    path = tmp_path / "c.json"
    chat.save(path)
    chat.save(path)                                     # over its own file, again
    other = conversation(Script())
    await other.load(path)
    assert (other.system, other.turns) == ("Be brief.", chat.turns)
    assert other.tokens_left == 100 - len("Be brief.q\nä\x1b")
    assert json.loads(path.read_text("utf-8"))["model"] == "script"


@pytest.mark.anyio
async def test_a_saved_conversation_longer_than_the_context_leaves_nothing(tmp_path: Path) -> None:
    chat = conversation(Script())
    chat.turns = [Message("user", "q" * 101), Message("assistant", "a")]
    chat.save(tmp_path / "c.json")
    other = conversation(Script())
    await other.load(tmp_path / "c.json")
    assert other.tokens_left == 0


def test_saving_destroys_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear")
    with pytest.raises(FileExistsError, match="no saved conversation"):
        conversation(Script()).save(path)
    assert path.read_text() == "dear"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"messages": 3}', '{"messages": [{"role": "user"}]}', '{"messages": [3]}', "\xff"]
)
def test_a_file_that_is_no_conversation_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidRequest, match="no saved conversation"):
        read_messages(tmp_path / "x")


# ---- a terminal in this process -----------------------------------------------------------------------------------------


@asynccontextmanager
async def terminal(script: Any) -> AsyncIterator[tuple[Callable[[str], None], io.StringIO, Conversation, anyio.Event]]:
    """A TerminalChat that runs: (type something, what it shows, its conversation, set when it has left)."""
    shown = io.StringIO()
    chat = conversation(script)
    left = anyio.Event()
    with create_pipe_input() as keys, anyio.fail_after(20):
        console = Console(file=shown, highlight=False)
        screen = TerminalChat(chat, console=console, input=keys, output=DummyOutput())

        async def run() -> None:
            await screen.run()
            left.set()

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            yield keys.send_text, shown, chat, left


@pytest.mark.anyio
async def test_commands_in_the_terminal(tmp_path: Path) -> None:
    script = Script(["Gra\x1b[2Jvity."])
    path = tmp_path / "c.json"
    async with terminal(script) as (send, shown, _, left):
        send(f"/system Be brief.\rWhat falls?\r/save {path}\r/save\r/load {path}x\r/load {path}\r/nonsense\r/help\r/exit\r")
        await left.wait()
    text = shown.getvalue()
    assert script.asked == [[Message("system", "Be brief."), Message("user", "What falls?")]]
    assert "Gra[2Jvity.\nprompt 20 tokens" in text
    assert [message.role for message in read_messages(path)] == ["system", "user", "assistant"]
    for words in ("Saved to", "/save needs", "No such file", "Loaded 2 messages", "/nonsense is no command", "/load FILE"):
        assert words in text
    assert "\x1b" not in text


@pytest.mark.anyio
async def test_ctrl_c_at_the_prompt_clears_the_line_then_warns_then_leaves() -> None:
    async with terminal(Script(["A"], ["B"])) as (send, shown, chat, left):
        send("a\rhalf a line\x03\x03b\r\x03\x03")
        await left.wait()
    assert shown.getvalue().count("Ctrl-C again leaves") == 2
    assert [message.content for message in chat.turns] == ["a", "A", "b", "B"]


@pytest.mark.anyio
async def test_ctrl_d_leaves_and_reset_forgets() -> None:
    async with terminal(Script(["A"], ["B"])) as (send, _, chat, left):
        send("a\r/reset\rb\r\x04")
        await left.wait()
    assert [message.content for message in chat.turns] == ["b", "B"]


@pytest.mark.anyio
async def test_a_full_context_is_a_sentence_and_the_chat_goes_on() -> None:
    async with terminal(Script(["A"])) as (send, shown, chat, left):
        send("x" * 101 + "\r/reset\ra\r\x04")
        await left.wait()
    assert "the context length is 100: shorten it, or type /reset" in shown.getvalue()
    assert [message.content for message in chat.turns] == ["a", "A"]


@pytest.mark.anyio
async def test_a_paste_of_many_lines_is_one_turn() -> None:
    script = Script(["A"], ["B"], ["C"])
    async with terminal(script) as (send, _, _, left):
        send("\x1b[200~one\ntwo\x1b[201~\rthree\x1b\rfour\r /etc is a folder\r\x04")
        await left.wait()
    assert [messages[-1].content for messages in script.asked] == ["one\ntwo", "three\nfour", "/etc is a folder"]


@pytest.mark.anyio
async def test_ctrl_c_stops_an_answer_and_the_chat_goes_on() -> None:
    script = Script(["said", "..."], ["B"])
    async with terminal(script) as (send, shown, chat, left):
        send("a\r")
        await script.waiting.wait()
        signal.raise_signal(signal.SIGINT)
        send("b\r\x04")
        await left.wait()
    assert [message.content for message in chat.turns] == ["a", "said", "b", "B"]
    assert "said\n(stopped)" in shown.getvalue()


@pytest.mark.anyio
@pytest.mark.parametrize(("used", "colour"), [(49, "green"), (50, "yellow"), (89, "yellow"), (90, "red"), (120, "red")])
async def test_tokens_left_have_a_colour(used: int, colour: str) -> None:
    with create_pipe_input() as keys:
        chat = TerminalChat(conversation(Script()), input=keys, output=DummyOutput())
        chat.conversation.used_tokens = used
        assert chat._tokens_left() == [(f"fg:ansi{colour}", f"tokens left: {max(0, 100 - used)}")]


# ---- over the engine ----------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_second_turn_finds_the_first_in_the_cache(tiny_checkpoint: Callable[[], Checkpoint]) -> None:
    async with Engine(EngineConfig(), backend=ToyBackend(pages=256), checkpoint=tiny_checkpoint()) as engine:
        chat = Conversation(engine, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        first = await chat.ask("one", lambda text: None)
        second = await chat.ask("two", lambda text: None)
        assert (first.answer_tokens, first.finish_reason, first.cached_tokens) == (8, "length", 0)
        assert second.cached_tokens > 0
        assert chat.tokens_left == engine.context_length - second.prompt_tokens - 8


@pytest.mark.anyio
async def test_chat_decides_only_what_flags_and_model_leave_open(tiny_checkpoint: Callable[[], Checkpoint]) -> None:
    def sampling(**config: Any) -> SamplingParams:
        engine.config = EngineConfig(**config)
        return chat_sampling(engine)

    async with Engine(EngineConfig(), backend=ToyBackend(), checkpoint=tiny_checkpoint()) as engine:
        assert sampling() == SamplingParams(**SAMPLING)
        assert sampling(temperature=0) == SamplingParams(top_p=SAMPLING["top_p"])
        assert sampling(temperature=1, top_p=1) == SamplingParams()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--f", "no.gguf"], 1, "no.gguf: no such file"),
        (["--m", "a/b", "--offline"], 1, "a/b"),
        (["--temperature", "hot"], 2, "--temperature must be a number, not 'hot'"),
        (["--server"], 2, "`rillet serve`"),
        (["--prompts", "A | B"], 2, "--prompts"),
        (["--log-level", "loud"], 2, "--log-level must be one of debug, info, warning, error, not 'loud'"),
        (["--backend", "abacus", "--i"], 1, "no backend named 'abacus'"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str], demo_path: Path
) -> None:
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("rillet chat: ")


# ---- as a person runs it ------------------------------------------------------------------------------------------------


def test_two_lines_through_a_pipe(demo_path: Path, tmp_path: Path) -> None:
    lines = "What is the capital of France?\n\nAnd what is the capital of Italy?\n"
    done = subprocess.run(
        [*CHAT, "--temperature", "0", "--max-tokens", "30", "--system", "You answer in one short sentence."],
        input=lines, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "Paris" in first
    assert "Rome" in second
    assert "loading" in done.stderr
    assert "France" not in done.stderr


def test_a_reader_that_leaves_ends_the_chat_without_a_traceback(demo_path: Path) -> None:
    with subprocess.Popen(
        [*CHAT, "--max-tokens", "3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        process.stdin.write("hello\n")
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 1
        assert "Traceback" not in process.stderr.read()


def test_ctrl_c_while_loading_ends_at_once(demo_path: Path) -> None:
    with subprocess.Popen(CHAT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stderr.readline().startswith("loading")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stdout.read() == ""
        assert "Traceback" not in process.stderr.read()


class Terminal:
    """A chat in a terminal of its own; `shown` is everything that it wrote, escape sequences and all."""

    def __init__(self, *flags: str) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (40, 120))

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*CHAT, *flags], stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal,
            env={**os.environ, "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(slave)
        self.shown = b""
        self.seen = 0

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: bytes) -> None:
        """Until the pattern stands after what was waited for before."""
        deadline = monotonic() + PATIENCE_S
        while not (match := re.compile(pattern).search(self.shown, self.seen)):
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - monotonic()))
            assert ready, f"{pattern!r} did not come: {self.shown[self.seen:]!r}"
            piece = os.read(self.master, 65536)
            self.shown += piece
            for _ in range(piece.count(b"\x1b[6n")):       # where is the cursor? A terminal answers
                os.write(self.master, b"\x1b[1;1R")
        self.seen = match.end()

    def send(self, line: str) -> None:
        """Type a line when the prompt is there, and wait until it was taken."""
        self.wait_for(rb"\?2004h(.|\n)*tokens left")        # bracketed paste on
        self.type(line)
        self.wait_for(rb"\?2004l")                         # and off


@pytest.fixture
def chat_terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def make(*flags: str) -> Terminal:
        opened.append(Terminal(*flags))
        return opened[-1]

    yield make
    for one in opened:
        one.process.kill()
        one.process.wait(20)
        os.close(one.master)


def test_a_chat_in_a_terminal(chat_terminal: Callable[..., Terminal], demo_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    chat = chat_terminal("--temperature", "0", "--max-tokens", "600")
    chat.wait_for(rb"context length 8,192 tokens")
    chat.send("/system You tell stories.\r")
    chat.wait_for(rb"system prompt is set")
    chat.send("Tell me a very long story about a very long river.\r")
    for _ in range(3):
        chat.wait_for(rb"[a-z]+ ")                      # it streams
    chat.type("\x03")
    chat.wait_for(rb"\(stopped\)(.|\n)*first token after \d")
    chat.send("What is the capital of France?\r")
    chat.wait_for(rb"Paris(.|\n)* cached\)(.|\n)*first token after \d")
    chat.send(f"/save {path}\r")
    chat.wait_for(rb"Saved to")
    chat.send("\x04")
    assert chat.process.wait(20) == 0
    messages = read_messages(path)
    assert [message.role for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert len(messages[2].content) < 600
    assert b"Traceback" not in chat.shown
