"""SynchronousEngine: what Engine(config, "bf16") makes. vllm.rs's Python API, whose calls block, over the async engine.

The engine runs on an event loop of its own in a thread; calls may come from any thread but that one, also from several at
once. A call inside a running event loop blocks that loop: use the async engine there. An engine that is never closed is
closed when it is garbage, or when the main thread ends.
"""

import logging
import weakref
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from time import monotonic, time
from types import TracebackType
from typing import Any, Literal, overload

from engine.api import Engine, check_config
from engine.backend import Backend, Progress
from engine.background import SLICE_S, Host
from engine.batch import Answer, answer_all
from engine.config import DTYPE_NAMES, EngineConfig
from engine.errors import ConfigError, EngineClosed, InvalidRequest
from engine.metrics import Statistics
from engine.prompts import Prompt
from engine.sampling import SamplingParams
from engine.stream import Stream
from engine.text.messages import Message
from engine.weights.checkpoint import Checkpoint

__all__ = ["EngineStream", "GenerationOutput", "StreamItem", "SynchronousEngine"]

log = logging.getLogger("rillet")
DTYPES = ("f16", "bf16", "f32")


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """One answer. Times are milliseconds since 1970: admitted, first token, last token."""

    seq_id: int
    prompt_length: int
    prompt_start_time: int
    decode_start_time: int
    decode_finish_time: int
    decoded_length: int
    decode_output: str


@dataclass(frozen=True, slots=True)
class StreamItem:
    """TOKEN: a piece of text. DONE: (prompt_start_ms, decode_start_ms, decode_finish_ms, decoded_length). ERROR: a text.

    TOKEN_ID and COMPLETION exist in vllm.rs for its own generate_sync; a stream yields them neither there nor here.
    """

    datatype: Literal["TOKEN", "TOKEN_ID", "COMPLETION", "DONE", "ERROR"]
    data: Any


class SynchronousEngine(Engine):
    """An Engine that loads when it is made and whose methods block. `with` closes it; so does close().

    An interrupt (Ctrl-C) during a call ends the call and cancels its request.
    """

    def __init__(
        self, config: EngineConfig | None, dtype: str, *, progress: Progress | None = None, backend: Backend | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:  # fmt: skip
        check_config(config)
        dtype = DTYPE_NAMES.get(dtype, dtype)
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        config = config or EngineConfig()
        if config.dtype not in ("auto", dtype):
            raise ConfigError(f"dtype is {dtype!r} here and {config.dtype!r} in the config: leave the config's out")
        config = replace(config, dtype=dtype)
        super().__init__(config)
        self._host = host = Host(lambda: Engine(config, progress=progress, backend=backend, checkpoint=checkpoint))
        weakref.finalize(self, host.stop).atexit = False
        inner = host.load()
        self._running, self.metrics = inner._running, inner.metrics

    @property
    def econfig(self) -> EngineConfig:
        """The config, with the dtype of this engine."""
        return self.config

    @overload  # type: ignore[override]  # blocking, where Engine's is a coroutine
    def apply_chat_template(
        self, messages: Items[Message | Mapping[str, Any]], log: bool = False, *, add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None, **arguments: Any,
    ) -> str: ...  # fmt: skip
    @overload
    def apply_chat_template(
        self, params: SamplingParams, messages: Items[Message | Mapping[str, Any]], log: bool = False
    ) -> str: ...
    def apply_chat_template(self, *given: Any, **keywords: Any) -> str:
        """The text that the model's chat template makes of messages, as (messages, log) or (params, messages, log).

        `log` writes it to the log, level info. params change nothing: a session's earlier messages are never left out.
        """
        positional = [value for value in given if not isinstance(value, SamplingParams)]
        keywords.pop("params", None)
        keywords.update(zip(("messages", "log"), positional, strict=False))
        messages, wants_log = keywords.pop("messages", None), keywords.pop("log", False)
        if not isinstance(messages, Items) or isinstance(messages, str) or len(positional) > 2:
            raise InvalidRequest("apply_chat_template takes (messages, log) or (params, messages, log)", field="messages")
        text = self._host.call(lambda engine: engine.apply_chat_template(messages, **keywords))
        if wants_log:
            log.info("prompt: %r", text)
        return text

    def generate_sync(self, params: SamplingParams | Items[SamplingParams], prompts: Items[Prompt]) -> list[GenerationOutput]:
        """Answer all prompts as one batch, in their order; params for each, or one for all. A prompt that is refused is
        raised: InvalidRequest, ContextTooLong, Overloaded, EngineClosed."""
        if not isinstance(prompts, Items) or isinstance(prompts, str):
            raise InvalidRequest("prompts must be a list: put a single one into [ ]", field="prompts")
        if not isinstance(params, SamplingParams | Items):
            raise InvalidRequest(f"params must be SamplingParams or a list of them, not {repr(params)[:40]}", field="params")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            message = f"{len(each)} params for {len(prompts)} prompts: give one for each, or a single one for all"
            raise InvalidRequest(message, field="params")
        asked = [(prompt, _plain_wishes(wishes)) for prompt, wishes in zip(prompts, each, strict=True)]
        return [_output(answer) for answer in self._host.call(lambda engine: answer_all(engine, asked))]

    def generate_stream(self, params: SamplingParams, prompt: Prompt) -> "tuple[int, int, EngineStream]":
        """(seq_id, tokens of the prompt, stream of the answer); refuses like generate_sync."""
        wishes, items = _plain_wishes(params), SimpleQueue[StreamItem | None]()
        host = self._host
        admitted: list[Stream] = []

        async def ask(engine: Engine) -> Stream:
            stream = await engine.stream(prompt, wishes)
            host.start(_pump(stream, items), lambda: items.put(None))
            admitted.append(stream)
            return stream

        try:
            stream = EngineStream(self, host, host.call(ask), items)
        except BaseException:                            # an interrupt may come when it was admitted just now
            for late in admitted:
                host.call_soon(late.cancel)
            raise
        return stream.seq_id, stream.prompt_length, stream

    def get_num_cached_tokens(self) -> int:
        """Tokens that the prefix cache holds, pinned ones included, in pages that nobody uses now."""
        statistics = self.statistics()
        return statistics.pages_cached * statistics.page_tokens

    def statistics(self) -> Statistics:
        async def look(engine: Engine) -> Statistics:
            return engine.statistics()

        return self._host.call(look)

    def close(self) -> None:  # type: ignore[override]  # blocking, where Engine's is a coroutine
        """End every request, free the device; idempotent. Streams end with an ERROR item."""
        self._host.stop()
        self._host.join()

    def __enter__(self) -> "SynchronousEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Engine:
        raise EngineClosed("Engine(config, dtype) runs already, and blocks: for `async with`, leave the dtype out")


class EngineStream:
    """Iterate it for StreamItems: TOKEN ..., then DONE or ERROR; after cancel() only what had come already. Dropping it
    cancels it. `finished` is set with the last item."""

    def __init__(
        self, engine: SynchronousEngine, host: "Host", stream: Stream, items: "SimpleQueue[StreamItem | None]"
    ) -> None:
        self.seq_id = stream.request.number
        self.prompt_length = len(stream.prompt_token_ids)
        self.finished = False
        self.cancelled = False
        self._engine = engine                            # lives as long as its stream
        self._host = host
        self._cancel = stream.cancel
        self._items = items

    def __iter__(self) -> "EngineStream":
        return self

    def __next__(self) -> StreamItem:
        while not self.finished:
            try:
                item = self._items.get(timeout=SLICE_S)
            except Empty:
                continue
            except BaseException:                        # an interrupt
                self.cancel()
                raise
            if item is None and not self.cancelled:
                item = StreamItem("ERROR", "the engine was closed before the answer was done")
            self.finished = item is None or item.datatype in ("DONE", "ERROR")
            if item is not None:
                return item
        raise StopIteration

    def cancel(self) -> None:
        """End the answer; harmless if it has ended."""
        self.cancelled = True
        self._host.call_soon(self._cancel)

    def __del__(self) -> None:
        if not self.finished:
            self.cancel()


async def _pump(stream: Stream, items: "SimpleQueue[StreamItem | None]") -> None:
    answer = Answer.of(stream)
    try:
        async with stream:
            async for delta in stream:
                answer.take(delta)
                if delta.text:
                    items.put(StreamItem("TOKEN", delta.text))
    except Exception as error:                           # whatever it is, the reader must hear of it
        items.put(StreamItem("ERROR", str(error)))
    else:
        if answer.finish_reason != "abort":
            items.put(StreamItem("DONE", (*_times(answer), answer.tokens)))


def _plain_wishes(params: SamplingParams) -> SamplingParams:
    """A copy for one request. What these calls have no place for in their results is refused."""
    if not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params must be SamplingParams, not {repr(params)[:40]}", field="params")
    for name, off in (("n", 1), ("logprobs", None), ("prompt_logprobs", None)):
        if getattr(params, name) != off:
            message = f"{name} is {getattr(params, name)}: the async Engine has it, these calls do not"
            raise InvalidRequest(message, field=name)
    return replace(params)


def _times(answer: Answer) -> tuple[int, int, int]:
    offset = time() - monotonic()
    began, first, last = (round((offset + at) * 1000) for at in (answer.began_s, answer.first_s, answer.last_s))
    return began, first, last


def _output(answer: Answer) -> GenerationOutput:
    return GenerationOutput(answer.number, answer.prompt_tokens, *_times(answer), answer.tokens, answer.text)
