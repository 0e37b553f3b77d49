"""A backend that calls back: the event loop submits and waits by itself, but for steps with grammars."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import anyio
import pytest

from engine import Engine, EngineClosed, EngineConfig, StepFailed
from engine.text.grammar import Grammar
from tests.support.toy import ToyBackend, ToyTicket
from tests.unit.test_engine import expected

pytestmark = pytest.mark.anyio
PATIENCE_S = 20


@dataclass(frozen=True)
class CallingToyTicket(ToyTicket):
    backend: "CallingToy"

    def when_done(self, function) -> None:
        self.backend.executor.submit(self.backend.finish, self.number, function)


class CallingToy(ToyBackend):
    """`go` holds every step back; threads: from where submit and wait were called."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="toy")
        self.go = threading.Event()
        self.go.set()
        self.threads: dict[str, list[str]] = {"submit": [], "wait": []}
        self.finished: list[int] = []

    @property
    def info(self):
        return replace(super().info, calls_back=True)

    def finish(self, number, function) -> None:
        assert self.go.wait(PATIENCE_S)
        self.finished.append(number)
        function()

    def submit(self, step):
        self.threads["submit"].append(threading.current_thread().name)
        return CallingToyTicket(super().submit(step).number, self)

    def wait(self, ticket):
        here = threading.current_thread().name
        self.threads["wait"].append(here)
        assert here == "rillet-device" or ticket.number in self.finished
        return super().wait(ticket)

    def close(self) -> None:
        self.go.set()
        self.executor.shutdown()
        super().close()


@pytest.fixture
def toy(tiny_checkpoint):
    def make(backend, **config) -> Engine:
        return Engine(EngineConfig(**config), backend=backend, checkpoint=tiny_checkpoint())

    return make


@pytest.mark.parametrize("lookahead", [True, False])
async def test_streams_are_those_of_a_naive_recompute_and_no_call_leaves_the_loop(toy, lookahead) -> None:
    backend, here = CallingToy(), threading.current_thread().name
    async with toy(backend, lookahead=lookahead) as engine:
        results: dict[int, list[int]] = {}

        async def one(number: int) -> None:
            found = await engine.generate([number, 6, 7], max_tokens=5 + number, temperature=0, ignore_eos=True)
            results[number] = found.choices[0].token_ids

        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(one, number)
        for number, found in results.items():
            assert found == expected(engine, [number, 6, 7], max_tokens=5 + number, temperature=0, ignore_eos=True)
    assert set(backend.threads["submit"]) == set(backend.threads["wait"]) == {here}


async def test_a_step_with_a_grammar_is_submitted_on_the_device_thread(toy) -> None:
    """Its masks are filled there, so that the loop goes on meanwhile."""
    backend = CallingToy()
    async with toy(backend) as engine:
        found = await engine.generate([5], grammar=Grammar("choice", '["yes"]'), max_tokens=50, ignore_eos=True)
        assert found.choices[0].text == "yes"
    assert "rillet-device" in backend.threads["submit"]


async def test_a_step_that_fails_ends_every_stream(toy) -> None:
    async with toy(CallingToy(fail_at=3)) as engine:
        stream = await engine.stream([5, 6], max_tokens=20, ignore_eos=True)
        with pytest.raises(StepFailed, match="the device burned"):
            async for _ in stream:
                pass
        with pytest.raises(EngineClosed):
            await engine.generate([5], max_tokens=1)


async def test_an_engine_closes_while_a_step_is_held(toy) -> None:
    """What the step says then is heard by nobody."""
    backend = CallingToy()
    async with toy(backend) as engine:
        backend.go.clear()
        stream = await engine.stream([5, 6], max_tokens=20, ignore_eos=True)
        while not backend.steps:
            await anyio.lowlevel.checkpoint()
        assert not backend.finished
    assert backend.closed
    assert [delta.finish_reason async for delta in stream][-1] == "abort"
