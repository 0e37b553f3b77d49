"""RemoteEngine on asyncio and trio, against an engine served over a real loopback socket: it behaves as Engine does, a slow
reader costs nobody anything, and what a client leaves behind is freed."""

import gc
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import pytest

from engine import (
    BadModelFile,
    ContextTooLong,
    Engine,
    EngineClosed,
    EngineConfig,
    Grammar,
    InvalidRequest,
    Message,
    Overloaded,
    RemoteEngine,
    RilletError,
    SamplingParams,
    StepFailed,
    UnknownModel,
)
from engine import errors as tree
from engine.deltas import Delta
from engine.remote_messages import (
    Call,
    decode_from_client,
    encode,
    frame_of,
    pack_error,
    pack_params,
    unpack_error,
    unpack_params,
)
from engine.remote_service import EngineService
from engine.remote_serving import ITEMS_AHEAD, MOST_LOGPROBS
from engine.sequence import Logprob, TokenLogprobs
from engine.step import StepOutput
from engine.text.dialects import TOOLS, choose_dialect
from engine.weights.checkpoint import Checkpoint
from engine.wire import LENGTH, WireError, connect, new_secret
from engine.wire_async import Address, FrameStream, dial
from tests.support.served import remote, served
from tests.support.toy import ToyBackend, ToyTicket

pytestmark = pytest.mark.anyio
Opener = Callable[..., Engine]


@pytest.fixture
def toy(tiny_checkpoint: Callable[[], Checkpoint]) -> Opener:
    def make(backend: ToyBackend | None = None, **config: object) -> Engine:
        return Engine(EngineConfig(**config), backend=backend or ToyBackend(), checkpoint=tiny_checkpoint())

    return make


class Gated(ToyBackend):
    """Every step waits while `gate` is cleared; `fault` is raised by it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None

    def wait(self, ticket: ToyTicket) -> StepOutput:
        assert self.gate.wait(20)
        if self.fault is not None:
            raise self.fault
        return super().wait(ticket)


async def eventually(condition: Callable[[], Any]) -> None:
    """The one place that polls."""
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110
            await anyio.sleep(0.005)


async def test_answers_are_those_of_the_engine_itself(toy: Opener) -> None:
    wishes: list[dict[str, Any]] = [
        {"max_tokens": 9, "temperature": 0, "ignore_eos": True},
        {"max_tokens": 12, "temperature": 1.0, "seed": 2**64 - 1, "n": 3, "ignore_eos": True, "logprobs": 3},
        {"max_tokens": 2, "prompt_logprobs": 2, "temperature": 0, "logit_bias": {7: 5.0}, "frequency_penalty": 0.5},
        {"max_tokens": 20, "temperature": 0.7, "seed": 5, "stop": ["a", "b"], "cache_salt": "\ud83d", "session_id": "s"},
        {"max_tokens": 0, "prompt_logprobs": 1},
    ]
    prompts: list[Any] = ["Once upon", [5, 6, 7], np.array([5, 6, 7, 8]), (np.int64(9), 10), [11]]
    async with toy(seed=1) as here, served(toy(seed=1)) as (_, address), remote(address) as there:
        for prompt, wish in zip(prompts, wishes, strict=True):
            wanted = await here.generate(prompt, **wish)
            assert asdict(await (await there.stream(prompt, **wish)).collect()) == asdict(wanted)
        for name in (
            "model_name", "model_names", "context_length", "max_num_seqs", "device", "has_chat_template", "sampling_defaults",
            "dialect", "chat_template", "model_facts",
        ):  # fmt: skip
            assert getattr(there, name) == getattr(here, name)
        for name in ("pieces", "special_ids", "bos_id"):
            assert getattr(there.tokenizer, name) == getattr(here.tokenizer, name)
        assert there.tokenizer.decode([70, 71, 1]) == here.tokenizer.decode([70, 71, 1])
        assert await there.tokenize("abc", add_special=False) == await here.tokenize("abc", add_special=False)
        assert (await there.look()).pages == here.statistics().pages
        metrics = (await there.look()).metrics
        assert metrics.generation_tokens_total == here.metrics.generation_tokens_total
        assert metrics.request_success == here.metrics.request_success
        assert metrics.request_prompt_tokens.counts == here.metrics.request_prompt_tokens.counts


@pytest.mark.parametrize(
    ("prompt", "wishes"),
    [
        ([1, 99999], {}),
        ([], {}),
        (5, {}),
        ([1] * 5000, {}),
        ("a", {"logit_bias": {99999: 1}}),
        ("a", {"template_arguments": {"messages": 1}}),
        ("a", {"template_arguments": [1]}),
        ("a", {"tools": 5}),
        ("a", {"n": 100}),
        ([Message("user", "x")], {"template_arguments": {"tools": 1}}),
        ([{"role": 5}], {}),
        ("a", {"no_such": 1}),
        ("a", {"max_tokens": -1}),
    ],
)
async def test_refusals_are_those_of_the_engine_itself(toy: Opener, prompt: Any, wishes: dict[str, Any]) -> None:
    async def refusal(engine: Engine | RemoteEngine) -> tuple[Any, ...]:
        with pytest.raises(RilletError) as caught:
            await engine.stream(prompt, **wishes)
        error = caught.value
        return type(error), str(error), getattr(error, "field", None), getattr(error, "retry_after_s", None)

    async with toy(max_waiting=50) as here, served(toy(max_waiting=50)) as (_, address), remote(address) as there:
        assert await refusal(there) == await refusal(here)
        assert (await there.look()).num_requests_running == 0


async def test_other_refusals(toy: Opener) -> None:
    async with served(toy()) as (_, address), remote(address) as engine:
        with pytest.raises(UnknownModel, match="other"):
            engine.check_model("other")
        engine.check_model("default")
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            await engine.stream("a", template_arguments={"x": object()})
        with pytest.raises(InvalidRequest, match="pooling"):
            await engine.embed("a", pooling="most")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="shorten it"):
            await engine.stream("x" * (65 << 20))
        assert (await (await engine.stream("a", max_tokens=1)).collect()).usage.completion_tokens == 1


def test_every_error_of_the_tree_crosses_the_wire() -> None:
    made = [
        ContextTooLong("too long", field="prompt"), Overloaded("later", retry_after_s=2.5),
        BadModelFile("it is damaged", file="x.gguf", tensor="blk.0"), BadModelFile("it is damaged", file="x.gguf"),
        InvalidRequest("half a pair \ud83d"), *(
            getattr(tree, name)("words") for name in tree.__all__ if name not in ("BadModelFile", "Overloaded")
        ),
    ]  # fmt: skip
    for error in made:
        again = unpack_error(pack_error(error))
        assert type(again) is type(error)
        assert str(again) == str(error).replace("\ud83d", "?")
        assert vars(again) == vars(error)
    assert isinstance(unpack_error(pack_error(KeyError("x"))), RuntimeError)


async def test_tokens_come_one_by_one_and_a_cancelled_reader_frees_pages(toy: Opener) -> None:
    backend = Gated(pages=100)
    async with served(toy(backend)) as (_, address), remote(address) as engine:
        stream = await engine.stream([5, 6, 7], max_tokens=200, ignore_eos=True)
        assert (await anext(stream)).token_ids
        assert (await engine.look()).pages_held > 0
        await stream.aclose()
        await stream.aclose()
        assert stream.ready
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        with anyio.fail_after(20):
            while (await engine.look()).pages_held:
                await anyio.lowlevel.checkpoint()
        assert (await engine.look()).metrics.request_success["abort"] == 1


async def test_cancel_gives_the_last_deltas(toy: Opener) -> None:
    async with served(toy(Gated(pages=100))) as (_, address), remote(address) as engine:
        stream = await engine.stream([5, 6, 7], max_tokens=200, ignore_eos=True, n=2)
        await anext(stream)
        stream.cancel()
        deltas = [delta async for delta in stream]
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["abort", "abort"]
        assert sum(delta.usage is not None for delta in deltas) == 1


async def test_a_call_that_is_cancelled_leaves_nothing(toy: Opener) -> None:
    backend = Gated(pages=100)
    backend.gate.clear()
    engine = toy(backend)
    async with served(engine) as (_, address), remote(address) as client:
        async def ask(moment: int) -> None:
            await (await client.stream([5, 6, moment])).aclose()

        for moment in range(12):                         # at different points of the admission
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as group:
                    group.start_soon(ask, moment)
                    for _ in range(moment):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
        backend.gate.set()
        await eventually(lambda: engine.statistics().pages_held == 0 and not engine.statistics().num_requests_waiting)
        assert not client._link.mailboxes


async def test_a_connection_that_drops_ends_its_streams_and_no_others(toy: Opener) -> None:
    engine = toy(Gated(pages=500))
    async with served(engine) as (_, address), remote(address) as staying:
        kept = await staying.stream([1, 2], max_tokens=150, ignore_eos=True)
        async with AsyncExitStack() as stack:
            leaving = await stack.enter_async_context(remote(address))
            streams = [await leaving.stream([5, 6, i], max_tokens=200, ignore_eos=True) for i in range(5)]
            await anext(streams[0])
            for stream in streams:
                stream._mailbox.open = 0                 # or they would warn
            assert leaving._group is not None
            leaving._group.cancel_scope.cancel()         # the connection closes, without a word
        result = await kept.collect()
        assert result.usage.completion_tokens == 150
        await eventually(lambda: engine.statistics().pages_held == 0)
        assert engine.metrics.request_success == {"abort": 5, "length": 1}


async def test_a_dropped_stream_is_noticed(toy: Opener) -> None:
    engine = toy(Gated(pages=100))
    async with served(engine) as (_, address), remote(address) as client:
        stream = await client.stream([5, 6, 7], max_tokens=200, ignore_eos=True)
        with pytest.warns(ResourceWarning, match="dropped before its end"):
            del stream
            gc.collect()
        await eventually(lambda: engine.metrics.request_success["abort"] == 1)


async def test_a_slow_reader_holds_nobody_up_and_loses_nothing(toy: Opener) -> None:
    engine = toy(Gated(pages=2000))
    async with served(engine) as (_, address), remote(address) as client:
        wish = {"max_tokens": 400, "temperature": 0, "ignore_eos": True}
        slow = await client.stream([5, 6, 7], **wish)
        for _ in range(3):
            quick = await (await client.stream([5, 6, 7], **wish)).collect()
            assert quick.usage.completion_tokens == 400
        await eventually(lambda: engine.metrics.request_success["length"] == 4)
        assert slow._mailbox.unread == ITEMS_AHEAD, "the service sends a few ahead and joins the rest"
        assert slow.usage.completion_tokens < 400
        deltas = [delta async for delta in slow]
        assert [token for delta in deltas for token in delta.token_ids] == quick.token_ids
        assert "".join(delta.text for delta in deltas) == quick.text
        assert slow.usage == quick.usage
        assert len(deltas) <= 3


async def test_many_readers_at_their_own_pace(toy: Opener) -> None:
    engine = toy(Gated(pages=4000, max_num_seqs=32))
    seen: dict[int, int] = {}
    async with served(engine) as (_, address), remote(address) as client:
        async def read(number: int) -> None:
            stream = await client.stream([number, 2], max_tokens=100 + number, ignore_eos=True, temperature=0)
            seen[number] = 0
            async for delta in stream:
                seen[number] += len(delta.token_ids)
                for _ in range(number % 7):
                    await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            for number in range(40):
                group.start_soon(read, number)
    assert seen == {number: 100 + number for number in range(40)}


def logprobs(count: int) -> list[TokenLogprobs]:
    return [TokenLogprobs(i, -float(i), (Logprob(i, -1.0), Logprob(i + 1, -2.0))) for i in range(count)]


async def test_long_lists_of_logprobs_are_cut_and_put_together_again(toy: Opener) -> None:
    """A reader that slept through many tokens, and a long prompt: more than a frame would hold, here and there."""
    size = 2 * MOST_LOGPROBS + 5
    engine = toy()
    async with served(engine) as (_, address), remote(address) as client:
        original = Engine.stream

        async def stream(*arguments: Any, **keywords: Any) -> Any:
            made = await original(engine, *arguments, **keywords)
            made.request.prompt_logprobs[:] = logprobs(ITEMS_AHEAD * MOST_LOGPROBS + size)
            made._mailbox.pending[0] = Delta(0, "text", list(range(size)), logprobs(size))
            return made

        engine.stream = stream  # type: ignore[method-assign]
        result = await (await client.stream("a", max_tokens=1, prompt_logprobs=2, logprobs=2)).collect()
    assert result.prompt_logprobs[: size + ITEMS_AHEAD * MOST_LOGPROBS] == logprobs(ITEMS_AHEAD * MOST_LOGPROBS + size)
    assert result.token_ids[:size] == list(range(size))
    assert result.choices[0].logprobs is not None
    assert result.choices[0].logprobs[:size] == logprobs(size)
    assert result.finish_reason == "length"


async def test_an_engine_that_dies_ends_streams_with_its_error(toy: Opener) -> None:
    backend = Gated(pages=100)
    async with served(toy(backend)) as (_, address), remote(address) as client:
        streams = [await client.stream([5, 6, i], max_tokens=100, ignore_eos=True) for i in range(3)]
        backend.fault = RuntimeError("the device burned")
        for stream in streams:
            with pytest.raises(StepFailed, match="the device burned"):
                await stream.collect()
        assert isinstance(await client.wait_failed(), StepFailed)
        with pytest.raises(EngineClosed, match="the device burned"):
            await client.stream("a")
        assert isinstance(client.failure, StepFailed)


async def test_a_service_that_vanishes_ends_everything_that_waits(toy: Opener) -> None:
    backend = Gated(pages=100)
    async with served(toy(backend)) as (service, address), remote(address) as client:
        stream = await client.stream([5, 6, 7], max_tokens=100, ignore_eos=True)
        backend.gate.clear()
        seen: list[Exception] = []

        async def read() -> None:
            try:
                await stream.collect()
            except Exception as error:
                seen.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(read)
            for peer in service.peers:
                await peer._frames.aclose()
            assert "engine process" in str(await client.wait_failed())
        backend.gate.set()
        assert [type(error) for error in seen] == [EngineClosed]
        with pytest.raises(EngineClosed, match="dead"):
            await client.look()


async def test_draining_a_client_is_its_own_matter(toy: Opener) -> None:
    backend = Gated(pages=500)
    async with served(toy(backend)) as (_, address), remote(address) as one, remote(address) as other:
        short = await one.stream([5, 6], max_tokens=5, ignore_eos=True)
        await one.drain(20)
        with pytest.raises(EngineClosed, match="takes no new"):
            await one.stream("a")
        assert [delta.finish_reason async for delta in short][-1] == "length"
        long = await other.stream([5, 6], max_tokens=200, ignore_eos=True)
        backend.gate.clear()
        async with anyio.create_task_group() as group:
            group.start_soon(other.drain, 0)
            reasons = [delta.finish_reason async for delta in long]
            backend.gate.set()
        assert reasons[-1] == "abort"


async def test_leaving_the_block_ends_streams(toy: Opener) -> None:
    engine = toy(Gated(pages=500))
    async with served(engine) as (_, address):
        async with remote(address) as client:
            stream = await client.stream([5, 6], max_tokens=200, ignore_eos=True)
        assert [delta.finish_reason async for delta in stream][-1] == "abort"
        await client.close()
        with pytest.raises(EngineClosed):
            await client.__aenter__()
        await eventually(lambda: engine.statistics().pages_held == 0)


class HeldLoading(ToyBackend):
    """load() reports, waits for `release` and raises `fault`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.release = threading.Event()
        self.fault: Exception | None = None

    def load(self, *arguments: Any) -> None:
        arguments[-1]("reading weights", 3, 7)
        assert self.release.wait(20)
        if self.fault is not None:
            raise self.fault
        super().load(*arguments)


@pytest.mark.parametrize("fault", [None, BadModelFile("it is damaged", file="x.gguf", tensor="blk.0")])
async def test_loading_is_told_and_what_it_raised(
    tiny_checkpoint: Callable[[], Checkpoint], fault: BadModelFile | None
) -> None:
    backend = HeldLoading()
    backend.fault = fault
    told: list[tuple[str, int, int]] = []
    addresses: list[Address] = []

    def progress(*news: Any) -> None:
        told.append(news)
        if news == ("reading weights", 3, 7):
            backend.release.set()

    service = EngineService(
        lambda report: Engine(EngineConfig(), progress=report, backend=backend, checkpoint=tiny_checkpoint())
    )
    async with anyio.create_task_group() as group:
        group.start_soon(service.run, addresses.append)
        await eventually(lambda: addresses)
        client = RemoteEngine(lambda: dial(addresses[0]), progress=progress)
        if fault is None:
            async with client:
                assert client.model_name
        else:
            with pytest.raises(BadModelFile, match=r"x\.gguf: tensor blk\.0: it is damaged"):
                await client.__aenter__()
        group.cancel_scope.cancel()
    assert ("reading weights", 3, 7) in told


async def read_all(frames: FrameStream) -> None:
    while True:
        await frames.receive()


async def test_strangers_are_turned_away_and_hold_nobody_up(toy: Opener, caplog: pytest.LogCaptureFixture) -> None:
    async with served(toy()) as (service, address):
        with pytest.raises(WireError):
            await dial(Address(address.port, new_secret()))
        assert "without the secret" in caplog.text
        silent = [await anyio.connect_tcp("127.0.0.1", address.port) for _ in range(50)]
        async with remote(address) as client:
            assert (await (await client.stream("a", max_tokens=1)).collect()).finish_reason
        assert not service.peers or len(service.peers) <= 1
        for stream in silent:
            await stream.aclose()
        for said in (LENGTH.pack(10) + b"\x91\x99nonsense", LENGTH.pack(2**32 - 1), LENGTH.pack(0)):
            frames = await dial(address)
            await frames._stream.send(said)
            with pytest.raises(WireError):
                await read_all(frames)
            await frames.aclose()
        async with remote(address) as client:
            assert (await client.look()).pages_held == 0


async def test_the_threads_side_of_the_wire_speaks_the_same_bytes(toy: Opener) -> None:
    async with served(toy()) as (_, address):
        connection = await anyio.to_thread.run_sync(connect, address.port, address.secret)
        frame = await anyio.to_thread.run_sync(lambda: connection.receive(wait_s=20))
        assert b"tiny" in frame or b"starting" in frame
        connection.close()


TEMPLATES = [" ".join(["{{ tools }}", *tool.signs[0]]) for tool in TOOLS.values()]


@pytest.mark.parametrize("source", [None, "", "{{ tools }}<think></think>", *TEMPLATES])
def test_the_names_of_a_dialect_and_its_template_give_the_same_dialect(source: str | None) -> None:
    dialect = choose_dialect(source)
    assert choose_dialect(source, tools=dialect.tools or "none", reasoning=dialect.reasoning or "none") == dialect


def test_parameters_are_checked_again_where_they_arrive() -> None:
    grammar = Grammar("regex", "a+", ("<think>", "</think>"))
    params = SamplingParams(stop=["x"], grammar=grammar, logit_bias={5: 1.0}, stop_token_ids=[3], seed=-5, n=2)
    (call,) = decode_from_client(frame_of([encode(Call(1, "stream", {"params": pack_params(params)}))]))
    assert isinstance(call, Call)
    assert unpack_params(call.arguments["params"]) == params
    with pytest.raises(InvalidRequest):
        unpack_params({"n": 10**6})
