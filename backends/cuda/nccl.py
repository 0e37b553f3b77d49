"""NcclCollective: sums between GPUs on one machine through NCCL's low-level bindings, which take plain addresses.

rank.py makes it where nccl4py is installed (Linux); nobody else imports NCCL. Its calls may stand in a graph, after they ran
once outside. NCCL's device code waits for ever for a lost rank, hence abort().
"""

import threading
from collections.abc import Callable
from math import prod
from typing import Any

from backends.cuda.device import ITEM_BYTES, Array, Stream
from engine.errors import DeviceUnavailable, StepFailed

__all__ = ["UNIQUE_ID_BYTES", "NcclCollective", "new_unique_id"]

UNIQUE_ID_BYTES = 128
MEETING_S = 120.0
TYPES = {"bf16": "Bfloat16", "f16": "Float16", "f32": "Float32"}
CURE = "pip install nccl4py nvidia-nccl-cu13"


def bindings() -> Any:
    """nccl.bindings.nccl, with its library found. DeviceUnavailable with the cure if not."""
    try:
        from nccl.bindings import nccl

        nccl.get_version()
    except ImportError as error:
        raise DeviceUnavailable(f"NCCL's bindings are not installed ({error}): {CURE}") from error
    except Exception as error:                           # the pathfinder's own, and NCCLError
        raise DeviceUnavailable(f"NCCL cannot be loaded ({str(error).splitlines()[0]}): {CURE}") from error
    return nccl


def new_unique_id() -> bytes:
    """What the ranks of one group need to find each other; rank 0 makes it."""
    nccl = bindings()
    try:
        return bytes(nccl.get_unique_id())
    except nccl.NCCLError as error:
        raise DeviceUnavailable(f"NCCL gives no id for a group of ranks ({error}): NCCL_DEBUG=WARN says more") from error


class NcclCollective:
    """backends.cuda.collective.Collective on NCCL."""

    capturable = True

    def __init__(self, unique_id: bytes, rank: int, ranks: int, enter: Callable[[], None]) -> None:
        """enter: makes the rank's device current in the thread that calls it. Raises DeviceUnavailable."""
        self.nccl = bindings()
        self.rank, self.ranks = rank, ranks
        self._id, self._enter = unique_id, enter
        self._communicator: Any = None
        self._failure: str | None = None
        self._lock = threading.Lock()                    # of the two above: one thread ends the communicator, once
        self._met = threading.Event()

    def open(self) -> None:
        """Meeting blocks inside NCCL until all are there, so that a thread of its own does it."""
        problem: list[Exception] = []

        def meet() -> None:
            try:
                self._enter()
                communicator = self.nccl.comm_init_rank(self.ranks, self.nccl.UniqueId.from_buffer(self._id), self.rank)
            except Exception as error:
                problem.append(error)
            else:
                self._keep(communicator)
            self._met.set()

        threading.Thread(target=meet, name="rillet-nccl", daemon=True).start()
        met = self._met.wait(MEETING_S)                  # abort() sets it too
        self.check()
        if problem:
            raise DeviceUnavailable(f"NCCL does not connect rank {self.rank} of {self.ranks} ({problem[0]}): NCCL_DEBUG=WARN "
                                    "says more") from problem[0]  # fmt: skip
        if not met:
            self.abort(f"rank {self.rank} of {self.ranks} did not meet the others within {MEETING_S:g} s")
            self.check()

    def all_reduce(self, stream: Stream, array: Array) -> None:
        n = self.nccl
        at, count, kind = array.address, prod(array.shape), int(getattr(n.DataType, TYPES[array.item]))
        self._call(n.all_reduce, at, at, count, kind, int(n.RedOp.Sum), stream=stream)

    def broadcast(self, stream: Stream, array: Array, root: int = 0) -> None:
        n = self.nccl
        size = prod(array.shape) * ITEM_BYTES[array.item]
        self._call(n.broadcast, array.address, array.address, size, int(n.DataType.Uint8), root, stream=stream)

    def check(self) -> None:
        if self._failure is None and self._communicator is not None:
            state = self.nccl.comm_get_async_error(self._communicator)
            if state not in (self.nccl.Result.Success, self.nccl.Result.InProgress):
                self.abort(f"NCCL failed on rank {self.rank}: {self.nccl.get_error_string(state)}")
        if self._failure is not None:
            raise StepFailed(self._failure)

    def abort(self, why: str) -> None:
        with self._lock:
            self._failure = self._failure or why
            communicator, self._communicator = self._communicator, None
        self._met.set()
        if communicator is not None:
            self._end(communicator)

    def close(self) -> None:
        """By abort, which frees this rank's side at once; comm_destroy would wait for ranks that may be gone."""
        self.abort("the ranks are closed")

    def _keep(self, communicator: Any) -> None:
        with self._lock:
            if self._failure is None:
                self._communicator = communicator
                return
        self._end(communicator)                          # nobody waits for it any more

    def _end(self, communicator: Any) -> None:
        try:
            self.nccl.comm_abort(communicator)
        except self.nccl.NCCLError as error:
            self._failure = f"{self._failure} (and NCCL did not end: {error})"

    def _call(self, function: Callable[..., Any], *arguments: int, stream: Stream) -> None:
        communicator = self._communicator
        if communicator is None:
            raise StepFailed(self._failure or "NCCL is asked before open()")
        handle: Any = stream
        try:
            function(*arguments, communicator, int(handle.handle))
        except self.nccl.NCCLError as error:
            raise StepFailed(f"NCCL failed on rank {self.rank}: {error}") from error
