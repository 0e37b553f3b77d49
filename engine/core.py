"""The loop: plan k + 1, submit k + 1, wait k, deliver k. While the device runs a step, the one after it is already queued.

The device thread makes every call to the backend that may take time; the event loop does everything else. One hop between
them per step, or none where the backend calls back from a thread of its own. When the device fails, the engine is dead and
says so to everybody: no stream waits for ever.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from time import monotonic
from typing import Any, TypeVar, cast

import anyio
from anyio.lowlevel import current_token

from engine.backend import Backend, CallingTicket, Ticket
from engine.errors import BackendError, EngineClosed, Overloaded, RilletError, StepFailed
from engine.latencies import Latencies
from engine.metrics import Metrics
from engine.pace import Pace
from engine.packing import Plan
from engine.scheduler import Scheduler
from engine.sequence import Request, State
from engine.step import StepOutput

__all__ = ["Core", "DeviceThread"]

log = logging.getLogger("rillet")
T = TypeVar("T")
RATE_WINDOW_S = 10.0


def loop_caller() -> Callable[[Callable[[], object]], object]:
    """A function that runs a callback on the running event loop, to be called from any thread (asyncio or trio)."""
    native: Any = current_token().native_token
    call_soon = native.call_soon_threadsafe if isinstance(native, asyncio.AbstractEventLoop) else native.run_sync_soon
    return cast(Callable[[Callable[[], object]], object], call_soon)


def from_any_thread(function: Callable[[], object]) -> Callable[[], None]:
    """What has the running event loop call the function; it never raises."""
    on_loop = loop_caller()

    def tell() -> None:
        try:
            on_loop(function)
        except RuntimeError:                              # the loop is gone; nobody waits any more
            log.debug("a device call ended after its event loop")

    return tell


class DeviceThread:
    """One thread that runs calls in order and hands each result back to the event loop."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], object], Callable[[object, BaseException | None], None]] | None]
        self._jobs = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="rillet-device", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            call, report = job
            try:
                result: object = call()
            except BaseException as error:               # whatever it is, whoever waits must hear of it
                report(None, error)
            else:
                report(result, None)
            del job, call, report

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run function(*arguments) on the thread. If the caller is cancelled the call still runs to its end there."""
        done = anyio.Event()
        tell = from_any_thread(done.set)
        outcome: list[object] = []

        def report(result: object, error: BaseException | None) -> None:
            outcome.extend((result, error))
            tell()

        self._jobs.put((lambda: function(*arguments), report))
        await done.wait()
        result, error = outcome
        if isinstance(error, BaseException):
            raise error
        return cast(T, result)

    def stop(self) -> None:
        """End the thread when it has done what is queued."""
        self._jobs.put(None)

    def stop_after(self, function: Callable[[], object]) -> None:
        """Like stop, with one last call whose outcome nobody waits for."""
        self._jobs.put((function, lambda result, error: None))
        self._jobs.put(None)


class Core:
    """Owns scheduler and device thread; `run` is the engine's one task. Every method is called on the event loop."""

    def __init__(
        self, backend: Backend, device: DeviceThread, scheduler: Scheduler, metrics: Metrics, *, most: int, lookahead: bool
    ) -> None:
        self.scheduler = scheduler
        self.metrics = metrics
        self._latencies = Latencies(metrics)
        self.failure: RilletError | None = None
        self.died = anyio.Event()                         # set with failure
        self.closing = False
        self._backend = backend
        self.calls_back = backend.info.calls_back
        self._device = device
        self._most = most                                 # sequences waiting or running
        self._lookahead = lookahead
        self._pace = Pace(scheduler.limits.beside_decoding, scheduler.limits.max_batch_tokens)
        self._live: dict[int, Request] = {}
        self._sequences = 0                               # of live requests
        self._work = anyio.Event()
        self._idle = anyio.Event()
        self._idle.set()
        self._finished: deque[tuple[float, int]] = deque(maxlen=64)      # (when, sequences), for Retry-After

    # ---- called by the API ----------------------------------------------------------------------------------------

    def check_open(self) -> None:
        if self.failure is not None:
            raise EngineClosed(f"the engine is dead: {self.failure}: start it again") from self.failure
        if self.closing:
            raise EngineClosed("the engine is closing and takes no new requests")

    def check_room(self, choices: int) -> None:
        """Raise Overloaded if `choices` more sequences are more than may wait and run."""
        if self._sequences + choices > self._most:
            raise Overloaded(
                f"{self._sequences} sequences wait or run, at most {self._most} may: try again later",
                retry_after_s=self._retry_after(choices),
            )

    def _retry_after(self, choices: int) -> float:
        """Seconds until `choices` sequences will have ended, at the rate of the last ones; 1 to 60."""
        now = monotonic()
        recent = [count for when, count in self._finished if now - when < RATE_WINDOW_S]
        rate = sum(recent) / RATE_WINDOW_S
        return min(60.0, max(1.0, choices / rate)) if rate else 5.0

    def submit(self, request: Request) -> None:
        """Admit a request; Overloaded or EngineClosed if that cannot be."""
        self.check_open()
        self.check_room(len(request.sequences))
        request.arrived_s = monotonic()
        self._live[request.number] = request
        self._sequences += len(request.sequences)
        self.metrics.prompt_tokens_total += len(request.prompt)
        self.metrics.request_prompt_tokens.observe(len(request.prompt))
        self.scheduler.add(request)
        self._idle = anyio.Event() if self._idle.is_set() else self._idle
        self._work.set()

    def abort(self, request: Request) -> None:
        """End a request at whatever point it is; harmless if it has ended."""
        if request.number in self._live:
            self.scheduler.abort(request)
            self._retire(request, "abort")
            self._work.set()

    def _retire(self, request: Request, reason: str) -> None:
        del self._live[request.number]
        self._sequences -= len(request.sequences)
        now = monotonic()
        self._finished.append((now, len(request.sequences)))
        self.metrics.request_success[reason] += 1
        self._latencies.observe_end(request, now)
        answered = [len(sequence.tokens) - sequence.prompt_length for sequence in request.sequences]
        for count in answered:
            self.metrics.request_generation_tokens.observe(count)
        took_s = now - request.arrived_s
        log.debug("request %d: %d + %s tokens, %s, %.2f s", request.number, len(request.prompt), answered, reason, took_s)

    async def drain(self, deadline_s: float) -> None:
        """Take nothing new; wait until everything has ended, at most deadline_s; then end what is left with "abort"."""
        self.closing = True
        if self.failure is None:
            with anyio.move_on_after(deadline_s):
                await self._idle.wait()
        for request in list(self._live.values()):
            self.abort(request)

    # ---- the loop -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run steps until cancelled, or until the device fails."""
        try:
            while True:
                await self._work.wait()
                self._work = anyio.Event()
                await self._until_idle()
        except anyio.get_cancelled_exc_class():
            raise
        except Exception as error:
            self._die(error)

    async def _until_idle(self) -> None:
        flying: tuple[Plan, Ticket] | None = None
        began = monotonic()                               # when the device could begin with what is in flight
        while flying is not None or self.scheduler.has_work:
            plan = self.scheduler.plan() if flying is None or self._lookahead else None
            if plan is None and flying is None:
                raise StepFailed(
                    f"nothing can run though {len(self.scheduler.waiting)} sequences wait and {len(self.scheduler.running)} "
                    f"run ({self.scheduler.pool.counts()}): this is a bug of Rillet, please report it"
                )
            began = began if flying is not None else monotonic()
            if plan is not None:
                self._latencies.observe_start(plan, monotonic())
            ticket, output = await self._step(plan, flying and flying[1])
            if flying is not None and output is not None:
                now = monotonic()
                self._pace.observe(*_tokens_of(flying[0]), now - began)
                began = now
                self._deliver(flying[0], output)
                self.scheduler.beside_decoding = self._pace.bound(*self.scheduler.company)
            flying = (plan, ticket) if plan is not None and ticket is not None else None
        self._audit()
        self._idle.set()

    async def _step(self, plan: Plan | None, previous: Ticket | None) -> tuple[Ticket | None, StepOutput | None]:
        """Queue the next step, then wait for the one before it: on the device thread, if anything of it may take time."""
        if not self.calls_back or (plan is not None and len(plan.masks.at)):
            return await self._device.call(self._turn, plan, previous)
        ticket = None if plan is None else self._backend.submit(plan.step)
        if previous is None:
            return ticket, None
        done = anyio.Event()
        cast(CallingTicket, previous).when_done(from_any_thread(done.set))
        await done.wait()
        return ticket, self._backend.wait(previous)

    def _turn(self, plan: Plan | None, previous: Ticket | None) -> tuple[Ticket | None, StepOutput | None]:
        """On the device thread: queue the next step, then wait for the one before it."""
        ticket = None
        if plan is not None:
            plan.masks.fill()
            ticket = self._backend.submit(plan.step)
        return ticket, self._backend.wait(previous) if previous is not None else None

    def _deliver(self, plan: Plan, output: StepOutput) -> None:
        metrics, now = self.metrics, monotonic()
        metrics.steps_total += 1
        metrics.generation_tokens_total += sum(sequence.state is not State.FINISHED for sequence in plan.draws)
        metrics.iteration_tokens_total.observe(plan.step.token_count)
        self.scheduler.deliver(plan, output)
        metrics.num_preemptions = self.scheduler.preemptions
        self._latencies.observe_step(plan, now)
        for sequence in plan.draws:
            request = sequence.request
            if sequence.state is State.FINISHED and request.number in self._live:
                self._retire_if_done(request)
        for row in plan.prefills:                          # requests that wanted only their prompt
            if row.sequence.state is State.FINISHED and row.sequence.request.number in self._live:
                self._retire_if_done(row.sequence.request)

    def _retire_if_done(self, request: Request) -> None:
        if all(sequence.state is State.FINISHED for sequence in request.sequences):
            failed = any(sequence.finish_reason == "error" for sequence in request.sequences)
            self._retire(request, "error" if failed else str(request.sequences[0].finish_reason))

    def _audit(self) -> None:
        wrong = self.scheduler.audit()
        if wrong is not None:
            self.metrics.audit_failures += 1
            log.error("idle audit: %s", wrong)

    def _die(self, error: Exception) -> None:
        """Every stream ends with the error, nothing new is taken."""
        log.error("the engine is dead: %s", error, exc_info=error)
        if isinstance(error, BackendError):
            self.failure = error
        else:
            self.failure = StepFailed(f"a step failed: {type(error).__name__}: {error}")
            self.failure.__cause__ = error
        self.died.set()
        for request in list(self._live.values()):
            request.mailbox.fail(self.failure)
        self._live.clear()
        self._sequences = 0
        self._idle.set()


def _tokens_of(plan: Plan) -> tuple[int, int]:
    """Decoding rows and tokens of prompts in a step."""
    prompts = sum(row.count for row in plan.prefills)
    return plan.step.token_count - prompts, prompts
