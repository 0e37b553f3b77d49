"""Several ranks draw what one draws; and when one fails, whoever waits hears of it and no process stays behind."""

import logging
import signal
import socket
import threading
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic

import numpy as np
import pytest

from backends.cuda import collective as collective_module
from backends.cuda.bfloat16 import from_bfloat16, to_bfloat16
from backends.cuda.collective import Alone, StagedCollective
from backends.cuda.device import Array
from backends.cuda.nccl import NcclCollective, new_unique_id
from backends.cuda.parallel import ParallelBackend
from backends.cuda.processes import start_processes
from backends.cuda.rank import digest_of, serve
from backends.cuda.runner import CudaBackend
from backends.cuda.seat import CUDA_SEAT, Place, Seat, cuda_seat, find_factory
from engine.backend import Backend, LoadOptions, MemoryStatistics
from engine.errors import DeviceUnavailable, ModelError, OutOfDeviceMemory, StepFailed, UnsupportedModel
from engine.step import StepInput
from engine.wire import Connection
from tests.cuda import rank_model
from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.in_process import Sums, thread_team

TIMEOUT_S = 20


def options_for(path, devices):
    return LoadOptions(device_ids=devices, checkpoint=str(path), context_length=64)


def a_step(tokens, sample_at=(-1,)):
    t, s = len(tokens), len(sample_at)
    ints, floats = partial(np.zeros, dtype=np.int32), partial(np.zeros, dtype=np.float32)
    return StepInput(
        copies=ints((0, 2)), tokens=np.array(tokens, np.int32), positions=ints(t), slots=ints(t), row_starts=ints(2),
        kv_lengths=ints(1), page_tables=ints((1, 1)), sample_at=np.array(sample_at, np.int32) % t, temperature=floats(s),
        top_k=ints(s), top_p=floats(s), min_p=floats(s), repetition=floats(s), frequency=floats(s), presence=floats(s),
        seed=np.zeros((s, 2), np.uint32), draw_position=ints(s), choice=ints(s), score=ints(s), top_count=ints(s) - 1,
    )  # fmt: skip


STEPS = [a_step([3, 5, 7], (0, 2)), a_step([-1, -2, 9], (2, 0, 1)), a_step([-3, -1], (0, 1)), a_step([-2])]


def drawn(backend):
    """The tokens of STEPS, each submitted before the one before it is waited for."""
    tickets, found = [], []
    for step in STEPS:
        tickets.append(backend.submit(step))
        if len(tickets) == 2:
            found.append(backend.wait(tickets.pop(0)).tokens.tolist())
    return [*found, backend.wait(tickets.pop()).tokens.tolist()]


def loaded(checkpoint, backend, path, devices):
    with closing(checkpoint()) as opened:
        backend.load(opened.spec.at_context(64), opened.tensors, options_for(path, devices), lambda *_: None)
    return backend


@pytest.fixture
def alone_draws(tiny_checkpoint, tiny_path):
    with closing(loaded(tiny_checkpoint, ParallelBackend(rank_model.seat), tiny_path, (0,))) as backend:
        return drawn(backend)


def in_threads(factory):
    return ParallelBackend(factory, thread_team(factory))


def in_processes(name):
    return ParallelBackend(rank_model.seat, lambda devices: start_processes(devices, f"tests.cuda.rank_model:{name}"))


# ---- ranks as threads -------------------------------------------------------------------------------------------------


def test_two_ranks_draw_what_one_draws(tiny_checkpoint, tiny_path, alone_draws):
    with closing(loaded(tiny_checkpoint, in_threads(rank_model.seat), tiny_path, (0, 1))) as backend:
        assert backend.allocate_cache(None) == 99, "the least of all"
        assert backend.info.device == "2 x emulated"
        assert backend.memory() == MemoryStatistics(2, 20, 200)
        assert drawn(backend) == alone_draws
    assert len({*map(tuple, alone_draws)}) > 1


def test_sums_between_streams_of_emulated_devices_do_the_same(tiny_checkpoint, tiny_path, alone_draws):
    sums = Sums(2)

    def seat(place):
        if place.ranks == 1:
            return rank_model.seat(place)
        collective = sums.collective(place.rank)
        device = EmulatedDevice(memory_bytes=1 << 24)
        return rank_model.Seat(rank_model.RankModel(device, collective), collective)

    with closing(loaded(tiny_checkpoint, in_threads(seat), tiny_path, (0, 1))) as backend:
        assert drawn(backend) == alone_draws


def test_one_device_is_no_team_and_may_be_any(tiny_checkpoint, tiny_path):
    places = []

    def seat(place):
        places.append(place)
        return rank_model.seat(place)

    def no_team(devices):
        raise AssertionError("one device starts nobody")

    with closing(loaded(tiny_checkpoint, ParallelBackend(seat, no_team), tiny_path, (3,))) as backend:
        typed: Backend = backend
        assert typed.allocate_cache(None) == 100
    assert [(place.ranks, place.device_id) for place in places] == [(1, 0), (1, 3)]


@pytest.mark.parametrize("where", [None, "/nowhere/model.gguf"])
def test_a_model_without_files_is_refused_for_several_devices(tiny_checkpoint, where):
    backend = in_threads(rank_model.seat)
    with closing(backend), closing(tiny_checkpoint()) as opened:
        options = LoadOptions(device_ids=(0, 1), checkpoint=where)
        with pytest.raises(UnsupportedModel, match="2 devices each open the model's files"):
            backend.load(opened.spec, opened.tensors, options, lambda *_: None)


def test_a_model_that_changed_between_two_looks_is_refused(tiny_checkpoint, tiny_path):
    backend = in_threads(rank_model.seat)
    with closing(backend), closing(tiny_checkpoint()) as opened:
        spec = opened.spec
        other = replace(spec, norm_epsilon=0.5)
        assert digest_of(spec) != digest_of(other)
        with pytest.raises(ModelError, match="changed while it was loaded") as caught:
            backend.load(other, opened.tensors, options_for(tiny_path, (0, 1)), lambda *_: None)
        assert "rank 1 (device 1)" in str(caught.value)


def test_after_a_failure_of_the_first_rank_the_others_end_and_the_error_is_its_own(tiny_checkpoint, tiny_path):
    backend = in_threads(rank_model.seat_where_the_first_fails)
    loaded(tiny_checkpoint, backend, tiny_path, (0, 1))
    with closing(backend):
        with pytest.raises(TypeError, match="not callable"):
            backend.submit(STEPS[0])
        with pytest.raises(StepFailed, match="rank 0 failed: TypeError"):
            backend.submit(STEPS[0])
        assert not backend._team.peers[0].life.thread.is_alive()


def test_a_rank_whose_other_side_vanishes_ends_by_itself():
    ours, theirs = (Connection(end) for end in socket.socketpair())
    ended = threading.Event()
    sums = Sums(2)
    seat = rank_model.seat(Place(0, 1, 0, None, dict))
    seat = rank_model.Seat(seat.backend, sums.collective(1))
    thread = threading.Thread(target=serve, args=(theirs, seat, ended.set))
    thread.start()
    ours.receive(wait_s=TIMEOUT_S)
    ours.close()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    assert ended.is_set()
    assert seat.backend.closed
    assert "rank 0 is gone" in seat.collective.failure
    theirs.close()


# ---- emulated GPUs ----------------------------------------------------------------------------------------------------


def a_row(tokens, start):
    """A step of one sequence in page 0, which draws greedily after its last token."""
    count = len(tokens)
    step, places = a_step(tokens), np.arange(start, start + count, dtype=np.int32)
    return replace(
        step, positions=places, slots=places, row_starts=np.array([0, count], np.int32), top_p=step.top_p + 1,
        kv_lengths=places[-1:] + 1, repetition=step.repetition + 1, draw_position=places[-1:] + 1, score=step.score - 1,
    )  # fmt: skip


def gpus_draw(checkpoint, path, devices, capturable):
    sums = Sums(len(devices))

    def seat(place):
        device = EmulatedDevice(memory_bytes=1 << 28, seed=place.rank)
        collective = Alone()
        if place.ranks > 1:
            collective = sums.collective(place.rank) if capturable else StagedCollective(
                device, place.rank, place.ranks, place.links
            )  # fmt: skip
        return Seat(CudaBackend(device, collective=collective, max_batch_tokens=64, max_num_seqs=4), collective)

    with closing(loaded(checkpoint, in_threads(seat), path, devices)) as backend:
        backend.allocate_cache(1 << 20)
        tickets = [backend.submit(a_row([3, 5, 7, 11, 2], 0))]
        found = []
        for position in range(5, 15):
            tickets.append(backend.submit(a_row([-1], position)))
            found += backend.wait(tickets.pop(0)).tokens.tolist()
        return found + backend.wait(tickets.pop()).tokens.tolist()


@pytest.mark.parametrize(("ranks", "capturable"), [(2, True), (4, True), (2, False)])
def test_emulated_gpus_together_draw_what_one_draws_with_graphs_and_without(
    tiny_checkpoint, tiny_path, ranks, capturable
):  # fmt: skip
    wanted = gpus_draw(tiny_checkpoint, tiny_path, (0,), True)
    assert gpus_draw(tiny_checkpoint, tiny_path, tuple(range(ranks)), capturable) == wanted
    assert len(set(wanted)) > 5


# ---- ranks as processes -----------------------------------------------------------------------------------------------


def processes_of(backend):
    return [peer.life.process for peer in backend._team.peers]


def test_ranks_in_processes_draw_what_one_draws_and_end_with_close(tiny_checkpoint, tiny_path, alone_draws, caplog):
    with caplog.at_level(logging.INFO), closing(in_processes("seat")) as backend:
        loaded(tiny_checkpoint, backend, tiny_path, (0, 1))
        processes = processes_of(backend)
        assert backend.allocate_cache(None) == 99
        assert drawn(backend) == alone_draws
        command = " ".join(processes[0].args)
        assert command.endswith("-m backends.cuda.rank"), "no secret on the command line"
    assert [process.returncode for process in processes] == [0]


def for_ever(backend):
    while True:
        backend.wait(backend.submit(STEPS[0]))


@pytest.mark.parametrize("how", ["by itself", "killed", "killed while we wait"])
def test_a_rank_that_dies_ends_the_others_and_tells_its_last_words(tiny_checkpoint, tiny_path, how):
    backend = in_processes("seat_where_the_last_dies" if how == "by itself" else "seat")
    with closing(backend):
        loaded(tiny_checkpoint, backend, tiny_path, (0, 1, 2, 3) if how == "by itself" else (0, 1))
        processes = processes_of(backend)
        backend.wait(backend.submit(STEPS[0]))
        began = monotonic()
        if how == "killed while we wait":
            processes[0].send_signal(signal.SIGSTOP)
            timer = threading.Timer(0.2, processes[0].kill)
            timer.start()
        elif how == "killed":
            processes[0].kill()
        says = "killed by signal 9"
        if how == "by itself":
            says = r"rank 3 \(device 3\) is lost: .*a cosmic ray.* \(exit status 9\)"
        with pytest.raises(StepFailed, match=says):
            for_ever(backend)
        with pytest.raises(StepFailed, match=says):
            backend.submit(STEPS[0])
    assert monotonic() - began < 10
    assert all(process.returncode is not None for process in processes)


@pytest.mark.parametrize(("name", "kind", "says"), [
    ("seat_where_the_last_has_no_device", DeviceUnavailable, r"rank 1 \(device 7\) failed: .*there is no GPU 7"),
    ("seat_where_the_last_has_too_little_memory", OutOfDeviceMemory, r"rank 1 \(device 7\) failed: .*take a smaller model"),
    ("seat_where_the_last_ends_at_once", StepFailed, r"rank 1 \(device 7\) is lost: .*exit status 5"),
    ("no_such_seat", Exception, "no_such_seat"),
])  # fmt: skip
def test_a_rank_that_cannot_begin_is_an_error_of_its_own_type(tiny_checkpoint, tiny_path, name, kind, says):
    with closing(in_processes(name)) as backend, pytest.raises(kind, match=says):
        loaded(tiny_checkpoint, backend, tiny_path, (0, 7))


def test_a_rank_that_does_not_want_to_end_is_killed(tiny_checkpoint, tiny_path, monkeypatch):
    monkeypatch.setattr("backends.cuda.parallel.ENDING_S", 0.2)
    backend = in_processes("seat_where_the_last_hangs")
    with closing(backend):
        loaded(tiny_checkpoint, backend, tiny_path, (0, 1))
        processes = processes_of(backend)
    assert [process.returncode for process in processes] == [-signal.SIGKILL]


# ---- collectives ------------------------------------------------------------------------------------------------------


def staged(ranks):
    devices = [EmulatedDevice(memory_bytes=1 << 24, seed=rank) for rank in range(ranks)]
    pairs = {rank: tuple(Connection(end) for end in socket.socketpair()) for rank in range(1, ranks)}
    made = [StagedCollective(devices[0], 0, ranks, lambda: {rank: ends[0] for rank, ends in pairs.items()})]
    made += [StagedCollective(devices[r], r, ranks, lambda r=r: {0: pairs[r][1]}) for r in range(1, ranks)]
    return devices, made


def on_all(functions):
    problems = []

    def run(function):
        try:
            function()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    return problems


@pytest.mark.parametrize("item", ["bf16", "f32"])
@pytest.mark.parametrize(("ranks", "shape"), [(2, (1, 7)), (3, (5, 33)), (2, (40, 64))])
def test_staged_sums_are_the_sums_in_float_and_the_same_bits_on_all_ranks(item, ranks, shape, monkeypatch):
    monkeypatch.setattr(collective_module, "PIECE_BYTES", 1 << 10)       # the last shape takes several
    devices, made = staged(ranks)
    random = np.random.default_rng(0)
    parts = [random.standard_normal(shape).astype(np.float32) for _ in range(ranks)]
    held = [to_bfloat16(part) if item == "bf16" else part for part in parts]
    there = [device.put(part) for device, part in zip(devices, held, strict=True)]

    def work(rank):
        made[rank].open()
        stream = devices[rank].stream()
        made[rank].all_reduce(stream, there[rank])
        made[rank].broadcast(stream, there[rank])
        made[rank].check()

    assert on_all([partial(work, rank) for rank in range(ranks)]) == []
    results = [device.get(array) for device, array in zip(devices, there, strict=True)]
    exact = sum(from_bfloat16(part).astype(np.float64) if item == "bf16" else part.astype(np.float64) for part in held)
    np.testing.assert_allclose(results[0], exact, rtol=2**-8 if item == "bf16" else 1e-5, atol=1e-5)
    for result in results[1:]:
        assert result.tobytes() == results[0].tobytes()
    for collective, device in zip(made, devices, strict=True):
        collective.close()
        device.close()


def test_a_sum_that_waits_for_a_lost_rank_is_let_go_by_abort():
    devices, made = staged(2)
    on_all([collective.open for collective in made])
    array = devices[0].put(np.ones((2, 2), np.float32))
    threading.Timer(0.1, made[0].abort, ("rank 1 fell asleep",)).start()
    problems = on_all([lambda: made[0].all_reduce(devices[0].stream(), array)])
    assert [str(problem) for problem in problems] == ["rank 1 fell asleep"]
    with pytest.raises(StepFailed, match="fell asleep"):
        made[0].check()
    for collective, device in zip(made, devices, strict=True):
        collective.close()
        device.close()


def test_ranks_that_run_different_steps_are_found_out():
    devices, made = staged(2)
    on_all([collective.open for collective in made])
    arrays = [device.put(np.ones(3 + rank, np.float32)) for rank, device in enumerate(devices)]
    problems = on_all([partial(made[rank].all_reduce, devices[rank].stream(), arrays[rank]) for rank in range(2)])
    assert len(problems) == 2
    assert any("different steps" in str(problem) for problem in problems)
    for collective, device in zip(made, devices, strict=True):
        collective.close()
        device.close()


def test_without_nccl_the_error_says_what_to_install():
    try:
        import nccl  # noqa: F401
    except ImportError:
        for make in (new_unique_id, lambda: NcclCollective(bytes(128), 0, 2, lambda: None)):
            with pytest.raises(DeviceUnavailable, match="pip install nccl4py"):
                make()


def test_the_seat_of_a_gpu_is_found_by_its_name():
    assert find_factory(CUDA_SEAT) is cuda_seat


def test_bfloat16_rounds_to_nearest_even_and_keeps_what_is_not_finite():
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, np.inf, -np.inf, 3.4e38, np.nan], np.float32)
    back = from_bfloat16(to_bfloat16(values))
    np.testing.assert_array_equal(back, np.array([1, 1, 1 + 2**-6, -0.0, np.inf, -np.inf, np.inf, np.nan], np.float32))
    one_bit = np.array([0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(from_bfloat16(to_bfloat16(one_bit))).all()


# ---- NCCL, whose bindings are replaced: there is no GPU here ----------------------------------------------------------


class PretendedNccl:
    """What nccl.bindings.nccl has, as far as it is used. `meets`: set when comm_init_rank may return."""

    class NCCLError(Exception):
        pass

    class Result:
        Success, InProgress, RemoteError = 0, 7, 6

    class DataType:
        Bfloat16, Float32, Float16, Uint8 = 9, 7, 6, 1

    class RedOp:
        Sum = 0

    class UniqueId:
        from_buffer = bytes

    def __init__(self):
        self.meets, self.calls, self.state = threading.Event(), [], 0

    def comm_init_rank(self, ranks, unique_id, rank):
        self.calls.append(("init", ranks, unique_id, rank))
        self.meets.wait(TIMEOUT_S)
        return "communicator"

    def all_reduce(self, *arguments):
        self.calls.append(("all_reduce", *arguments))

    def broadcast(self, *arguments):
        self.calls.append(("broadcast", *arguments))

    def comm_abort(self, communicator):
        self.calls.append(("abort", communicator))

    def comm_get_async_error(self, communicator):
        return self.state

    def get_error_string(self, state):
        return "remote process exited"


@dataclass
class StreamWithHandle:
    handle: int = 77


@pytest.fixture
def pretended(monkeypatch):
    pretended = PretendedNccl()
    monkeypatch.setattr("backends.cuda.nccl.bindings", lambda: pretended)
    return pretended


def test_nccl_is_called_in_place_on_the_stream_and_ended_once(pretended):
    pretended.meets.set()
    collective = NcclCollective(bytes(128), 1, 2, lambda: pretended.calls.append("enter"))
    collective.open()
    collective.all_reduce(StreamWithHandle(), Array(4096, (3, 5), "bf16"))
    collective.broadcast(StreamWithHandle(), Array(8192, (6,), "i32"))
    collective.check()
    collective.close()
    collective.abort("late")
    assert pretended.calls == [
        "enter", ("init", 2, bytes(128), 1), ("all_reduce", 4096, 4096, 15, 9, 0, "communicator", 77),
        ("broadcast", 8192, 8192, 24, 1, 0, "communicator", 77), ("abort", "communicator"),
    ]  # fmt: skip
    with pytest.raises(StepFailed, match="ranks are closed"):
        collective.all_reduce(StreamWithHandle(), Array(4096, (3, 5), "bf16"))


def test_abort_ends_a_meeting_that_nobody_else_comes_to(pretended):
    collective = NcclCollective(bytes(128), 0, 2, lambda: None)
    threading.Timer(0.05, collective.abort, ("rank 1 did not start",)).start()
    with pytest.raises(StepFailed, match="rank 1 did not start"):
        collective.open()
    pretended.meets.set()


def test_an_error_that_nccl_noticed_by_itself_is_a_failed_step(pretended):
    pretended.meets.set()
    collective = NcclCollective(bytes(128), 0, 2, lambda: None)
    collective.open()
    pretended.state = 6
    with pytest.raises(StepFailed, match="NCCL failed on rank 0: remote process exited"):
        collective.check()
    assert pretended.calls[-1] == ("abort", "communicator")
