"""Opening and closing the async engine at odd moments, and what reaches the chat template, on asyncio and trio."""

import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from engine import ConfigError, Engine, EngineClosed, EngineConfig, InvalidRequest, Message, UnknownModel
from engine.backend import LoadOptions, Progress
from engine.model.spec import ModelSpec
from engine.weights.checkpoint import Checkpoint
from engine.weights.open_model import open_model
from engine.weights.tensors import TensorSource
from tests.support.toy import ToyBackend

pytestmark = pytest.mark.anyio
Opener = Callable[..., Engine]


@pytest.fixture
def toy(tiny_checkpoint: Callable[[], Checkpoint]) -> Opener:
    def make(backend: ToyBackend | None = None, **config: object) -> Engine:
        return Engine(EngineConfig(**config), backend=backend or ToyBackend(), checkpoint=tiny_checkpoint())

    return make


class HeldLoading(ToyBackend):
    """load() waits for `release`, then reports `reports` times."""

    reports = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loading, self.release, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.finished = False

    def load(self, spec: ModelSpec, tensors: TensorSource, options: LoadOptions, progress: Progress) -> None:
        self.loading.set()
        assert self.release.wait(20)
        for _ in range(self.reports):
            progress("loading", 0, 1)
        super().load(spec, tensors, options, lambda what, done, total: None)
        self.finished = True

    def close(self) -> None:
        super().close()
        self.ended.set()


async def refused(engine: Engine, words: str) -> None:
    with pytest.raises(EngineClosed, match=words):
        await engine.__aenter__()


async def test_an_engine_is_opened_once_also_while_it_loads(toy: Opener) -> None:
    backend = HeldLoading()
    engine = toy(backend)
    async with anyio.create_task_group() as group:
        async def use() -> None:
            async with engine:
                assert (await engine.generate([1], max_tokens=1)).finish_reason == "length"

        group.start_soon(use)
        await anyio.to_thread.run_sync(backend.loading.wait)
        await refused(engine, "opened or closed already")
        backend.release.set()
    await refused(engine, "opened or closed already")


@pytest.mark.parametrize("reports", [0, 1])
async def test_closing_while_it_loads_ends_loading_and_frees_the_device(toy: Opener, reports: int) -> None:
    """At the next report of progress, or at the end of loading if none comes."""
    backend = HeldLoading()
    backend.reports = reports
    engine = toy(backend)
    async with anyio.create_task_group() as group:
        group.start_soon(refused, engine, "closed while it loaded")
        await anyio.to_thread.run_sync(backend.loading.wait)
        await engine.close()
        backend.release.set()
    assert await anyio.to_thread.run_sync(backend.ended.wait, 20)
    assert backend.finished == (reports == 0)
    await refused(engine, "opened or closed already")


async def test_cancelling_whoever_opens_it_ends_loading(toy: Opener) -> None:
    backend = HeldLoading()
    async with anyio.create_task_group() as group:
        group.start_soon(toy(backend).__aenter__)
        await anyio.to_thread.run_sync(backend.loading.wait)
        group.cancel_scope.cancel()
    backend.release.set()
    assert await anyio.to_thread.run_sync(backend.ended.wait, 20)
    assert not backend.finished


async def test_one_that_was_closed_before_it_was_opened_stays_closed(toy: Opener) -> None:
    engine = toy()
    await engine.close()
    await refused(engine, "opened or closed already")


def test_an_engine_can_be_made_outside_of_any_loop(toy: Opener) -> None:
    engine = toy()

    async def use() -> None:
        async with engine:
            await engine.generate([1], max_tokens=1)

    anyio.run(use)


async def test_what_is_not_built_yet_is_refused_when_it_loads(toy: Opener) -> None:
    backend = ToyBackend()
    with pytest.raises(ConfigError, match=r"--isq Q4_K: quantizing while loading is not built yet.*GGUF"):
        await toy(backend, isq="q4k").__aenter__()


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"template_arguments": {1: 2}}, "template_arguments"),
        ({"template_arguments": "thinking"}, "template_arguments"),
        ({"template_arguments": {"messages": []}}, "template_arguments"),
        ({"template_arguments": {"add_generation_prompt": False}}, "template_arguments"),
        ({"template_arguments": {"tools": []}}, "template_arguments"),
        ({"template_arguments": {"deadline_s": 1e9}}, "template_arguments"),
        ({"template_arguments": {"self": 1}}, "template_arguments"),
        ({"tools": 5}, "tools"),
        ({"tools": {"a": 1}}, "tools"),
    ],
)
async def test_wrong_arguments_of_the_template_are_refused_by_field(
    toy: Opener, keywords: dict[str, object], field: str
) -> None:
    async with toy() as engine:
        assert engine.has_chat_template
        for prompt in ([Message("user", "hi")], "a text"):
            with pytest.raises(InvalidRequest) as caught:
                await engine.stream(prompt, **keywords)
            assert caught.value.field == field


@pytest.mark.parametrize("lookahead", [True, False])
async def test_tokens_are_counted_when_a_request_gets_them(toy: Opener, lookahead: bool) -> None:
    """Not what the step in flight still draws for a sequence that has ended."""
    async with toy(lookahead=lookahead) as engine:
        free = await engine.generate([8, 8], max_tokens=12, temperature=0, ignore_eos=True)
        results = [free] + [
            await engine.generate([8, 8], max_tokens=12, temperature=0, ignore_eos=True, stop_token_ids=[token], n=2)
            for token in set(free.token_ids[:6])
        ]
        total = sum(result.usage.completion_tokens for result in results)
        assert engine.metrics.generation_tokens_total == total


class FailingLoading(ToyBackend):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.ended = threading.Event()

    def load(self, spec: ModelSpec, tensors: TensorSource, options: LoadOptions, progress: Progress) -> None:
        raise MemoryError("no room")

    def close(self) -> None:
        self.ended.set()


@pytest.mark.parametrize("backend", [ToyBackend, FailingLoading])
async def test_the_model_s_files_are_closed_when_it_is_loaded_and_when_loading_fails(
    backend: type[ToyBackend], tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Checkpoint] = []

    def spy(config: EngineConfig) -> Checkpoint:
        opened.append(open_model(config))
        assert list(opened[0].tensors.names())
        return opened[0]

    monkeypatch.setattr("engine.loading.open_model", spy)
    made = backend()
    engine = Engine(EngineConfig(weight_file=str(tiny_path)), backend=made)
    if isinstance(made, FailingLoading):
        with pytest.raises(MemoryError, match="no room"):
            await engine.__aenter__()
        assert await anyio.to_thread.run_sync(made.ended.wait, 20)
        await until(lambda: not list(opened[0].tensors.names()))         # right after the backend, on its thread
    else:
        async with engine:
            assert not list(opened[0].tensors.names())


async def until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not true():
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("flag", ["model_id", "weight_file"])
async def test_a_path_on_this_disk_is_no_name_of_the_model(flag: str, tiny_path: Path) -> None:
    async with Engine(EngineConfig(**{flag: str(tiny_path)}), backend=ToyBackend()) as engine:
        assert engine.model_names == ("tiny", "default")
        with pytest.raises(UnknownModel):
            engine.check_model(str(tiny_path))
