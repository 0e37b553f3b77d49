"""When results are said: once the next step, where there is one, has launched its kernels, and in every case at last."""

from dataclasses import replace
from threading import Event

import numpy as np
import pytest

from backends.cpu.runner import CpuBackend
from engine.backend import LoadOptions
from engine.errors import StepFailed
from tests.support.random_models import small_model
from tests.support.steps import build_step

PATIENCE_S = 60


@pytest.fixture(params=["k-quants", "glm4"], ids=["all layers in one call", "layer by layer"])
def backend(request):
    spec, tensors = small_model(request.param)
    backend = CpuBackend()
    backend.load(spec, tensors, LoadOptions(), lambda what, done, of: None)
    backend.allocate_cache(8 * backend.session.page_bytes)
    yield backend
    backend.close()


@pytest.fixture
def held(backend):
    """The compute thread waits until this is set."""
    gate = Event()
    backend.compute.submit(gate.wait, PATIENCE_S)
    yield gate
    gate.set()


def steps():
    """A prompt, and a token behind it that refers to what the prompt drew."""
    first = build_step([([5, 6, 7], 0, [1])])
    return first, build_step([([-1], 3, [1])])


def test_a_result_is_said_when_the_next_step_has_launched(backend, held, monkeypatch) -> None:
    seen, run = [], backend.session.run

    def watched(step, launching):
        def launch():
            before = first.output.done()
            launching()
            seen.append((before, first.output.done()))

        return run(step, launch)

    monkeypatch.setattr(backend.session, "run", watched)
    first, second = (backend.submit(step) for step in steps())
    held.set()
    second.output.result(PATIENCE_S)
    assert seen == [(False, False), (False, True)]


def test_the_results_are_those_of_steps_that_come_one_by_one(backend, held) -> None:
    tickets = [backend.submit(step) for step in steps()]
    held.set()
    together = [backend.wait(ticket).tokens.tolist() for ticket in tickets]
    assert together == [backend.wait(backend.submit(step)).tokens.tolist() for step in steps()]


def test_a_step_with_none_behind_it_is_said_at_once(backend) -> None:
    first, _ = steps()
    assert backend.submit(first).output.result(PATIENCE_S).tokens.shape == (1,)


@pytest.mark.parametrize(
    ("field", "value", "words"), [("slots", 1 << 20, "slot 1048576"), ("tokens", -9, "place 8 of a step that drew 1")]
)
def test_a_step_that_fails_before_its_kernels_says_the_one_before_it(backend, held, field, value, words) -> None:
    first, second = steps()
    good, bad = backend.submit(first), backend.submit(replace(second, **{field: np.array([value], np.int32)}))
    held.set()
    with pytest.raises(StepFailed, match=words):
        backend.wait(bad)
    assert len(backend.wait(good).tokens) == 1


def test_what_runs_while_the_backend_closes_is_said_and_what_is_queued_fails(backend, held, monkeypatch) -> None:
    begun, run = Event(), backend.session.run

    def slow(step, launching):
        begun.set()
        shut.wait(PATIENCE_S)
        return run(step, launching)

    shut, shutdown = Event(), backend.compute.shutdown

    def shutting(**options):
        shutdown(wait=False, cancel_futures=True)  # then the step may go on
        shut.set()
        shutdown(wait=True)

    monkeypatch.setattr(backend.session, "run", slow)
    monkeypatch.setattr(backend.compute, "shutdown", shutting)
    first, second = (backend.submit(step) for step in steps())
    held.set()
    assert begun.wait(PATIENCE_S)
    backend.close()
    assert len(backend.wait(first).tokens) == 1
    with pytest.raises(StepFailed, match="Cancelled"):
        backend.wait(second)
