"""Answer: one request read to its end, with its times; and many of them as one batch, for callers that wait for all.

engine.synchronous and engine.completion stand on it. It runs on the engine's event loop and prints nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import anyio

from engine.api import Engine
from engine.errors import EngineClosed, Overloaded
from engine.prompts import Prompt
from engine.sampling import SamplingParams
from engine.sequence import FinishReason
from engine.stream import Delta, Stream

__all__ = ["Answer", "answer_all"]


@dataclass(slots=True)
class Answer:
    """What has come of one request with one choice. Times are time.monotonic()'s; first_s and last_s are of tokens."""

    number: int                                          # of the request
    prompt_tokens: int
    began_s: float                                       # when it was admitted
    first_s: float
    last_s: float
    cached_tokens: int = 0
    tokens: int = 0
    first_tokens: int = 0                                # that came together, first
    text: str = ""
    finish_reason: FinishReason | None = None

    @classmethod
    def of(cls, stream: Stream) -> "Answer":
        began = stream.request.arrived_s
        return cls(stream.request.number, len(stream.prompt_token_ids), began, began, began)

    def take(self, delta: Delta) -> None:
        """Add what has just come."""
        if delta.token_ids:
            self.last_s = monotonic()
            if not self.tokens:
                self.first_s, self.first_tokens = self.last_s, len(delta.token_ids)
            self.tokens += len(delta.token_ids)
        self.text += delta.text
        if delta.usage is not None:
            self.cached_tokens = delta.usage.cached_tokens
        self.finish_reason = delta.finish_reason or self.finish_reason


async def answer_all(
    engine: Engine, asked: Sequence[tuple[Prompt, SamplingParams]],
    show: Callable[[int, Delta, Answer], object] = lambda at, delta, answer: None,
) -> list[Answer]:  # fmt: skip
    """Ask everything as one batch; the answers in the order of the prompts. `show` gets each delta, with the prompt's index.

    A prompt that is refused, or any other error, also one of `show`, cancels the rest and is raised as it is. What is more
    than the engine lets wait is admitted as room comes; Overloaded is raised only if none of the room is our own.
    """
    batch = _Batch(engine, show)
    answers: list[Answer] = []
    async with anyio.create_task_group() as group:
        try:
            for at, (prompt, params) in enumerate(asked):
                stream = await batch.admit(prompt, params)
                answers.append(Answer.of(stream))
                group.start_soon(batch.read, at, stream, answers[at], group.cancel_scope)
        except Exception as error:                       # a task group would wrap it
            batch.fail(error, group.cancel_scope)
    if batch.failure is not None:
        raise batch.failure
    return answers


class _Batch:
    """The streams of one answer_all() and what they share: how many are open, and the first failure."""

    def __init__(self, engine: Engine, show: Callable[[int, Delta, Answer], object]) -> None:
        self.failure: Exception | None = None
        self._engine = engine
        self._show = show
        self._open = 0
        self._ended = anyio.Event()                      # one stream more has ended

    async def admit(self, prompt: Prompt, params: SamplingParams) -> Stream:
        while True:
            try:
                stream = await self._engine.stream(prompt, params)
            except Overloaded:
                if not self._open:
                    raise
                await self._ended.wait()
            else:
                self._open += 1
                return stream

    async def read(self, at: int, stream: Stream, answer: Answer, scope: anyio.CancelScope) -> None:
        try:
            async with stream:
                async for delta in stream:
                    answer.take(delta)
                    self._show(at, delta, answer)
            if answer.finish_reason == "abort":
                raise EngineClosed("the engine was closed before the answer was done")
        except Exception as error:
            self.fail(error, scope)
        finally:
            self._open -= 1
            self._ended.set()
            self._ended = anyio.Event()

    def fail(self, error: Exception, scope: anyio.CancelScope) -> None:
        self.failure = self.failure or error
        scope.cancel()
