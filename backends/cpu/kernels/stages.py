"""Stages inside one parallel region: threads go from one matrix to the next without being sent home between.

Starting and joining Numba's threads takes 2 microseconds, 150 times a step; waiting for the last task of a stage takes a
tenth of that. A stage is over when all its tasks are done, whoever did them: no thread waits for another one to come, so
that a step ends even if its iterations run one after another. forward.py is written in stages.
"""

import ctypes
import platform
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from backends.cpu.kernels.jit import inner
from backends.cpu.kernels.sharing import APART
from backends.cpu.kernels.vectors import Emitter, call

__all__ = ["NAP", "Marks", "finish_stage", "new_marks", "stage_shares"]

Marks = NDArray[np.int64]       # (stages, threads + 1, APART): tasks taken of each share; the last row: tasks done
typed_intrinsic: Any = intrinsic
LOOKS, LOOKS_OF_A_TOKEN = 1000, 50    # at a stage's mark; then a nap, so that a thread without a core gets this one
ON_X86 = platform.machine() in ("x86_64", "AMD64")


def nap_address() -> int:
    """Of a function that gives the core away for a moment: usleep, or Sleep on Windows."""
    if sys.platform == "win32":
        function = ctypes.WinDLL("kernel32").Sleep
    else:
        function = ctypes.CDLL(None).usleep
    return ctypes.cast(function, ctypes.c_void_p).value or 0


NAP = nap_address()


@typed_intrinsic  # type: ignore[untyped-decorator]
def add_done(_context: Any, counters: Any, row: Any, count: Any) -> Any:
    """counters[row, 0] += count; what was written before is seen by whoever sees it."""

    def generate(target: Any, builder: Any, signature: Any, values: list[Any]) -> Any:
        array = target.make_array(signature.args[0])(target, builder, values[0])
        place = builder.mul(values[1], values[1].type(APART))
        return builder.atomic_rmw("add", builder.gep(array.data, [place]), values[2], "release")

    return types.int64(counters, types.int64, types.int64), generate


@typed_intrinsic  # type: ignore[untyped-decorator]
def look(_context: Any, counters: Any, row: Any) -> Any:
    """counters[row, 0] as it is now in memory."""

    def generate(target: Any, builder: Any, signature: Any, values: list[Any]) -> Any:
        array = target.make_array(signature.args[0])(target, builder, values[0])
        place = builder.mul(values[1], values[1].type(APART))
        return builder.load_atomic(builder.gep(array.data, [place]), "acquire", 8)

    return types.int64(counters, types.int64), generate


@typed_intrinsic  # type: ignore[untyped-decorator]
def pause(_context: Any) -> Any:
    """Let the other thread of this core go first: some 40 cycles."""

    def generate(target: Any, builder: Any, _signature: Any, _values: list[Any]) -> Any:
        if ON_X86:
            Emitter(builder).call("llvm.x86.sse2.pause", ir.VoidType())
        else:
            builder.fence("seq_cst")                     # of about that length
        return target.get_dummy_value()

    return types.void(), generate


@inner
def new_marks(stages: int, workers: int) -> Marks:
    return np.zeros((stages, workers + 1, APART), np.int64)


@inner
def stage_shares(marks: Marks, stage: int) -> NDArray[np.int64]:
    """The threads' shares of a stage, for next_task."""
    return marks[stage, : marks.shape[1] - 1]


@inner
def finish_stage(marks: Marks, stage: int, tasks: int, done: int, tokens: int, nap: int) -> None:
    """Say that this thread has done `done` tasks, and wait until all are. A task takes longer with more tokens. nap: NAP."""
    counters = marks[stage]
    last = marks.shape[1] - 1
    if done > 0:
        add_done(counters, last, done)
    looks = 0
    while look(counters, last) < tasks:
        looks += 1
        if looks > LOOKS + LOOKS_OF_A_TOKEN * tokens:
            call(nap, (np.int64(1),))
        else:
            pause()
