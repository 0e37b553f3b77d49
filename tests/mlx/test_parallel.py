"""Several ranks, in real processes with MLX's real ring, draw what one device draws; and when one of them fails or is lost,
whoever waits hears of it in bounded time, and no process stays behind."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from time import monotonic

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install mlx[cpu]")

from backends.mlx import team as team_module  # noqa: E402
from backends.mlx.messages import (  # noqa: E402
    Packed,
    Wait,
    decode_answer,
    decode_order,
    encode,
    for_followers,
    pack_output,
    pack_step,
    unpack_output,
    unpack_step,
)
from backends.mlx.parallel import ParallelBackend  # noqa: E402
from backends.mlx.runner import MlxBackend  # noqa: E402
from engine.backend import Backend, LoadOptions, Ticket  # noqa: E402
from engine.errors import (  # noqa: E402
    ConfigError,
    DeviceUnavailable,
    ModelError,
    OutOfDeviceMemory,
    StepFailed,
    UnsupportedModel,
)
from engine.step import Bias, History, StepInput, StepOutput  # noqa: E402
from engine.weights.checkpoint import open_checkpoint  # noqa: E402
from engine.wire import WireError  # noqa: E402
from tests.mlx.backends import quiet  # noqa: E402
from tests.support.random_models import SMALL_MODELS, small_model  # noqa: E402
from tests.support.steps import build_step, ints  # noqa: E402

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX has no ring backend")
CACHE_BYTES = 2 << 20
BOUND_S = 20.0
STEP = build_step([([3, 4, 5], 0, [1])])


def opener(name: str = "open_small") -> str:
    return f"tests.mlx.rank_models:{name}"


def take(backend: Backend, name: str, ranks: int, **options) -> None:
    """Load a small model and make pages."""
    devices = {"device_ids": tuple(range(ranks)), "checkpoint": name, "dtype": "f32"}
    backend.load(*small_model(name), LoadOptions(**(devices | options)), quiet)
    assert backend.allocate_cache(CACHE_BYTES) >= 8


@pytest.fixture(scope="module")
def two() -> Iterator[ParallelBackend]:
    """Two ranks, which take one model after another."""
    with closing(ParallelBackend(opener())) as backend:
        yield backend


# ---- the tokens of one ------------------------------------------------------------------------------------------------


def every_kind_of_step(vocabulary: int) -> list[StepInput]:
    """A prompt in two chunks beside another one, decoding by reference, everything that a sampler knows, a fork by a copy."""
    floats = partial(np.array, dtype=np.float32)
    prompts, pages = ([*range(3, 40)], [7, 50, 12, 9, 33]), ([4, 2], [1], [6])
    seeds = np.array([[1, 2], [3, 4], [5, 6]], np.uint32)
    masks = np.zeros((1, -(-vocabulary // 32)), np.uint32)
    masks[0, 1:4] = 0x55555555
    history = History(ints([0, 2, 3]), ints([7, -1, -2]), ints([2, 1, 1]), np.array([True, False, False]))
    bias = Bias(ints([0, 0, 2]), ints([40, 41]), floats([9, -9]))
    return [
        build_step([(prompts[0][:30], 0, pages[0])], sample_at=[]),
        build_step([(prompts[0][30:], 30, pages[0]), (prompts[1], 0, pages[1])], top_count=ints([3, 0])),
        build_step(
            [([-1], 37, pages[0]), ([-2], 5, pages[1])], history=history, bias=bias, temperature=floats([20, 0]),
            top_k=ints([50, 0]), top_p=floats([0.95, 1]), repetition=floats([1.3, 1.1]), frequency=floats([0.2, 0]),
            seed=seeds[:2], mask_at=ints([1]), grammar_masks=masks, top_count=ints([-1, 2]), hidden_at=ints([1, 0]),
        ),
        build_step(
            [([-1], 38, pages[0]), ([-2], 6, pages[1]), ([-2], 6, pages[2])], copies=ints([[1, 6]]),
            temperature=floats([30, 30, 30]), seed=seeds, choice=ints([0, 0, 1]), top_count=ints([1, 1, 1]),
        ),
        build_step([([-3], 39, pages[0]), ([-2], 7, pages[1]), ([-1], 7, pages[2])], top_count=ints([4, 4, 4])),
        build_step([([5, 6], 40, pages[0])], sample_at=[], hidden_at=ints([0, 1])),
        build_step([([9], 42, pages[0])], sample_at=[0, 0], temperature=floats([9, 9]), seed=seeds[:2]),
    ]  # fmt: skip


def outputs(backend: Backend, steps: list[StepInput]) -> list[StepOutput]:
    """Each step is submitted before the one before it is waited for."""
    tickets, found = [], []
    for step in steps:
        tickets.append(backend.submit(step))
        if len(tickets) == 2:
            found.append(backend.wait(tickets.pop(0)))
    return [*found, backend.wait(tickets.pop())]


def check_equal(name: str, ours: ParallelBackend, ranks: int) -> None:
    steps = every_kind_of_step(SMALL_MODELS[name][0].vocabulary_size)
    take(ours, name, ranks)
    with closing(MlxBackend()) as alone:
        take(alone, name, 1)
        wanted = outputs(alone, steps)
    for number, (found, exact) in enumerate(zip(outputs(ours, steps), wanted, strict=True)):
        np.testing.assert_array_equal(found.tokens, exact.tokens, f"step {number}")
        np.testing.assert_array_equal(found.top_ids, exact.top_ids)
        for scores, those in ((found.logprobs, exact.logprobs), (found.top_logprobs, exact.top_logprobs)):
            np.testing.assert_allclose(scores, those, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.hidden, exact.hidden, rtol=1e-3, atol=1e-4)
    assert len({*np.concatenate([each.tokens for each in wanted])}) > 4, "these tokens could hardly differ"


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_two_ranks_draw_what_one_device_draws(two, name) -> None:
    check_equal(name, two, 2)


def test_four_ranks_draw_what_one_device_draws_also_where_two_share_a_key_head() -> None:
    with closing(ParallelBackend(opener())) as four:
        for name in ("k-quants", "quantized experts"):
            check_equal(name, four, 4)
        assert four.info.device.startswith("4 ranks, ")


def test_a_file_is_opened_by_every_rank(tiny_path) -> None:
    options = LoadOptions(dtype="f32", context_length=64, checkpoint=str(tiny_path))
    steps, found = every_kind_of_step(300)[:2], []
    for devices in ((0,), (0, 1)):
        told = []
        with closing(ParallelBackend()) as backend, closing(open_checkpoint(tiny_path)) as opened:
            progress = lambda what, done, total, told=told: told.append((what, done, total))  # noqa: E731
            spec = opened.spec.at_context(64)
            backend.load(spec, opened.tensors, replace(options, device_ids=devices), progress)
            backend.allocate_cache(CACHE_BYTES)
            found.append([output.tokens.tolist() for output in outputs(backend, steps)])
            assert backend.memory().weights_bytes > 0
        assert ("loading weights", len(spec.shapes()), len(spec.shapes())) in told
    assert found[0] == found[1]


def test_pages_are_the_least_of_all_and_the_budget_is_everybodys(two) -> None:
    """Key heads are halved, and so is the budget: as many pages as one device has."""
    take(two, "llama", 2)
    with closing(MlxBackend()) as alone:
        take(alone, "llama", 1)
        assert two.allocate_cache(CACHE_BYTES) == alone.allocate_cache(CACHE_BYTES)
        ours, whole = two.memory(), alone.memory()
    assert ours.cache_bytes == pytest.approx(whole.cache_bytes, rel=0.05)
    assert whole.weights_bytes < ours.weights_bytes < 2 * whole.weights_bytes


# ---- what goes wrong --------------------------------------------------------------------------------------------------


def processes(backend: ParallelBackend) -> list:
    assert backend._team is not None
    return [peer.process for peer in backend._team.peers]


def go_on(backend: ParallelBackend, ticket: Ticket) -> None:
    for _ in range(1000):                                # what was sent before a rank died may have been done
        backend.wait(ticket)
        ticket = backend.submit(STEP)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_all_with_an_error_and_no_process_stays(lost) -> None:
    with closing(ParallelBackend(opener())) as backend:
        take(backend, "llama", 2)
        started, ticket = monotonic(), backend.submit(STEP)
        processes(backend)[lost].send_signal(signal.SIGKILL)
        with pytest.raises(StepFailed, match=f"rank {lost} of 2 is lost: .*killed by signal 9"):
            go_on(backend, ticket)
        assert monotonic() - started < BOUND_S
        with pytest.raises(StepFailed, match=f"rank {lost} of 2"):
            backend.submit(STEP)
        for process in processes(backend):
            process.wait(BOUND_S)
    backend.close()


def test_a_rank_that_says_nothing_any_more_is_ended_even_if_it_will_not(monkeypatch) -> None:
    with closing(ParallelBackend(opener("open_where_the_last_hangs_at_glm4"))) as backend:
        take(backend, "llama", 2)
        monkeypatch.setattr(team_module, "SILENT_S", 0.5)
        with pytest.raises(StepFailed, match=r"rank 1 of 2 says nothing for 0\.5 s"):
            take(backend, "glm4", 2)
        for process in processes(backend):
            process.wait(BOUND_S)


def test_ranks_end_by_themselves_when_nobody_gives_orders_any_more() -> None:
    with closing(ParallelBackend(opener())) as backend:
        take(backend, "llama", 2)
        backend.submit(STEP)
        for peer in backend._team.peers:
            peer.connection.close()
        for process in processes(backend):
            assert process.wait(BOUND_S) in (0, -signal.SIGTERM)       # the team, which sees one lost, may be faster


@pytest.mark.parametrize(("open_with", "error", "says"), [
    ("open_where_the_last_has_too_little_memory", OutOfDeviceMemory, "rank 1 of 2 failed: the weights take 9 GB"),
    ("open_where_the_last_has_another_model", ModelError, "rank 1 of 2 failed: .*it changed while it was loaded"),
    ("open_where_the_last_dies", StepFailed, r"rank 1 of 2 is lost: Fatal: a cosmic ray \(exit status 9\)"),
])  # fmt: skip
def test_what_a_rank_raises_while_it_loads_is_raised_here_and_all_end(open_with, error, says) -> None:
    with closing(ParallelBackend(opener(open_with))) as backend:
        with pytest.raises(error, match=says):
            take(backend, "llama", 2)
        for process in processes(backend):
            process.wait(BOUND_S)


@pytest.mark.parametrize(("name", "options", "error", "says"), [
    ("llama", {"device_ids": (0, 2)}, ConfigError, "--d 0,2 names devices that MLX does not have: .*say --d 0,1"),
    ("llama", {"device_ids": (1, 0)}, ConfigError, "one machine, counted from 0: for 2 of them say --d 0,1"),
    ("llama", {"device_ids": (3,)}, UnsupportedModel, r"not \(3,\): leave --d out"),
    ("llama", {"device_ids": (0, 1, 2)}, UnsupportedModel, "8 heads with 4 key/value heads .* one of 1, 2, 4, 8 with --d"),
    ("llama", {"device_ids": (0, 1), "checkpoint": None}, UnsupportedModel, "2 ranks each open the model's files"),
])  # fmt: skip
def test_what_ranks_cannot_do_is_refused_before_any_starts(name, options, error, says) -> None:
    with closing(ParallelBackend(opener())) as backend:
        with pytest.raises(error, match=says):
            take(backend, name, 2, **options)
        assert backend._team is None


def test_without_a_ring_or_within_a_launcher_several_devices_are_refused(monkeypatch) -> None:
    with closing(ParallelBackend(opener())) as backend:
        for change in (
            partial(monkeypatch.setenv, "MLX_HOSTFILE", "hosts.json"),
            partial(monkeypatch.setenv, "MLX_RANK", "0"),
        ):
            change()
            with pytest.raises(DeviceUnavailable, match=r"is '.*processes of this machine alone.*unset MLX_"):
                take(backend, "llama", 2)
            monkeypatch.undo()
        monkeypatch.setattr(sys, "platform", "win32")
        with pytest.raises(DeviceUnavailable, match="ring backend, which this MLX on win32 does not have: leave --d out"):
            take(backend, "llama", 2)
        monkeypatch.undo()
        monkeypatch.setattr(mx.distributed, "is_available", lambda backend: False)
        with pytest.raises(DeviceUnavailable, match="ring backend"):
            take(backend, "llama", 2)


def test_the_processes_leave_no_file_and_no_environment_behind(two) -> None:
    assert not two._team.hosts.exists()
    assert "MLX_RANK" not in os.environ


# ---- messages ---------------------------------------------------------------------------------------------------------


def test_a_step_arrives_as_it_was_sent() -> None:
    for step in every_kind_of_step(320):
        arrived = unpack_step(decode_order(encode(pack_step(step))))
        for one, other in ((step, arrived), (step.history, arrived.history), (step.bias, arrived.bias)):
            assert type(one) is type(other)
            for field in fields(one) if one is not None else ():
                sent, came = getattr(one, field.name), getattr(other, field.name)
                if isinstance(sent, np.ndarray):
                    assert (sent.dtype, sent.shape, sent.tobytes()) == (came.dtype, came.shape, came.tobytes())


def test_who_draws_nothing_is_sent_no_mask() -> None:
    step = every_kind_of_step(150_000)[2]
    assert len(encode(pack_step(for_followers(step)))) < 2500 < len(encode(pack_step(step)))


def test_an_output_arrives_as_it_was_sent() -> None:
    floats = np.linspace(-1, 1, 12, dtype=np.float32)
    sent = StepOutput(ints([4, -1]), floats[:2], ints([[1, 2], [3, 4]]), floats[:4].reshape(2, 2), floats.reshape(3, 4))
    came = unpack_output(decode_answer(encode(pack_output(sent))))
    for field in fields(sent):
        np.testing.assert_array_equal(getattr(came, field.name), getattr(sent, field.name))


def bad_steps() -> dict[str, dict[str, Packed | None]]:
    packed = pack_step(build_step([([1, 2], 0, [1])])).arrays
    return {
        "StepInput.tokens has 7 bytes": {"tokens": Packed((2,), packed["tokens"].data[:-1])},
        "StepInput.positions has the shape": {"positions": Packed((1,), bytes(4))},
        "StepInput.row_starts has the shape|StepInput.kv_lengths has the shape": {"row_starts": Packed((3,), bytes(12))},
        "StepInput.seed has the shape": {"seed": Packed((1, 3), bytes(12))},
        "StepInput.copies has the shape": {"copies": Packed((-1, 2), b"")},
        "other arrays than this version of Rillet knows": {"tokens": None},
    }


@pytest.mark.parametrize("says", bad_steps())
def test_a_step_that_does_not_fit_together_is_refused(says) -> None:
    message = pack_step(build_step([([1, 2], 0, [1])]))
    for name, packed in bad_steps()[says].items():
        if packed is None:
            del message.arrays[name]
        else:
            message.arrays[name] = packed
    with pytest.raises(WireError, match=says):
        unpack_step(message)


def test_a_frame_that_is_no_message_is_refused() -> None:
    for frame in (b"", b"\xc1", encode(Wait())[:-1], b"\x81\xa4type\xa6Pickle"):
        with pytest.raises(WireError, match="is no message"):
            decode_order(frame)
