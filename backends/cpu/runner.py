"""CpuBackend: runs steps on one compute thread, so that the event loop goes on while a step is computed.

The core calls it through engine.backend.Backend. Loading, compiling and every step happen on the compute thread, because
only one thread may launch Numba's workers; submit queues, wait joins. Numba is imported on that thread, when a model is
loaded: importing this module must cost nothing.
"""

import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from backends.cpu.host import available_memory_bytes, usable_cores
from engine.backend import BackendInfo, LoadOptions, MemoryStatistics, Progress, Ticket
from engine.errors import BackendError, OutOfDeviceMemory, RilletError, StepFailed, UnsupportedModel
from engine.model.spec import ModelSpec
from engine.step import StepInput, StepOutput
from engine.weights.tensors import TensorSource

if TYPE_CHECKING:
    from backends.cpu.session import Prepared, Session

__all__ = ["CpuBackend"]

log = logging.getLogger(__name__)
LAUNCHES = Lock()         # of kernels, by several engines of one process

PAGE_TOKENS = 32
MAX_BATCH_TOKENS = 256    # 0.6 s of a small model on two cores: what a cancelled prompt may still cost
MAX_PLACES = 512
MAX_NUM_SEQS = 16
SUPPORTS = frozenset(
    {
        "batch_invariant", "logprobs", "hidden", "grammar", "penalties", "bias", "sliding_window", "soft_cap", "copies",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CpuTicket:
    """A step on the compute thread's queue."""

    number: int
    output: "Future[StepOutput]"

    def when_done(self, function: Callable[[], object]) -> None:
        self.output.add_done_callback(lambda output: function())


class CpuBackend:
    """engine.backend.Backend on NumPy and Numba."""

    def __init__(self) -> None:
        self.threads = usable_cores()
        self.compute = ThreadPoolExecutor(1, thread_name_prefix="rillet-cpu")
        self.session: Session | None = None
        self.options = LoadOptions()
        self.steps = 0
        self._unsaid: tuple[Future[StepOutput], StepOutput] | None = None       # the compute thread's own
        self.closed = False

    @property
    def info(self) -> BackendInfo:
        return BackendInfo(
            name="cpu",
            device=f"cpu ({self.threads} threads)",
            page_tokens=PAGE_TOKENS,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_places=MAX_PLACES,
            max_num_seqs=MAX_NUM_SEQS,
            supports=SUPPORTS,
            calls_back=True,
        )

    def load(self, spec: ModelSpec, tensors: TensorSource, options: LoadOptions, progress: Progress) -> None:
        """Repack the weights and compile the kernels, on the compute thread."""
        if options.fp8_kvcache:
            raise UnsupportedModel("the cpu backend has no fp8 KV cache: leave --fp8-kvcache out")
        if options.device_ids != (0,):
            raise UnsupportedModel(f"the cpu backend is one device, not {options.device_ids}: leave --d out")
        self.options = options
        with LAUNCHES:
            self.session = self.compute.submit(self._load, spec, tensors, options, progress).result()

    def _load(self, spec: ModelSpec, tensors: TensorSource, options: LoadOptions, progress: Progress) -> "Session":
        self.threads = start_numba(options.threads or self.threads)
        from backends.cpu.session import Session

        return Session.load(spec, tensors, options, self.threads, progress)

    def allocate_cache(self, budget_bytes: int | None) -> int:
        session = self._session()
        most = session.useful_pages(self.options.max_num_seqs or MAX_NUM_SEQS, self.options.context_length)
        budget = int(available_memory_bytes() * self.options.kv_fraction) if budget_bytes is None else budget_bytes
        pages = budget // session.page_bytes if budget_bytes is not None else min(most, budget // session.page_bytes)
        if pages < 1:
            cure = "raise --kv-bytes" if budget_bytes is not None else "free some memory, or raise --kv-fraction"
            raise OutOfDeviceMemory(
                f"the KV cache gets {budget / 1e6:,.0f} MB, one page of {PAGE_TOKENS} tokens takes "
                f"{session.page_bytes / 1e6:,.1f} MB: {cure}"
            )
        self.compute.submit(session.allocate, pages).result()
        return pages

    def submit(self, step: StepInput) -> Ticket:
        """Queue a step. Its arrays are read until it is waited for; the caller does not change them."""
        session, number, output = self._session(), self.steps + 1, Future[StepOutput]()
        try:
            prepared: Prepared | StepFailed = session.prepare(step)     # while the compute thread is at the step before
        except StepFailed as error:
            prepared = error                              # wait() will say it
        queued = self.compute.submit(self._run, session, prepared, number, output)
        queued.add_done_callback(lambda run: output.cancel() if run.cancelled() else None)
        self.steps = number
        return CpuTicket(number, output)

    def _run(self, session: "Session", step: "Prepared | StepFailed", number: int, output: "Future[StepOutput]") -> None:
        """One step, on the compute thread.

        What a step drew is said when the next one, if it is there, has launched its kernels: whoever hears of it takes
        Python's lock, and all cores would stand still until the work on a few tokens is done.
        """
        try:
            result = run_step(session, step, self._say)
        except BaseException as error:
            self._say()
            output.set_exception(error)
        else:
            self._say()                                   # a step without kernels has not said it
            self._unsaid = output, result
            if self.steps <= number:
                self._say()

    def _say(self) -> None:
        if self._unsaid is not None:
            output, result = self._unsaid
            self._unsaid = None
            output.set_result(result)

    def wait(self, ticket: Ticket) -> StepOutput:
        assert isinstance(ticket, CpuTicket)
        try:
            return ticket.output.result()
        except RilletError:
            raise
        except Exception as error:
            raise StepFailed(f"step {ticket.number} failed on the cpu: {type(error).__name__}: {error}") from error

    def memory(self) -> MemoryStatistics:
        return MemoryStatistics(0, 0, 0) if self.session is None else self.session.memory()

    def close(self) -> None:
        """Finish the step that runs, drop the rest, free everything."""
        self.closed = True
        self.compute.shutdown(wait=True, cancel_futures=True)
        self._say()
        self.session = None

    def _session(self) -> "Session":
        if self.session is None:
            why = "is closed" if self.closed else "has no model: call load first"
            raise BackendError(f"the cpu backend {why}")
        return self.session


def run_step(session: "Session", step: "Prepared | StepFailed", launching: Callable[[], None]) -> StepOutput:
    """Numba's workqueue, which it takes where there is no OpenMP, ends the process if two threads launch at once."""
    if isinstance(step, StepFailed):
        raise step
    import numba

    layer: str = numba.threading_layer()  # type: ignore[attr-defined]
    with LAUNCHES if layer == "workqueue" else nullcontext():
        return session.run(step, launching)


def start_numba(threads: int) -> int:
    """Set the thread count of this thread's kernels, and return it: Numba's maximum is fixed when it is imported."""
    if "numba" not in sys.modules:
        os.environ.setdefault("NUMBA_NUM_THREADS", str(threads))
        os.environ.setdefault("NUMBA_OPT", "2")           # a first start is a seventh shorter, and steps are as fast
    # OpenMP's workers spin between kernels. So short a bound costs an idle machine nothing that was measured; beside a busy
    # process it makes a stream three times faster (docs/measurements.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import numba

    most = int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if threads > most:
        log.warning("%d threads were asked for, Numba was started with %d: set NUMBA_NUM_THREADS=%d", threads, most, threads)
    numba.set_num_threads(min(threads, most))
    return min(threads, most)
