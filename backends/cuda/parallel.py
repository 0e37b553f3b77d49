"""ParallelBackend: what the entry point `cuda` makes. One device if --d names one, else a rank on each, ours being 0.

Every step goes to the other ranks before our own submit; only ours is waited for, since the sums keep all ranks together. A
rank that fails or is lost ends all of them: whoever waits for a step gets StepFailed with that rank's last words.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import engine.errors
from backends.cuda.collective import RankLost
from backends.cuda.messages import Allocate, Close, Load, Loaded, Message, Pages, Ready, for_followers, pack_step
from backends.cuda.processes import start_processes
from backends.cuda.rank import digest_of
from backends.cuda.seat import Factory, Place, Seat, cuda_seat
from backends.cuda.sharding import check_heads
from backends.cuda.team import Answer, Lost, Team
from engine.backend import BackendInfo, LoadOptions, MemoryStatistics, Progress, Ticket
from engine.errors import BackendError, ModelError, RilletError, StepFailed, UnsupportedModel
from engine.model.spec import ModelSpec
from engine.step import StepInput, StepOutput
from engine.weights.tensors import TensorSource
from engine.wire import WireError

__all__ = ["ParallelBackend"]

log = logging.getLogger("rillet")
ENDING_S = 10.0
BLAME_S = 5.0                    # so long a sum that broke waits for the reason, which comes by another connection

ERRORS = {name: getattr(engine.errors, name) for name in (
    "ConfigError", "DeviceUnavailable", "ModelNotFound", "OutOfDeviceMemory", "StepFailed", "UnsupportedModel",
)} | {"BadModelFile": ModelError}  # fmt: skip


class ParallelBackend:
    """engine.backend.Backend over one device or several."""

    def __init__(
        self, alone: Factory = cuda_seat, start: Callable[[tuple[int, ...]], Team] = start_processes
    ) -> None:
        """alone: makes the backend of one device. start: makes a team of several. Raises DeviceUnavailable."""
        self._alone, self._start = alone, start
        self._seat: Seat = alone(_alone_at(0))
        self._info: BackendInfo = self._seat.backend.info
        self._team: Team | None = None
        self._others: dict[int, MemoryStatistics] = {}
        self._failure: RilletError | None = None
        self._failed = Event()
        self._lock = Lock()                              # of _failure
        self._closing = False

    @property
    def info(self) -> BackendInfo:
        return self._info

    def load(self, spec: ModelSpec, tensors: TensorSource, options: LoadOptions, progress: Progress) -> None:
        """Take the weights, on all devices at the same time. Raises what a rank raised, with its name."""
        devices = options.device_ids
        if len(devices) == 1:
            if devices != (0,):
                self._seat.backend.close()
                self._seat = self._alone(_alone_at(devices[0]))
                self._info = self._seat.backend.info
            self._seat.backend.load(spec, tensors, options, progress)
            return
        if options.checkpoint is None or not Path(options.checkpoint).exists():
            raise UnsupportedModel(
                f"{len(devices)} devices each open the model's files, and this model has none: leave --d away"
            )
        check_heads(spec, len(devices))                  # before anything is started
        self._seat.backend.close()
        self._team = team = self._start(devices)
        self._seat = team.seat
        self._info = replace(self._seat.backend.info, device=f"{len(devices)} x {self._seat.backend.info.device}")
        for peer in team.peers:
            peer.watch(self._lost)

        def watched(what: str, done: int, total: int) -> None:
            self._check()
            progress(what, done, total)

        with self._to_blame():
            for number, _ in enumerate(self._answers(Ready), 1):
                watched("starting devices", number, len(team.peers))
            self._order(Load(options, digest_of(spec)))
            team.seat.collective.open()
            team.seat.backend.load(spec, tensors, options, watched)
            for peer, answer in zip(team.peers, self._answers(Loaded), strict=True):
                self._others[peer.rank] = answer.memory

    def allocate_cache(self, budget_bytes: int | None) -> int:
        """Pages: the least that any rank has. budget_bytes: of each device."""
        if self._team is None:
            return self._seat.backend.allocate_cache(budget_bytes)
        with self._to_blame():
            self._order(Allocate(budget_bytes))
            least = self._seat.backend.allocate_cache(budget_bytes)
            for peer, answer in zip(self._team.peers, self._answers(Pages), strict=True):
                self._others[peer.rank] = answer.memory
                least = min(least, answer.count)
        return least

    def submit(self, step: StepInput) -> Ticket:
        if self._team is None:
            return self._seat.backend.submit(step)
        with self._to_blame(StepFailed):
            self._order(pack_step(for_followers(step)))
            return self._seat.backend.submit(step)

    def wait(self, ticket: Any) -> StepOutput:
        if self._team is None:
            return self._seat.backend.wait(ticket)
        with self._to_blame(StepFailed):
            output = self._seat.backend.wait(ticket)
            self._check()                                # a sum that was aborted is no sum
        return output

    def memory(self) -> MemoryStatistics:
        """Of all devices together."""
        own = self._seat.backend.memory()
        every = [own, *self._others.values()]
        return MemoryStatistics(
            sum(each.weights_bytes for each in every),
            sum(each.cache_bytes for each in every),
            sum(each.scratch_bytes for each in every),
        )

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        try:
            if self._team is not None:
                for peer in self._team.peers:
                    try:
                        peer.order(Close())
                    except WireError as error:
                        log.debug("%s is not there to be closed: %s", peer.name, error)
        finally:
            try:
                self._seat.backend.close()
            finally:
                self._end(ENDING_S)

    # ---- the other ranks ----------------------------------------------------------------------------------------------

    def _order(self, message: Message) -> None:
        assert self._team is not None
        self._check()
        for peer in self._team.peers:
            peer.order(message)

    def _answers(self, kind: type[Answer]) -> list[Answer]:
        """One of each peer, in their order."""
        assert self._team is not None
        answers = []
        for peer in self._team.peers:
            answer = peer.answer(kind)
            if answer is None:
                self._failed.wait(BLAME_S)
                self._check()
                raise BackendError(f"{peer.name} is lost")
            answers.append(answer)
        return answers

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))

    def _lost(self, lost: Lost) -> None:
        """From a peer's thread: nothing goes on without it."""
        if lost.error == RankLost.__name__ and self._failed.wait(BLAME_S):
            return                                       # it was another that it lost, which is told now
        self._fail(ERRORS.get(lost.error, StepFailed)(lost.text))

    def _fail(self, error: RilletError) -> None:
        """Remember the first failure, let go whoever waits for a sum, end the ranks. From any thread."""
        with self._lock:
            if self._failure is not None or self._closing:
                return
            self._failure = error
        log.error("%s: all ranks end", error)
        assert self._team is not None
        self._team.seat.collective.abort(str(error))
        self._failed.set()
        self._end(0.0)

    @contextmanager
    def _to_blame(self, kind: type[RilletError] | None = None) -> Iterator[None]:
        """An error in here ends all ranks. If another rank is to blame, it is that rank's error that goes on, as a `kind`."""
        try:
            yield
        except Exception as error:
            if isinstance(error, WireError | RankLost):
                self._failed.wait(BLAME_S)               # what broke here tells not why
            failure = self._failure
            if failure is not None:
                raise (kind or type(failure))(str(failure)) from error
            self._fail(error if isinstance(error, RilletError) else StepFailed(f"rank 0 failed: {error!r}"))
            raise

    def _end(self, wait_s: float) -> None:
        """All ranks at a time: they may end by themselves for so long, then they must."""
        team = self._team
        if team is None:
            return
        endings = [Thread(target=peer.life.end, args=(wait_s,)) for peer in team.peers]
        for ending in endings:
            ending.start()
        for ending, peer in zip(endings, team.peers, strict=True):
            ending.join()
            peer.connection.close()
        team.dismissed()


def _alone_at(device_id: int) -> Place:
    return Place(0, 1, device_id, None, dict)


