"""Tasks of unlike cost or on unlike cores: each thread has a share of its own, and who is done takes from the others'.

Numba gives each thread an equal part of a prange, and all wait for the one whose core had something else to do: the event
loop, or a neighbour of a virtual machine. A kernel has one iteration for each thread instead, which asks next_task() until
there is none. Shares are runs of neighbouring tasks, so that a thread reads memory in one stream. Which thread does a task
changes no bit of it.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from backends.cpu.kernels.jit import inner

__all__ = ["new_shares", "next_task"]

Shares = NDArray[np.int64]      # (threads, APART): how many tasks of each share are taken, a cache line apart
typed_intrinsic: Any = intrinsic
APART = 8


@typed_intrinsic  # type: ignore[untyped-decorator]
def count_up(_context: Any, counters: Any, row: Any) -> Any:
    """counters[row, 0] += 1, at once for all threads; what it was before."""

    def generate(target: Any, builder: Any, signature: Any, values: list[Any]) -> Any:
        array = target.make_array(signature.args[0])(target, builder, values[0])
        place = builder.mul(values[1], values[1].type(APART))
        return builder.atomic_rmw("add", builder.gep(array.data, [place]), values[1].type(1), "monotonic")

    return types.int64(counters, types.int64), generate


@inner
def new_shares(workers: int) -> Shares:
    return np.zeros((workers, APART), np.int64)


@inner
def next_task(shares: Shares, worker: int, tasks: int) -> int:
    """A task of the worker's share, or of another's when that is done; -1: all are taken."""
    workers: int = shares.shape[0]
    for i in range(workers):
        w = (worker + i) % workers
        first, stop = tasks * w // workers, tasks * (w + 1) // workers
        if shares[w, 0] < stop - first:
            task: int = first + count_up(shares, w)
            if task < stop:
                return task
    return -1
