"""RemoteEngine: an engine in another process of this machine, with Engine's own behaviour, for any number of streams.

The server's workers share one engine process by it; engine.remote_service is the other side. Everything runs on one event
loop, asyncio or trio. It computes nothing and knows no device; what it says of the model came with the greeting. Over 300
lines, because all that a caller may ask of an engine stands on one class.
"""

from collections.abc import Awaitable, Callable, Mapping
from collections.abc import Sequence as Items
from types import TracebackType
from typing import Any, Literal
from warnings import warn

import anyio
import anyio.abc
import msgspec
from anyio.lowlevel import EventLoopToken, current_token

from engine.api import Embedding, Prompt
from engine.backend import Progress
from engine.client import check_name
from engine.core import loop_caller
from engine.deltas import Delta, DeltaStream, Usage
from engine.errors import EngineClosed
from engine.metrics import Statistics
from engine.model_facts import ModelFacts
from engine.remote_link import TELL_AT, Link, RemoteMailbox
from engine.remote_messages import Failed, Loading, Method, Ready, decode_value, pack_params, unpack_error
from engine.sampling import SamplingParams, merge
from engine.sequence import TokenLogprobs
from engine.text.dialects import Dialect, choose_dialect
from engine.text.messages import Message
from engine.text.vocabulary import Vocabulary
from engine.wire_async import FrameStream

__all__ = ["RemoteEngine", "RemoteStream"]

LAST_S = 2.0                                             # that the last deltas of aborted streams may take


class RemoteStream(DeltaStream):
    """What RemoteEngine.stream gives."""

    _mailbox: RemoteMailbox

    def __init__(
        self, link: Link, mailbox: RemoteMailbox, params: SamplingParams, on_loop: Callable[[Callable[[], object]], object]
    ) -> None:
        self._link = link
        self._mailbox = mailbox
        self._params = params
        self._on_loop = on_loop

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self._mailbox.prompt

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs] | None:
        return None if self._params.prompt_logprobs is None else self._mailbox.prompt_logprobs

    @property
    def usage(self) -> Usage:
        mailbox = self._mailbox
        return Usage(len(mailbox.prompt), mailbox.completion_tokens, mailbox.cached_tokens)

    @property
    def choices(self) -> int:
        return self._params.n

    async def __anext__(self) -> Delta:
        delta = await super().__anext__()
        mailbox = self._mailbox
        if mailbox.unread >= TELL_AT and not mailbox.pending:
            self._link.tell_read(mailbox)
        return delta

    def cancel(self) -> None:
        if self._mailbox.open:
            self._link.cancel(self._mailbox.number)

    async def aclose(self) -> None:
        if self._mailbox.open:
            self._mailbox.open = 0
            self._mailbox.wake()
            self._link.drop(self._mailbox.number)
        self._mailbox.pending.clear()

    def __del__(self) -> None:
        link, mailbox = self._link, self._mailbox
        if not mailbox.open or link.closed:
            return
        warn("a Stream was dropped before its end: use `async with stream:` or aclose()", ResourceWarning, stacklevel=2)
        try:
            self._on_loop(lambda: link.drop(mailbox.number))
        except RuntimeError:                             # the loop is gone, and the connection with it
            return


class RemoteEngine:
    """`connect` gives a connection to an EngineService. Entering waits until the engine there is ready, calling `progress`
    meanwhile, and raises what loading it raised."""

    def __init__(self, connect: Callable[[], Awaitable[FrameStream]], *, progress: Progress | None = None) -> None:
        self.failure: Exception | None = None            # why the engine is dead, or out of reach
        self._connect = connect
        self._progress = progress or (lambda what, done, total: None)
        self._facts: Ready | None = None
        self._tokenizer: Vocabulary | None = None
        self._dialect = Dialect()
        self._link = Link(self._hear)
        self._settled = anyio.Event()                    # ready, or failed
        self._died = anyio.Event()
        self._group: anyio.abc.TaskGroup | None = None
        self._token: EventLoopToken | None = None
        self._closing = False
        self._closed = False

    # ---- opening and closing --------------------------------------------------------------------------------------

    async def __aenter__(self) -> "RemoteEngine":
        if self._token is not None or self._closed:
            raise EngineClosed("this engine was opened or closed already: make a new RemoteEngine")
        self._token = current_token()
        self._on_loop = loop_caller()
        frames = await self._connect()
        group = self._group = anyio.create_task_group()
        await group.__aenter__()
        try:
            group.start_soon(self._live, frames, name="rillet-link")
            await self._settled.wait()
        except BaseException as error:
            self._closed = True
            group.cancel_scope.cancel()
            await group.__aexit__(type(error), error, error.__traceback__)
            raise
        if self._facts is None:
            self._closed = True
            group.cancel_scope.cancel()
            await group.__aexit__(None, None, None)
            raise self.failure or EngineClosed("the engine was closed while it loaded")
        return self

    async def _live(self, frames: FrameStream) -> None:
        try:
            gone = await self._link.run(frames)
            if self.failure is None:
                self._die(EngineClosed(f"the engine process has ended ({gone}): ask again soon"))
        finally:
            closed = EngineClosed("the engine is closed: make a new one")
            self._link.fail(closed, closed)

    def _hear(self, state: Loading | Ready | Failed) -> None:
        match state:
            case Loading(what, done, total):
                self._progress(what, done, total)
            case Ready():
                self._tokenizer = Vocabulary(
                    pieces=state.pieces, special_ids=state.special_ids, bos_id=state.bos_id,
                    drops_first_space=state.drops_first_space,
                )  # fmt: skip
                template, tools, reasoning = state.dialect
                self._dialect = choose_dialect(template, tools=tools or "none", reasoning=reasoning or "none")
                self._facts = state
                self._settled.set()
            case Failed(packed):
                self._die(unpack_error(packed))

    def _die(self, error: Exception) -> None:
        self.failure = error
        self._link.fail(error, self._dead())
        self._died.set()
        self._settled.set()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
        assert self._group is not None
        await self._group.__aexit__(None, None, None)

    async def drain(self, deadline_s: float = 30.0) -> None:
        """Refuse what is new here, wait until this client's streams have ended; what has not after deadline_s ends with
        "abort". Other clients of the engine go on."""
        self._closing = True
        with anyio.move_on_after(deadline_s):
            await self._link.wait_idle()
            return
        for number in self._link.mailboxes:
            self._link.cancel(number)
        with anyio.move_on_after(LAST_S):
            await self._link.wait_idle()

    async def close(self) -> None:
        """End this client's streams with "abort" and leave; idempotent. The engine lives on."""
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            await self.drain(0)
            if self._group is not None:
                self._group.cancel_scope.cancel()

    async def wait_failed(self) -> Exception:
        """Return when the engine is dead or out of reach, with why."""
        await self._died.wait()
        assert self.failure is not None
        return self.failure

    def _dead(self) -> EngineClosed:
        error = EngineClosed(f"the engine is dead: {self.failure}")
        error.__cause__ = self.failure
        return error

    # ---- asking ---------------------------------------------------------------------------------------------------

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None, **keywords: Any) -> RemoteStream:
        """Engine.stream."""
        self._check_open()
        tools, arguments = keywords.pop("tools", None), keywords.pop("template_arguments", None)
        wishes = merge(params, keywords)
        mailbox = await self._link.call(
            "stream", prompt=prompt, params=pack_params(wishes), tools=tools, template_arguments=arguments
        )
        assert isinstance(mailbox, RemoteMailbox)
        return RemoteStream(self._link, mailbox, wishes, self._on_loop)

    async def embed(self, prompt: Prompt, *, pooling: Literal["mean", "last"] = "mean") -> Embedding:
        """Engine.embed."""
        self._check_open()
        embedding: Embedding = await self._call("embed", Embedding, prompt=prompt, pooling=pooling)
        return embedding

    async def tokenize(
        self, prompt: Prompt, *, add_special: bool = True, tools: list[dict[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:  # fmt: skip
        """Engine.tokenize."""
        ids: list[int] = await self._call(
            "tokenize", list[int], prompt=prompt, add_special=add_special, tools=tools, template_arguments=template_arguments
        )
        return ids

    async def infill(self, prefix: str, suffix: str) -> list[int]:
        """Engine.infill."""
        ids: list[int] = await self._call("infill", list[int], prefix=prefix, suffix=suffix)
        return ids

    async def apply_chat_template(
        self, messages: Items[Message | Mapping[str, Any]], *, add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None, **arguments: Any,
    ) -> str:  # fmt: skip
        """Engine.apply_chat_template."""
        said = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools, **arguments}
        text: str = await self._call("apply_chat_template", str, **said)
        return text

    async def look(self) -> Statistics:
        """Of the engine, whichever clients use it."""
        statistics: Statistics = await self._call("look", Statistics)
        return statistics

    async def _call(self, method: Method, kind: Any, **arguments: Any) -> Any:
        self._check_here()
        value = await self._link.call(method, **arguments)
        assert isinstance(value, msgspec.Raw)
        return decode_value(value, kind)

    def _check_open(self) -> None:
        self._check_here()
        if self._closing:
            raise EngineClosed("the engine is closing and takes no new requests")

    def _check_here(self) -> None:
        if self._live_facts and current_token() != self._token:
            raise EngineClosed("the engine is open on another event loop: use it there, or open one here")
        if self.failure is not None:
            raise self._dead()

    # ---- looking at it --------------------------------------------------------------------------------------------

    @property
    def _live_facts(self) -> Ready:
        if self._facts is None:
            raise EngineClosed("the engine is not open: use `async with RemoteEngine(...) as engine:`")
        return self._facts

    @property
    def tokenizer(self) -> Vocabulary:
        assert self._live_facts
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def dialect(self) -> Dialect:
        assert self._live_facts
        return self._dialect

    @property
    def context_length(self) -> int:
        return self._live_facts.context_length

    @property
    def max_num_seqs(self) -> int:
        return self._live_facts.max_num_seqs

    @property
    def has_chat_template(self) -> bool:
        return self._live_facts.has_chat_template

    @property
    def chat_template(self) -> str | None:
        return self._live_facts.dialect[0]

    @property
    def model_facts(self) -> ModelFacts:
        return self._live_facts.model_facts

    @property
    def device(self) -> str:
        return self._live_facts.device

    @property
    def sampling_defaults(self) -> dict[str, float | int]:
        return dict(self._live_facts.sampling_defaults)

    @property
    def model_name(self) -> str:
        return self._live_facts.model_name

    @property
    def model_names(self) -> tuple[str, ...]:
        return self._live_facts.model_names

    def check_model(self, name: str | None) -> None:
        check_name(name, self.model_names)
