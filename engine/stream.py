"""Stream: one request's mailbox. The core puts in what was drawn, once per step; the caller iterates deltas out of it.

What arrives while the caller is busy is joined into one delta per choice, so a slow reader costs no more than a fast one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING
from warnings import warn

import anyio

from engine.errors import RilletError
from engine.sequence import FinishReason, Request, Sequence, TokenLogprobs

if TYPE_CHECKING:
    from engine.core import Core

__all__ = ["Choice", "Delta", "Result", "Stream", "Usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; cached_tokens of the prompt were found in the prefix cache and not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Delta:
    """What is new of choice `index`. The last delta of a choice has a finish_reason (stop, length or abort) and, where a
    stop string or an own stop id ended it, the stop_reason; the last one of the request has the usage."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None


@dataclass(slots=True)
class Choice:
    """One finished answer."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Result:
    """A whole request; text, token_ids and finish_reason are those of the first choice."""

    choices: list[Choice]
    usage: Usage
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: list[TokenLogprobs] | None

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason


class Mailbox:
    """What has been drawn and not yet read. The core holds this and not the Stream, so that a dropped Stream is noticed."""

    __slots__ = ("error", "open", "pending", "waiter")

    def __init__(self, choices: int) -> None:
        self.pending: dict[int, Delta] = {}
        self.waiter: anyio.Event | None = None
        self.error: Exception | None = None
        self.open = choices                              # choices that have not ended

    def deliver(self, sequence: Sequence, text: str, token: int, logprobs: TokenLogprobs | None) -> None:
        delta = self.pending.get(sequence.choice)
        if delta is None:
            delta = self.pending[sequence.choice] = Delta(sequence.choice)
        delta.text += text
        delta.token_ids.append(token)
        if logprobs is not None:
            if delta.logprobs is None:
                delta.logprobs = []
            delta.logprobs.append(logprobs)
        self._wake()

    def finished(self, sequence: Sequence) -> None:
        delta = self.pending.setdefault(sequence.choice, Delta(sequence.choice))
        delta.finish_reason, delta.stop_reason = sequence.finish_reason, sequence.stop_reason
        self.open -= 1
        if self.open == 0:
            delta.usage = _usage(sequence.request)
        self._wake()

    def fail(self, error: Exception) -> None:
        self.error, self.open = error, 0
        self._wake()

    def _wake(self) -> None:
        if self.waiter is not None:
            self.waiter.set()
            self.waiter = None


class Stream:
    """Iterate it for deltas; leaving its `async with` block, or aclose(), cancels what still runs and frees its pages."""

    def __init__(
        self, core: "Core", request: Request, mailbox: Mailbox, on_loop: Callable[[Callable[[], object]], object]
    ) -> None:
        self._core = core
        self._mailbox = mailbox
        self._on_loop = on_loop
        self.request = request

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.request.prompt

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """Of the prompt's second token and all after it; complete when the first delta has come."""
        return None if self.request.params.prompt_logprobs is None else self.request.prompt_logprobs

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return _usage(self.request)

    @property
    def ready(self) -> bool:
        """Whether the next delta, the error or the end is there already, so that iterating will not wait."""
        return bool(self._mailbox.pending) or self._mailbox.open == 0

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Delta:
        mailbox = self._mailbox
        while not mailbox.pending:
            if mailbox.error is not None:
                raise mailbox.error
            if mailbox.open == 0:
                raise StopAsyncIteration
            if mailbox.waiter is not None:
                raise RilletError("two tasks iterate one Stream: give each request a reader of its own")
            mailbox.waiter = waiter = anyio.Event()
            try:
                await waiter.wait()
            finally:
                mailbox.waiter = None
        return mailbox.pending.pop(next(iter(mailbox.pending)))

    async def collect(self) -> Result:
        """Read to the end and put everything together."""
        choices = [Choice(index) for index in range(len(self.request.sequences))]
        async with self:
            async for delta in self:
                choice = choices[delta.index]
                choice.text += delta.text
                choice.token_ids += delta.token_ids
                if delta.logprobs is not None:
                    choice.logprobs = (choice.logprobs or []) + delta.logprobs
                if delta.finish_reason is not None:
                    choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        return Result(choices, self.usage, self.prompt_token_ids, self.prompt_logprobs)

    def cancel(self) -> None:
        """End what still runs; its last deltas, with finish_reason "abort", can still be read."""
        if self._mailbox.open:
            self._core.abort(self.request)

    async def aclose(self) -> None:
        """End what still runs and drop what was not read."""
        self.cancel()
        self._mailbox.pending.clear()

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._mailbox.open or self._core.closing:
            return
        warn("a Stream was dropped before its end: use `async with stream:` or aclose()", ResourceWarning, stacklevel=2)
        core, request = self._core, self.request
        try:
            self._on_loop(lambda: core.abort(request))
        except RuntimeError:                             # the loop is gone, and the engine with it
            return


def _usage(request: Request) -> Usage:
    completion = sum(len(sequence.tokens) - sequence.prompt_length for sequence in request.sequences)
    return Usage(len(request.prompt), completion, request.cached_tokens)
