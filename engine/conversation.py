"""Conversation: the turns of one chat, asked again as a whole at every turn, and what a turn cost.

engine.chat (a pipe) and engine.terminal (a person) both stand on it. It prints nothing: the caller is handed the text as it
comes. Prompts and answers are never logged.
"""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from engine.api import Engine
from engine.errors import ContextTooLong, InvalidRequest
from engine.sampling import SamplingParams
from engine.sequence import FinishReason
from engine.stream import Stream
from engine.text.messages import Message, plain_messages

__all__ = ["Conversation", "Turn", "clean", "on_interrupt"]

CONTROLS = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t")


def clean(text: str) -> str:
    """Without control characters, so that nothing a model says is an escape sequence to a terminal."""
    return text.translate(CONTROLS)


@contextmanager
def on_interrupt(action: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C means `action` inside the block. It runs between any two instructions of the main thread: it must be short."""
    previous = signal.signal(signal.SIGINT, lambda number, frame: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer in figures. first_token_s counts from the question, decode_s from the first token to the last."""

    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    first_tokens: int                                    # that came together, first
    first_token_s: float
    decode_s: float
    finish_reason: FinishReason | None

    def __str__(self) -> str:
        cached = f" ({self.cached_tokens:,} cached)" if self.cached_tokens else ""
        prompt = f"prompt {self.prompt_tokens:,} tokens{cached}"
        if not self.answer_tokens:
            return prompt
        parts = [
            prompt + _rate(self.prompt_tokens - self.cached_tokens, self.first_token_s),
            f"answer {self.answer_tokens:,} tokens" + _rate(self.answer_tokens - self.first_tokens, self.decode_s),
            f"first token after {self.first_token_s:.2f} s",
        ]
        return " | ".join(parts)


class Conversation:
    """The history of one chat. `messages` begins with the system prompt, if there is one."""

    def __init__(self, engine: Engine, sampling: SamplingParams, system: str | None = None) -> None:
        self.engine = engine
        self.sampling = sampling
        self.system = system
        self.turns: list[Message] = []
        self.used_tokens = 0                             # of the context length, after the last answer
        self._stream: Stream | None = None
        self._stopped = False

    @property
    def messages(self) -> list[Message]:
        return ([Message("system", self.system)] if self.system else []) + self.turns

    @property
    def tokens_left(self) -> int:
        return max(0, self.engine.context_length - self.used_tokens)

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns.clear()
        self.used_tokens = 0

    async def ask(self, text: str, show: Callable[[str], object]) -> Turn:
        """Ask with the whole history, `show` the answer piece by piece, keep question and answer.

        A question that is refused (RequestError, Overloaded) or was stopped before the first word is not kept.
        """
        question = Message("user", text)
        answer, reason, first_tokens = "", None, 0
        self._stopped = False
        began = first = last = monotonic()
        async with await self.engine.stream([*self.messages, question], self.sampling) as stream:
            self._stream = stream
            if self._stopped:
                stream.cancel()
            try:
                async for delta in stream:
                    last = monotonic()
                    if delta.token_ids and not first_tokens:
                        first, first_tokens = last, len(delta.token_ids)
                    if delta.text:
                        answer += delta.text
                        show(delta.text)
                    reason = delta.finish_reason or reason
            finally:
                self._stream = None
            usage = stream.usage
        if answer or reason != "abort":
            self.turns += [question, Message("assistant", answer)]
            self.used_tokens = usage.total_tokens
        return Turn(
            prompt_tokens=usage.prompt_tokens, cached_tokens=usage.cached_tokens, answer_tokens=usage.completion_tokens,
            first_tokens=first_tokens, first_token_s=first - began, decode_s=last - first, finish_reason=reason,
        )  # fmt: skip

    def stop(self) -> None:
        """End the answer that is being given; what was said of it is kept. Call it on the event loop."""
        self._stopped = True
        if self._stream is not None:
            self._stream.cancel()

    def save(self, path: Path) -> None:
        """Write the messages as JSON. Raises FileExistsError over a file that is no saved conversation, OSError."""
        if path.exists():
            try:
                read_messages(path)
            except InvalidRequest:
                raise FileExistsError(f"{path} exists and is no saved conversation: choose another name") from None
        messages = [{"role": message.role, "content": message.content} for message in self.messages]
        text = json.dumps({"model": self.engine.model_name, "messages": messages}, ensure_ascii=False, indent=1)
        path.write_text(text + "\n", "utf-8")

    async def load(self, path: Path) -> None:
        """Take the messages of a saved conversation, even of more than the context holds. Raises InvalidRequest, OSError."""
        messages = read_messages(path)
        self.reset()
        self.system = messages.pop(0).content if messages and messages[0].role == "system" else None
        self.turns = messages
        try:
            self.used_tokens = len(await self.engine.tokenize(self.messages)) if self.messages else 0
        except ContextTooLong:
            self.used_tokens = self.engine.context_length


def read_messages(path: Path) -> list[Message]:
    """The messages of a file that Conversation.save wrote. Raises InvalidRequest, OSError."""
    try:
        saved = json.loads(path.read_text("utf-8"))["messages"]
        plain = plain_messages(saved)
        if any(not isinstance(message["content"], str) for message in plain):
            raise InvalidRequest("a message has no text")
    except (ValueError, TypeError, KeyError, RecursionError) as error:          # InvalidRequest is a ValueError
        raise InvalidRequest(f"{path} is no saved conversation ({error}): give a file that /save wrote") from None
    return [Message(message["role"], message["content"]) for message in plain]


def _rate(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:,.1f} tokens/s" if tokens > 0 and seconds > 0 else ""
