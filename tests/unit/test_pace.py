"""The bound of prompt tokens beside decoding rows: what Pace learns, and that the core's steps keep to it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import anyio
import numpy as np
import pytest

from engine import Engine, EngineConfig
from engine.pace import BEARABLE_S, CROWD, LEAST, Pace
from engine.step import StepOutput
from engine.weights.checkpoint import Checkpoint
from tests.support.toy import ToyBackend, ToyTicket

DECODE_S, TOKEN_S = 0.060, 0.001


def taught(decoding: int = 4, *, beside: bool = True) -> Pace:
    pace = Pace(first=64, most=256)
    for _ in range(50):
        pace.observe(decoding, 0, DECODE_S)
        pace.observe(decoding if beside else 0, 32, 32 * TOKEN_S + (DECODE_S if beside else 0))
    return pace


@pytest.mark.parametrize("beside", [True, False], ids=["from mixed steps", "from prompts alone"])
def test_each_prompt_gets_as_much_of_a_step_as_all_rows_that_decode(beside: bool) -> None:
    pace = taught(beside=beside)
    for prompts, share in ((0, 1), (1, 1), (2, 2), (CROWD, CROWD), (3 * CROWD, CROWD)):
        assert pace.bound(4, prompts) == pytest.approx(min(share * DECODE_S / TOKEN_S, 256), abs=1)


def test_a_step_may_take_what_nobody_feels() -> None:
    pace = Pace(first=64, most=256)
    for _ in range(50):
        pace.observe(2, 0, BEARABLE_S / 9)
        pace.observe(0, 32, 32 * TOKEN_S)
    assert pace.bound(2) == pytest.approx(BEARABLE_S * 8 / 9 / TOKEN_S, abs=1)


@pytest.mark.parametrize("held_up_s", [2.0, 100.0])
def test_one_step_that_was_held_up_is_forgotten_while_prompts_keep_coming(held_up_s: float) -> None:
    pace = taught()
    usual = pace.bound(4)
    pace.observe(4, 0, held_up_s)
    assert pace.bound(4) < 1.5 * usual
    for _ in range(40):                                   # every step has prompts from here on
        tokens = pace.bound(4)
        pace.observe(4, tokens, DECODE_S + tokens * TOKEN_S)
    assert pace.bound(4) == pytest.approx(usual, rel=0.5)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clock_that_makes_no_sense_teaches_nothing(seconds: float) -> None:
    pace = taught()
    usual = pace.bound(4)
    pace.observe(4, 0, seconds)
    pace.observe(4, 64, seconds)
    assert pace.bound(4) == usual
    fresh = Pace(first=64, most=256)
    fresh.observe(1, 0, seconds)
    fresh.observe(1, 64, seconds)
    assert fresh.bound(1) == 64


def test_nothing_is_changed_before_both_costs_are_known() -> None:
    pace = Pace(first=64, most=256)
    assert pace.bound(4) == 64
    pace.observe(4, 0, DECODE_S)
    assert pace.bound(4) == 64
    pace.observe(0, LEAST - 1, 1.0)                       # too few to tell the cost of one
    assert pace.bound(4) == 64
    pace.observe(0, 32, 32 * TOKEN_S)
    assert pace.bound(4) < 64


def test_the_bound_has_bounds_itself() -> None:
    slow, fast = Pace(first=64, most=256), Pace(first=64, most=256)
    slow.observe(1, 0, DECODE_S)
    slow.observe(0, 100, 100 * DECODE_S)
    fast.observe(1, 0, DECODE_S)
    fast.observe(1, 200, DECODE_S)                        # the prompt cost nothing that could be measured
    assert slow.bound(1) == LEAST
    assert fast.bound(1) == 256


def test_more_rows_have_a_pace_of_their_own() -> None:
    pace = taught(1)
    pace.observe(8, 0, 4 * DECODE_S)
    assert pace.bound(8) == pytest.approx(4 * pace.bound(1), abs=4)
    assert pace.bound(100) == pace.bound(8)               # the nearest that is known
    assert pace.bound(2) == pace.bound(1)


def test_a_slower_machine_is_noticed() -> None:
    pace = taught()
    before = pace.bound(4)
    for _ in range(20):
        pace.observe(4, 10, DECODE_S + 10 * 3 * TOKEN_S)
    assert pace.bound(4) == pytest.approx(before / 3, abs=1)


@dataclass
class Timed(ToyBackend):
    """Each step takes what its tokens cost, on a clock of its own."""

    now: float = 0.0
    seen: list[tuple[int, int]] = field(default_factory=list)      # decoding rows and tokens of prompts

    def wait(self, ticket: ToyTicket) -> StepOutput:
        counts = np.diff(self.steps[0].row_starts)                 # a row of more than one token is a prompt's
        decoding, prompts = int((counts == 1).sum()), int(counts[counts > 1].sum())
        self.seen.append((decoding, prompts))
        self.now += DECODE_S * (decoding > 0) + TOKEN_S * prompts
        return super().wait(ticket)


@pytest.mark.anyio
async def test_a_long_prompt_goes_in_by_chunks_that_leave_the_others_their_pace(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Callable[[], Checkpoint]
) -> None:
    backend = Timed(pages=400, max_batch_tokens=128)
    monkeypatch.setattr("engine.core.monotonic", lambda: backend.now)
    async with (
        Engine(EngineConfig(), backend=backend, checkpoint=tiny_checkpoint()) as engine,
        await engine.stream(list(range(2, 40)), max_tokens=80, temperature=0, ignore_eos=True) as stream,
        anyio.create_task_group() as group,
    ):
        events = aiter(stream)
        for _ in range(20):
            await anext(events)
        group.start_soon(partial(engine.generate, list(range(5, 255)) * 2, max_tokens=1))
        async for _ in events:
            pass
    chunks = [prompts for decoding, prompts in backend.seen if decoding and prompts]
    assert sum(chunks) > 400, "most of the prompt went in beside the stream"
    wanted = DECODE_S / TOKEN_S
    assert chunks[1:-1] == pytest.approx([wanted] * (len(chunks) - 2), rel=0.2)
