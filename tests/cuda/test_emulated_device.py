"""The emulated device finds every class of error that it promises to find: kernels and programs that are wrong on purpose."""

import faulthandler
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from backends.cuda.device import Array, Kernel
from engine.errors import OutOfDeviceMemory, StepFailed
from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.emulated_memory import PAGE

SEEDS = [0, 1, 2, 3, 10, 11]
TEXT = r"""
#include "gpu.cuh"

__global__ void twice(const float* x, float* y, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = 2 * x[i];
}
__global__ void read_at(const float* x, float* y, long long at) { if (threadIdx.x == 0) y[0] = x[at]; }
__global__ void write_at(float* y, long long at) { if (threadIdx.x == 0) y[at] = 1; }
__global__ void deep(float* y, int depth) {
    volatile char room[1000];
    room[depth % 1000] = 1;
    if (depth > 0) deep(y, depth - 1);
    y[0] = room[depth % 1000];
}

// y[i] = x[n - 1 - i] through shared memory
template <bool BARRIER>
__global__ void reversed(const float* x, float* y) {
    SHARED(float, room, 0);
    room[threadIdx.x] = x[threadIdx.x];
    if (BARRIER) __syncthreads();
    y[threadIdx.x] = room[blockDim.x - 1 - threadIdx.x];
}
__global__ void unwritten(float* y) { SHARED(float, room, 0); y[threadIdx.x] = room[threadIdx.x]; }
__global__ void shared_at(float* y, int at) {
    SHARED(float, room, 0);
    if (threadIdx.x == 0) room[at] = 1;
    y[threadIdx.x] = 0;
}
// two rounds through the same memory, and the second one must not begin before all have read
template <bool BARRIER>
__global__ void rounds(float* y) {
    SHARED(float, room, 0);
    float sum = 0;
    for (int round = 0; round < 2; round++) {
        room[threadIdx.x] = 10 * round + 1;
        __syncthreads();
        sum += room[(threadIdx.x + 40) % blockDim.x];
        if (BARRIER) __syncthreads();
    }
    y[threadIdx.x] = sum;
}

template <int WAIT, bool BARRIER>
__global__ void copied(const float* x, float* y) {
    SHARED(float, room, 0);
    copy_async_16(room + 4 * threadIdx.x, x + 4 * threadIdx.x);
    copies_commit();
    copies_wait<WAIT>();
    if (BARRIER) __syncthreads();
    y[threadIdx.x] = room[4 * blockDim.x - 1 - threadIdx.x];
}
// a copy into memory that others may still read
template <bool BARRIER>
__global__ void copied_over(const float* x, float* y) {
    SHARED(float, room, 0);
    for (int i = 0; i < 4; i++) room[4 * threadIdx.x + i] = 5;
    __syncthreads();
    if (threadIdx.x < 32) __syncwarp();
    y[threadIdx.x] = room[4 * ((threadIdx.x + 32) % blockDim.x)];
    if (BARRIER) __syncthreads();
    copy_async_16(room + 4 * threadIdx.x, x + 4 * threadIdx.x);
    copies_commit();
    copies_wait<0>();
}
__global__ void copied_beyond(const float* x, float* y) { SHARED(float, room, 0); copy_async_16(room + 32, x); }

__global__ void left_out(float* y) {
    if (threadIdx.x != 7) __syncthreads();
    else __shfl_sync(ALL_LANES, 1, 0);
}
__global__ void two_places(float* y) { if (threadIdx.x < 32) __syncthreads(); else __syncthreads(); }
__global__ void some_end(float* y) {
    if (threadIdx.x >= 32) return;
    __syncthreads();
    y[threadIdx.x] = 1;
}
__global__ void partial(float* y) { y[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); }
__global__ void half_warp(float* y) { if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1.0f, 1); }
__global__ void half_ends(float* y) {
    if (threadIdx.x % 32 < 16) return;
    y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1.0f, 1);
}
__global__ void different(float* y) {
    if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1.0f, 1);
    else y[threadIdx.x] = __ballot_sync(ALL_LANES, 1);
}
__global__ void two_shuffles(float* y) {
    if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1.0f, 1);
    else y[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 2.0f, 1);
}
template <bool SYNC>
__global__ void in_a_warp(float* y) {
    SHARED(float, room, 0);
    room[threadIdx.x] = threadIdx.x;
    if (SYNC) __syncwarp();
    y[threadIdx.x] = room[threadIdx.x ^ 1];
}
__global__ void vector_at(const float* x, float* y, int at) { store_vector(y, load_vector<float4>(x + at)); }
__global__ void divided(const int* x, int* y) { y[0] = 7 / x[0]; }
__global__ void next_block(float* y) { y[blockIdx.x + 1] = y[blockIdx.x] + 1; }
__global__ void many(const float* f, const bf16* h, int i, long long l, float x, const unsigned char* bytes) {}

template <int WARPS>
__global__ void __launch_bounds__(WARPS * 32, 2) bounded(float* y) { y[threadIdx.x] = 1; }

// every warp function in turn, many times, with a sum that no thread may miss
__global__ void busy(float* y) {
    SHARED(float, room, 0);
    float v = threadIdx.x;
    for (int i = 0; i < 10; i++) {
        v = warp_sum(v) / 32 + (__ballot_sync(ALL_LANES, threadIdx.x & 1) == 0xaaaaaaaau);
        v += __shfl_up_sync(ALL_LANES, 0.0f, i);
        v += block_sum(1.0f, room);
        __syncthreads();
    }
    y[blockIdx.x * blockDim.x + threadIdx.x] = v;
}
"""
NAMES = [
    "twice", "read_at", "write_at", "deep", "reversed<true>", "reversed<false>", "unwritten", "shared_at", "rounds<true>",
    "rounds<false>", "copied<0, true>", "copied<1, true>", "copied<0, false>", "copied_over<true>", "copied_over<false>",
    "copied_beyond", "left_out", "two_places", "some_end", "partial", "half_warp", "half_ends", "different", "two_shuffles",
    "in_a_warp<true>", "in_a_warp<false>", "vector_at", "divided", "next_block", "many", "bounded<2>", "busy",
]  # fmt: skip
KERNELS = {name: Kernel("wrong.cu", name) for name in NAMES}


def device(seed=0, **more):
    made = EmulatedDevice(seed=seed, texts={"wrong.cu": TEXT}, **more)
    made.prepare(KERNELS.values())
    return made


def floats(made, count):
    return Array(made.allocate(4 * count), (count,), "f32")


def run(made, name, *arguments, grid=1, threads=64, shared_bytes=0):
    made.stream().launch(KERNELS[name], (grid, 1, 1), threads, shared_bytes, *arguments)
    made.synchronize()


def result(name, *arguments, seed=0, threads=64, shared_bytes=0):
    """What a kernel writes to its last argument, `threads` float32."""
    made = device(seed)
    there = [made.put(argument) if isinstance(argument, np.ndarray) else argument for argument in arguments]
    y = floats(made, threads)
    run(made, name, *there, y, threads=threads, shared_bytes=shared_bytes)
    return made.get(y)


X = np.arange(256, dtype=np.float32)


# ---- memory -------------------------------------------------------------------------------------------------------------


WRONG_PLACES = [(64, "behind the end"), (-1, "before"), (1 << 40, "not there"), (-9999, "not there")]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("at", "where"), WRONG_PLACES)
def test_a_write_outside_of_memory_is_found_on_both_sides(seed, at, where):
    made = device(seed)
    y = floats(made, 64)
    with pytest.raises(StepFailed, match=where):
        run(made, "write_at", y, np.int64(at))


@pytest.mark.parametrize(("seed", "at"), [(0, 64), (1, -1), (0, 2000), (1, -2000)])
def test_a_read_outside_of_memory_faults_on_the_side_of_the_seed(seed, at):
    made = device(seed)
    x, y = floats(made, 64), floats(made, 1)
    with pytest.raises(StepFailed, match=r"read_at: memory that is not there .* thread 0\).* bytes (before|behind)"):
        run(made, "read_at", x, y, np.int64(at))


@pytest.mark.parametrize(("seed", "at"), [(1, 64), (0, -1)])
def test_a_read_outside_of_memory_gives_nan_on_the_other_side(seed, at):
    made = device(seed)
    x, y = made.put(np.ones(64, np.float32)), floats(made, 1)
    run(made, "read_at", x, y, np.int64(at))
    assert np.isnan(made.get(y)[0])


@pytest.mark.parametrize("nbytes", [1, 255, 257, PAGE, 3 * PAGE + 4, 17 << 20])
def test_memory_begins_as_nans_and_at_multiples_of_256(nbytes):
    made = device()
    address = made.allocate(nbytes)
    assert address % 256 == 0
    assert np.all(made.get(Array(address, (nbytes,), "u8")) == 0xFF)


def test_memory_that_is_not_written_costs_nothing():
    made = device(memory_bytes=1 << 40)
    count = 1 << 37
    x, y = floats(made, count), floats(made, 1)
    run(made, "write_at", x, np.int64(count - 1))
    run(made, "read_at", x, y, np.int64(count - 1))
    assert made.get(y)[0] == 1
    assert made.free_bytes() == (1 << 40) - 4 * count - 4


def test_memory_is_gone_once_it_is_released():
    made = device()
    x, y = floats(made, 64), floats(made, 1)
    made.release(x.address)
    for _ in range(3):
        assert floats(made, 64).address != x.address
    with pytest.raises(StepFailed, match="byte 0 of released memory of 256 bytes"):
        run(made, "read_at", x, y, np.int64(0))


def test_copies_and_fills_are_held_to_allocations():
    made = device()
    x, stream = floats(made, 4), made.stream()
    host = np.zeros(5, np.float32)
    for work in (
        lambda: stream.copy_in(x.address, host),
        lambda: stream.copy_out(host, x.address),
        lambda: stream.copy(x.address, x.address + 16, 16),
        lambda: stream.fill(x.address + 4, 16, 0),
        lambda: stream.copy_in(4096, host),
    ):
        with pytest.raises(StepFailed, match="memory that is not there"):
            work()
    with pytest.raises(StepFailed, match="overlap"):
        stream.copy(x.address, x.address + 4, 8)
    with pytest.raises(StepFailed, match="no allocation begins there"):
        made.release(x.address + 256)


def test_more_memory_than_there_is_cannot_be_had():
    made = device(memory_bytes=1000)
    address = made.allocate(600)
    with pytest.raises(OutOfDeviceMemory, match="400 are free"):
        made.allocate(401)
    made.release(address)
    made.allocate(1000)


def test_a_device_that_failed_stays_failed():
    made = device()
    y = floats(made, 1)
    with pytest.raises(StepFailed):
        run(made, "write_at", y, np.int64(-1 << 40))
    more = made.stream()
    for work in (made.synchronize, lambda: made.get(y), lambda: made.allocate(1), lambda: more.fill(y.address, 4, 0)):
        with pytest.raises(StepFailed, match="failed before: write_at"):
            work()
    made.close()
    made.close()


# ---- shared memory, barriers, asynchronous copies -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels_are_right_with_every_seed(seed):
    assert np.array_equal(result("reversed<true>", X, seed=seed, threads=256, shared_bytes=1024), X[::-1])
    assert np.array_equal(result("copied<0, true>", X, seed=seed, shared_bytes=1024), X[:191:-1])
    assert np.all(result("copied_over<true>", X, seed=seed, shared_bytes=1024) == 5)
    assert np.all(result("rounds<true>", seed=seed, shared_bytes=256) == 12)
    assert np.array_equal(result("in_a_warp<true>", seed=seed, shared_bytes=256), np.arange(64) ^ 1)
    assert np.all(result("some_end", seed=seed)[:32] == 1)


def wrong_with(right, *arguments, **more):
    """The seeds with which a kernel's result is not the right one."""
    return [seed for seed in SEEDS if not np.array_equal(result(*arguments, seed=seed, **more), right)]


def test_a_missing_barrier_is_found():
    assert len(wrong_with(X[::-1], "reversed<false>", X, threads=256, shared_bytes=1024)) == len(SEEDS)


def test_memory_that_is_used_again_too_early_is_found():
    assert wrong_with(np.full(64, 12), "rounds<false>", shared_bytes=256)


def test_a_missing_barrier_within_a_warp_is_found():
    assert len(wrong_with(np.arange(64) ^ 1, "in_a_warp<false>", shared_bytes=256)) == len(SEEDS)


def test_a_missing_wait_for_a_copy_is_found():
    assert {0, 1, 2} <= set(wrong_with(X[:191:-1], "copied<1, true>", X, shared_bytes=1024))


def test_a_copy_that_others_cannot_see_yet_is_found():
    assert wrong_with(X[:191:-1], "copied<0, false>", X, shared_bytes=1024)


def test_a_copy_over_what_others_still_read_is_found():
    assert wrong_with(np.full(64, 5), "copied_over<false>", X, shared_bytes=1024)


def test_shared_memory_begins_as_nans_in_every_launch():
    made = device()
    y = floats(made, 64)
    run(made, "reversed<true>", made.put(X), y, shared_bytes=256)
    run(made, "unwritten", y, shared_bytes=256)
    assert np.all(np.isnan(made.get(y)))


@pytest.mark.parametrize(("at", "shared_bytes"), [(64, 256), (65, 260), (-1, 256), (-30, 256), (500, 256)])
def test_a_write_outside_of_shared_memory_is_found(at, shared_bytes):
    made = device()
    with pytest.raises(StepFailed, match="shared memory"):
        run(made, "shared_at", floats(made, 64), np.int32(at), shared_bytes=shared_bytes)


def test_shared_memory_that_was_not_asked_for_is_found():
    made = device()
    with pytest.raises(StepFailed, match="SHARED begins at byte 0 of 0"):
        run(made, "unwritten", floats(made, 64))
    made = device()
    with pytest.raises(StepFailed, match="outside of shared memory"):
        run(made, "copied_beyond", made.put(X), floats(made, 64), shared_bytes=128)


# ---- threads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("left_out", "no thread comes further|different functions|a thread ends"),
        ("two_places", "at different __syncthreads"),
        ("partial", "partial mask 0000ffff"),
        ("half_warp", "16 threads of a warp|ends while others of its warp wait"),
        ("half_ends", "16 threads of a warp|ends while others of its warp wait"),
        ("different", "different functions"),
        ("two_shuffles", "different functions"),
    ],
)
def test_threads_that_part_are_found(seed, name, text):
    with pytest.raises(StepFailed, match=text):
        result(name, seed=seed)


def test_a_deadlock_says_who_waits_where():
    with pytest.raises(StepFailed, match=r"it waits in __syncthreads, thread 7 in a shuffle"):
        result("left_out")


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_functions_and_barriers_work_in_every_order(seed):
    made = device(seed)
    y = floats(made, 3 * 1024)
    run(made, "busy", y, grid=3, threads=1024, shared_bytes=33 * 4)
    wanted = np.arange(1024, dtype=np.float32).reshape(32, 32)
    for _ in range(10):
        wanted = wanted.mean(axis=1, keepdims=True) + np.zeros((1, 32)) + 1 + 1024
    assert np.array_equal(made.get(y).reshape(3, 32, 32), np.broadcast_to(wanted, (3, 32, 32)))


def test_blocks_have_no_order():
    for seed in SEEDS[1:]:
        made = device(seed)
        y = made.put(np.zeros(18, np.float32))
        run(made, "next_block", y, grid=17, threads=32)
        assert not np.array_equal(made.get(y), np.arange(18))


def test_vectors_at_a_wrong_place_are_found():
    made = device()
    with pytest.raises(StepFailed, match="a vector of 16 bytes"):
        run(made, "vector_at", made.put(X), floats(made, 4), np.int32(2))


def test_a_division_by_zero_and_a_stack_that_is_too_small_are_errors_not_the_end():
    made = device()
    if platform.machine() == "x86_64":           # other CPUs give 0
        with pytest.raises(StepFailed, match="divided by zero"):
            run(made, "divided", made.put(np.zeros(1, np.int32)), Array(made.allocate(4), (1,), "i32"))
    made = device()
    y = floats(made, 1)
    run(made, "deep", y, np.int32(60))
    with pytest.raises(StepFailed, match="stack is too small"):
        run(made, "deep", y, np.int32(100_000))


# ---- launches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "threads", "shared_bytes", "text"),
    [
        ((0, 1, 1), 32, 0, "grid"),
        ((1, 65536, 1), 32, 0, "grid"),
        ((1, 1, 65536), 32, 0, "grid"),
        ((2**31, 1, 1), 32, 0, "grid"),
        ((1, 1, 1), 1056, 0, "threads of a block"),
        ((1, 1, 1), 33, 0, "whole warps"),
        ((1, 1, 1), 0, 0, "whole warps"),
        ((1, 1, 1), 96, 0, "launch bounds are 64"),
        ((1, 1, 1), 32, (99 << 10) + 1, "shared memory"),
    ],
)
def test_a_launch_beyond_the_limits_is_refused(grid, threads, shared_bytes, text):
    made = device()
    with pytest.raises(StepFailed, match=text):
        made.stream().launch(KERNELS["bounded<2>"], grid, threads, shared_bytes, floats(made, 64))


def test_arguments_are_held_to_the_kernels_types():
    made = device()
    f, h, raw = floats(made, 4), Array(made.allocate(8), (4,), "bf16"), Array(made.allocate(8), (8,), "u8")
    good = [f, h, np.int32(1), np.int64(1), np.float32(1), raw]
    run(made, "many", *good)
    run(made, "many", raw, raw, np.uint32(1), np.int64(1), np.float32(1), f)
    run(made, "many", 0, h.address, *good[2:])
    for place, bad, text in [
        (0, h, "has bf16"), (1, f, "has f32"), (2, 5, "is a pointer"), (2, np.int64(1), "takes i32"),
        (3, np.int32(1), "takes i64"), (4, np.int32(1), "takes f32"), (4, 1.0, "is a float"), (5, np.int64(1), r"takes \*"),
        (0, None, "is a NoneType"),
    ]:  # fmt: skip
        with pytest.raises(StepFailed, match=f"argument {place}.*{text}"):
            run(made, "many", *[bad if i == place else one for i, one in enumerate(good)])
    with pytest.raises(StepFailed, match="5 arguments are given, it takes 6"):
        run(made, "many", *good[:5])


def test_a_kernel_that_was_not_prepared_is_refused():
    with pytest.raises(StepFailed, match="was not prepared"):
        device().stream().launch(Kernel("wrong.cu", "other"), (1, 1, 1), 32, 0)


def test_an_edit_that_changes_nothing_is_a_mistake():
    made = EmulatedDevice(texts={"wrong.cu": TEXT}, edits={"wrong.cu": lambda text: text.replace("not in there", "")})
    with pytest.raises(AssertionError, match="changes nothing"):
        made.prepare([KERNELS["twice"]])


# ---- streams and graphs -------------------------------------------------------------------------------------------------


def test_a_copy_is_not_there_before_it_was_waited_for():
    made = device()
    x, stream = made.put(X), made.stream()
    target = np.zeros(256, np.float32)
    stream.copy_out(target, x.address)
    event = stream.record()
    assert not target.any()
    event.wait()
    assert np.array_equal(target, X)
    event.wait()


def test_an_event_waits_for_what_came_before_it_only():
    made = device()
    x, stream = made.put(X), made.stream()
    first, second = np.zeros(256, np.float32), np.zeros(256, np.float32)
    stream.copy_out(first, x.address)
    event = stream.record()
    stream.copy_out(second, x.address)
    event.wait()
    assert first.any()
    assert not second.any()


def test_page_locked_memory_that_changes_too_early_is_seen_and_other_memory_is_copied_at_once():
    made = device()
    x, y, stream = floats(made, 4), floats(made, 4), made.stream()
    locked, plain = made.host_array(32).view(np.float32)[:4], np.ones(4, np.float32)
    locked[:] = 1
    stream.copy_in(x.address, locked)
    stream.copy_in(y.address, plain)
    locked[:] = plain[:] = 2
    assert made.get(x).tolist() == [2] * 4
    assert made.get(y).tolist() == [1] * 4


def test_a_stream_waits_for_another_only_if_it_is_told_to():
    for told in (False, True):
        made = device()
        x, y = made.put(X), made.put(np.zeros(256, np.float32))
        first, second = made.stream(), made.stream()
        first.launch(KERNELS["twice"], (4, 1, 1), 64, 0, x, y, np.int32(256))
        if told:
            second.wait(first.record())
        target = np.zeros(256, np.float32)
        second.copy_out(target, y.address)
        second.record().wait()
        assert np.array_equal(target, 2 * X) == told


def test_a_graph_runs_on_what_is_at_its_addresses_then():
    made = device()
    x, y, z, stream = made.put(X), floats(made, 256), floats(made, 256), made.stream()

    def work():
        stream.launch(KERNELS["twice"], (4, 1, 1), 64, 0, x, y, np.int32(256))
        stream.copy(z.address, y.address, y.nbytes)

    graph = stream.capture(work)
    assert np.all(np.isnan(made.get(y)))
    for factor in (1, 3):
        stream.copy_in(x.address, factor * X)
        stream.replay(graph)
        assert np.array_equal(made.get(z), 2 * factor * X)


def test_what_a_graph_cannot_hold_is_refused_while_it_is_captured():
    made = device()
    x, stream, other = made.put(X), made.stream(), made.stream()
    host, event = np.zeros(4, np.float32), other.record()
    for work in (
        lambda: stream.copy_in(x.address, host),
        lambda: stream.copy_out(host, x.address),
        lambda: stream.wait(event),
        lambda: stream.record(),
        lambda: made.allocate(4),
        lambda: made.synchronize(),
        lambda: event.wait(),
        lambda: made.release(x.address),
    ):
        with pytest.raises(StepFailed, match="captured"):
            stream.capture(work)
    assert np.array_equal(made.get(x), X)


# ---- the process --------------------------------------------------------------------------------------------------------


def test_faults_of_kernels_leave_pythons_own_handlers_alone():
    program = """
        import faulthandler, signal
        import numpy as np
        faulthandler.enable()
        import tests.cuda.test_emulated_device as t
        for _ in range(200):
            made = t.device()
            try:
                t.run(made, "write_at", t.floats(made, 1), np.int64(-1 << 40))
                raise SystemExit("no fault was found")
            except t.StepFailed:
                made.close()
        print("alive", flush=True)
        faulthandler._sigsegv()
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=root, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_launches_of_several_threads_come_one_after_another():
    wrong = []

    def work(seed):
        made = device(seed)
        y = floats(made, 256)
        for _ in range(30):
            run(made, "reversed<true>", made.put(X), y, threads=256, shared_bytes=1024)
            if not np.array_equal(made.get(y), X[::-1]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pytest_has_its_fault_handler():
    assert faulthandler.is_enabled()
