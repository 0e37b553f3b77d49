"""Engine: the async facade. `stream` refuses before anything flows, `generate` reads to the end, leaving the block closes.

Everything here runs on one event loop, asyncio or trio. Text work that may take long runs on worker threads; the device is
driven by engine.core; engine.loading makes what an engine runs on. Over 300 lines, because all that a caller may ask of an
engine stands on one class.
"""

import secrets
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import anyio
import anyio.abc
import anyio.to_thread
import numpy as np
from anyio.lowlevel import current_token

from engine.backend import Backend, Progress
from engine.client import check_name
from engine.config import EngineConfig
from engine.errors import ConfigError, EngineClosed, InvalidRequest
from engine.loading import Running, load
from engine.masks import Matcher
from engine.metrics import Metrics, Statistics
from engine.model.spec import ModelSpec
from engine.model_facts import ModelFacts
from engine.prompts import Prompt
from engine.sampling import SamplingParams, merge
from engine.sequence import Request, Sequence
from engine.step import FloatArray
from engine.stream import Mailbox, Result, Stream
from engine.text.detokenizer import Detokenizer
from engine.text.dialects import Dialect
from engine.text.messages import Message
from engine.text.template import RESERVED
from engine.text.tokenizer import Tokenizer
from engine.weights.checkpoint import Checkpoint
from engine.weights.hub import is_path

if TYPE_CHECKING:
    from engine.synchronous import SynchronousEngine

__all__ = ["Embedding", "Engine", "Prompt"]

TEMPLATE_NAMES = RESERVED | {"self", "deadline_s"}        # what template_arguments cannot set


@dataclass(frozen=True, slots=True)
class Embedding:
    """One prompt's state after the last norm, (hidden_size,) float32: the mean over its tokens, or its last token's."""

    vector: FloatArray
    prompt_tokens: int


class Engine:
    """One model on one backend.

        async with Engine(EngineConfig(weight_file="model.gguf")) as engine:
            stream = await engine.stream("Once upon a time", temperature=0.7)
            async for delta in stream:
                print(delta.text, end="")

    `progress` is called while loading, from the device thread. `backend` and `checkpoint` are used instead of what the config
    names (tests, benchmarks, own backends). With a dtype, Engine(config, "bf16") is vllm.rs's engine: it loads at once and
    its methods block (engine.synchronous).
    """

    def __new__(
        cls, config: EngineConfig | None = None, dtype: str | None = None, **keywords: object
    ) -> "Engine":
        if cls is Engine and dtype is not None:
            from engine.synchronous import SynchronousEngine  # lazily: it is built on this class

            return object.__new__(SynchronousEngine)     # whose __init__ is called next
        return object.__new__(cls)

    @overload
    def __init__(
        self, config: EngineConfig | None = None, *, progress: Progress | None = None, backend: Backend | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(  # type: ignore[misc]  # a call of this form makes the subclass: __new__
        self: "SynchronousEngine", config: EngineConfig | None, dtype: str, *, progress: Progress | None = None,
        backend: Backend | None = None, checkpoint: Checkpoint | None = None,
    ) -> None: ...  # fmt: skip
    def __init__(
        self, config: EngineConfig | None = None, dtype: str | None = None, *, progress: Progress | None = None,
        backend: Backend | None = None, checkpoint: Checkpoint | None = None,
    ) -> None:  # fmt: skip
        assert dtype is None, "SynchronousEngine keeps its dtype in the config"
        check_config(config)
        self.config = config or EngineConfig()
        self.metrics = Metrics()
        self._progress = progress or (lambda what, done, total: None)
        self._given_backend = backend
        self._given_checkpoint = checkpoint
        self._numbers = count(1)
        self._random = Random(self.config.seed) if self.config.seed is not None else None  # noqa: S311 (no secret)
        self._running: Running | None = None
        self._opened = False                             # or being opened
        self._closed = False
        self._group: anyio.abc.TaskGroup | None = None

    # ---- opening and closing --------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Engine":
        if self._opened or self._closed:
            raise EngineClosed("this engine was opened or closed already: make a new Engine")
        self._opened = True
        try:
            running = await load(
                self.config, self.metrics, self._report, self._check_wanted, backend=self._given_backend,
                checkpoint=self._given_checkpoint,
            )  # fmt: skip
        except BaseException:
            self._closed = True                          # what still loads on the device thread stops where it reports
            raise
        self._running = running
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._group.start_soon(_run, running, name="rillet-core")
        return self

    def _check_wanted(self) -> None:
        if self._closed:
            raise EngineClosed("the engine was closed while it loaded")

    def _report(self, what: str, done: int, total: int) -> None:
        """The progress of loading, called on the device thread; loading that nobody waits for any more ends here."""
        self._check_wanted()
        self._progress(what, done, total)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
        assert self._group is not None
        await self._group.__aexit__(None, None, None)

    async def drain(self, deadline_s: float = 30.0) -> None:
        """Refuse what is new, wait until the rest has ended; what has not after deadline_s ends with "abort"."""
        await self._here.core.drain(deadline_s)

    async def close(self) -> None:
        """End every stream, stop the loop, free the device; idempotent. Streams end with finish_reason "abort". An engine
        that still loads is closed as soon as the backend lets go, and entering it raises EngineClosed."""
        self._closed = True
        running = self._running
        if running is None or running.scope.cancel_called:
            return
        with anyio.CancelScope(shield=True):
            await running.core.drain(0)
            running.scope.cancel()
            try:
                await running.device.call(running.backend.close)
            finally:
                running.device.stop()

    @property
    def _live(self) -> Running:
        if self._running is None:
            raise EngineClosed("the engine is not open: use `async with Engine(...) as engine:`")
        return self._running

    @property
    def _here(self) -> Running:
        if current_token() != self._live.token:
            raise EngineClosed("the engine is open on another event loop: use it there, or open one here")
        return self._live

    @property
    def failure(self) -> Exception | None:
        """Why the engine is dead, or None."""
        return self._running.core.failure if self._running is not None else None

    async def wait_failed(self) -> Exception:
        """Return when the engine is dead, with why; a healthy engine keeps the caller waiting."""
        core = self._here.core
        await core.died.wait()
        assert core.failure is not None
        return core.failure

    # ---- asking ---------------------------------------------------------------------------------------------------

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None, **keywords: Any) -> Stream:
        """Admit a request. Everything that can be refused is refused here: InvalidRequest, ContextTooLong, Overloaded,
        EngineClosed. Sampling parameters are given as SamplingParams, as plain keywords, or both (keywords win); for
        messages, `template_arguments` (a dict) and `tools` (a list) reach the chat template."""
        running = self._here
        running.core.check_open()
        tools, arguments = keywords.pop("tools", None), keywords.pop("template_arguments", None) or {}
        _check_template_arguments(tools, arguments)
        wishes = self._resolve(merge(params, keywords))
        running.core.check_room(wishes.n)
        tokens = await running.prompts.tokens(prompt, tools, arguments)
        matchers = await running.grammars.matchers(wishes.grammar, tokens, wishes.n)
        return self._admit(tokens, wishes, matchers, pooling=None)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, **keywords: Any) -> Result:
        """Like stream, read to the end."""
        return await (await self.stream(prompt, params, **keywords)).collect()

    async def embed(self, prompt: Prompt, *, pooling: Literal["mean", "last"] = "mean") -> Embedding:
        """The prompt's state after the last norm, pooled over its tokens."""
        running = self._here
        running.core.check_open()
        if pooling not in ("mean", "last"):
            raise InvalidRequest(f"pooling must be mean or last, not {pooling!r}", field="pooling")
        if "hidden" not in running.backend.info.supports:
            raise InvalidRequest(f"the {running.backend.info.name} backend gives no states", field="pooling")
        wishes = self._resolve(SamplingParams(max_tokens=0))
        stream = self._admit(await running.prompts.tokens(prompt), wishes, [None], pooling=pooling)
        await stream.collect()
        pooled = stream.request.pooled
        if pooled is None:
            raise EngineClosed("the engine closed before the prompt was done")
        size = len(stream.request.prompt)
        return Embedding((pooled / np.float32(size) if pooling == "mean" else pooled).astype(np.float32), size)

    async def apply_chat_template(
        self, messages: Items[Message | Mapping[str, Any]], *, add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None, **arguments: Any,
    ) -> str:  # fmt: skip
        """The text that the model's chat template makes of messages."""
        _check_template_arguments(tools, arguments)
        return await self._live.prompts.render(messages, tools, arguments, add_generation_prompt)

    async def tokenize(
        self, prompt: Prompt, *, add_special: bool = True, tools: list[dict[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:  # fmt: skip
        """The token ids that stream() would run for this prompt; a text without those around it if not add_special."""
        arguments = template_arguments or {}
        _check_template_arguments(tools, arguments)
        return list(await self._live.prompts.tokens(prompt, tools, arguments, add_special=add_special))

    async def infill(self, prefix: str, suffix: str) -> list[int]:
        """Token ids that ask for what stands between the two; InvalidRequest if the vocabulary has no such tokens."""
        return await self._live.prompts.infill(prefix, suffix)

    async def look(self) -> Statistics:
        """statistics(), as it is asked of engines that may run elsewhere."""
        return self.statistics()

    # ---- from a prompt to a request -------------------------------------------------------------------------------

    def _resolve(self, params: SamplingParams) -> SamplingParams:
        running = self._live
        vocabulary = running.checkpoint.spec.vocabulary_size
        for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
            for token in ids:
                if token >= vocabulary:
                    raise InvalidRequest(f"{name} names token {token}, the vocabulary has {vocabulary}", field=name)
        wishes = params.with_defaults(self.config.sampling_defaults, running.checkpoint.sampling_defaults)
        supports = running.backend.info.supports
        wants_logprobs = wishes.logprobs is not None or wishes.prompt_logprobs is not None
        for word, field, wanted in (
            ("penalties", "repetition_penalty", wishes.penalized),
            ("bias", "logit_bias", bool(wishes.logit_bias)),
            ("logprobs", "logprobs", wants_logprobs),
            ("grammar", "grammar", wishes.grammar is not None),
        ):
            if wanted and word not in supports:
                raise InvalidRequest(f"the {running.backend.info.name} backend has no {word}", field=field)
        return wishes

    def _admit(
        self, tokens: tuple[int, ...], wishes: SamplingParams, matchers: Items[Matcher | None], pooling: str | None
    ) -> Stream:
        running = self._live
        limit = running.prompts.context_length
        if not tokens:
            raise InvalidRequest("the prompt has no tokens: give at least one character", field="prompt")
        room = limit - len(tokens)
        if room < (0 if wishes.max_tokens == 0 else 1):
            raise running.prompts.too_long(f"{len(tokens):,}")
        max_tokens = wishes.max_tokens if wishes.max_tokens is not None else self.config.max_tokens
        request = Request(
            number=next(self._numbers),
            prompt=tokens,
            params=wishes,
            limit=limit if max_tokens is None else min(limit, len(tokens) + max_tokens),
            end_ids=running.checkpoint.end_ids,
            seed=self._seed(wishes),
            mailbox=(mailbox := Mailbox(wishes.n)),
            salt=(wishes.cache_salt or "").encode("utf-8", "surrogatepass"),
            cached=self.config.prefix_cache,
            pooling=pooling,
        )
        tokenizer = running.checkpoint.tokenizer
        sink = Detokenizer(tokenizer, wishes.stop, wishes.skip_special_tokens, wishes.shown_token_ids)
        request.sequences += [Sequence(request, choice, sink.twin(), matcher) for choice, matcher in enumerate(matchers)]
        running.core.submit(request)
        return Stream(running.core, request, mailbox, running.on_loop)

    def _seed(self, wishes: SamplingParams) -> int:
        if wishes.seed is not None:
            return wishes.seed & (2**64 - 1)
        return self._random.getrandbits(64) if self._random is not None else secrets.randbits(64)

    # ---- looking at it --------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        return self._live.checkpoint.tokenizer

    @property
    def spec(self) -> ModelSpec:
        return self._live.checkpoint.spec

    @property
    def context_length(self) -> int:
        """The most tokens that a sequence may have here."""
        return self._live.prompts.context_length

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be prompts; without one only texts and token ids can."""
        return self._live.template_source is not None

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template that calls of tools go through, None without one."""
        return self._live.template_source

    @property
    def dialect(self) -> Dialect:
        """How this model calls tools and thinks."""
        return self._live.dialect

    @property
    def model_facts(self) -> ModelFacts:
        """Family, size and storage, for those who show them."""
        return self._live.facts

    @property
    def max_num_seqs(self) -> int:
        return self._live.scheduler.limits.max_num_seqs

    @property
    def device(self) -> str:
        """The device in words."""
        return self._live.backend.info.device

    @property
    def sampling_defaults(self) -> dict[str, float | int]:
        """What holds for a request that does not say: the flags over what the model's makers advise."""
        return {**self._live.checkpoint.sampling_defaults, **self.config.sampling_defaults}

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self.config.served_model_name or self._hub_id or self._live.checkpoint.name

    @cached_property
    def _hub_id(self) -> str | None:
        """model_id, unless it is a path on this disk, which is nobody's business."""
        wanted = self.config.model_id
        return None if wanted is None or is_path(wanted) else wanted

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name that a request may call the model by."""
        own = (self.model_name, self._hub_id, self._live.checkpoint.name)
        names = [name for name in own if name]
        return tuple(dict.fromkeys([*names, *(name.rsplit("/", 1)[-1] for name in names), "default"]))

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModel unless `name` is one of model_names, or not given."""
        check_name(name, self.model_names)

    def statistics(self) -> Statistics:
        running = self._live
        scheduler, memory = running.scheduler, running.backend.memory()
        counts = scheduler.pool.counts()
        return Statistics(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            pages=scheduler.pool.pages,
            page_tokens=scheduler.pool.page_tokens,
            pages_free=counts.free,
            pages_cached=counts.cached + counts.pinned,
            pages_held=counts.held + counts.limbo,
            cache_sessions=scheduler.pool.sessions,
            weights_bytes=memory.weights_bytes,
            cache_bytes=memory.cache_bytes,
            scratch_bytes=memory.scratch_bytes,
            metrics=self.metrics,
        )


async def _run(running: Running) -> None:
    """The loop in a scope of its own: ending it must not cancel the block that the engine is used in."""
    with running.scope:
        await running.core.run()


def check_config(config: object) -> None:
    """Raise ConfigError for what is no EngineConfig, such as a path."""
    if config is not None and not isinstance(config, EngineConfig):
        raise ConfigError(f"Engine takes an EngineConfig, not {config!r:.80}: write EngineConfig(weight_file=...)")


def _check_template_arguments(tools: object, arguments: object) -> None:
    if tools is not None and not isinstance(tools, list | tuple):
        raise InvalidRequest(f"tools must be a list, not {repr(tools)[:40]}", field="tools")
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        message = f"template_arguments must map names to values, not {repr(arguments)[:40]}"
        raise InvalidRequest(message, field="template_arguments")
    if clash := arguments.keys() & TEMPLATE_NAMES:
        raise InvalidRequest(f"{min(clash)!r} cannot be given to the template: leave it out", field="template_arguments")
