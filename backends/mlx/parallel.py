"""ParallelBackend: what the entry point `mlx` makes. One device is the plain backend; --d 0,1 are ranks in processes.

Every rank has a process, the first one too: a sum that waits for a lost rank cannot be called off from outside, a process
can, and MLX makes one ring per process. Each order goes to all of them, the sums keep them together, the first tells what
was drawn. A rank that fails or is lost ends all of them: whoever waits for a step gets StepFailed with its last words.
"""

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeVar

import engine.errors
from backends.mlx.messages import (
    Allocate,
    Close,
    Drew,
    Load,
    Loaded,
    Loading,
    Message,
    Pages,
    Ready,
    Wait,
    for_followers,
    pack_step,
    unpack_output,
)
from backends.mlx.rank import OPENER, digest_of
from backends.mlx.runner import MlxBackend
from backends.mlx.sharding import check_heads
from backends.mlx.team import Peer, Team
from engine.backend import BackendInfo, LoadOptions, MemoryStatistics, Progress, Ticket
from engine.errors import ConfigError, ModelError, RilletError, StepFailed, UnsupportedModel
from engine.model.spec import ModelSpec
from engine.step import StepInput, StepOutput
from engine.weights.tensors import TensorSource
from engine.wire import WireError

__all__ = ["ParallelBackend"]

log = logging.getLogger("rillet")
ENDING_S = 10.0
BLAME_S = 5.0                    # so long a sum that broke waits for the reason, which another rank is to tell
BROKEN_SUM = "[ring]"            # how MLX's errors of a ring begin

Kind = TypeVar("Kind", Ready, Loaded, Pages, Drew)
ERRORS: dict[str, type[RilletError]] = {name: getattr(engine.errors, name) for name in (
    "ConfigError", "DeviceUnavailable", "ModelNotFound", "OutOfDeviceMemory", "StepFailed", "UnsupportedModel",
)} | {"BadModelFile": ModelError}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankTicket:
    """A step that all ranks have been told of."""

    number: int


class ParallelBackend:
    """engine.backend.Backend over one device or several ranks."""

    def __init__(self, opener: str = OPENER) -> None:
        """opener: "module:function", what opens a checkpoint's path in the ranks. Raises DeviceUnavailable."""
        self._alone = MlxBackend()
        self._opener = opener
        self._info: BackendInfo = self._alone.info
        self._team: Team | None = None
        self._memory: list[MemoryStatistics] = []
        self._failure: RilletError | None = None
        self._failed = Event()
        self._lock = Lock()                              # of _failure
        self._closed = False
        self._submitted = 0
        self._waiting: deque[int] = deque()

    @property
    def info(self) -> BackendInfo:
        return self._info

    def load(self, spec: ModelSpec, tensors: TensorSource, options: LoadOptions, progress: Progress) -> None:
        """Take the weights, on all ranks at the same time. Raises what a rank raised, with its name."""
        devices = options.device_ids
        if len(devices) == 1:
            self._alone.load(spec, tensors, options, progress)
            return
        self._check_possible(spec, options)
        if self._team is None:
            self._start(len(devices), progress)
        with self._to_blame():
            self._order(Load(options, digest_of(spec)))
            loaded = self._answers(Loaded, progress)
        kinds = {answer.dtype for answer in loaded}
        if len(kinds) > 1:
            raise UnsupportedModel(f"the ranks chose different types, {sorted(kinds)}: name one with --dtype")
        self._memory = [answer.memory for answer in loaded]
        self._waiting.clear()

    def allocate_cache(self, budget_bytes: int | None) -> int:
        """Pages: the least that any rank has. budget_bytes: of all ranks together, which share one memory."""
        if self._team is None:
            return self._alone.allocate_cache(budget_bytes)
        with self._to_blame():
            self._order(Allocate(None if budget_bytes is None else budget_bytes // len(self._team.peers)))
            answers = self._answers(Pages)
        self._memory = [answer.memory for answer in answers]
        return min(answer.count for answer in answers)

    def submit(self, step: StepInput) -> Ticket:
        if self._team is None:
            return self._alone.submit(step)
        with self._to_blame(StepFailed):
            self._order(pack_step(step), pack_step(for_followers(step)))
        self._submitted += 1
        self._waiting.append(self._submitted)
        return RankTicket(self._submitted)

    def wait(self, ticket: Any) -> StepOutput:
        if self._team is None:
            return self._alone.wait(ticket)
        expected = self._waiting.popleft()
        assert ticket.number == expected, "tickets are waited for in the order of submission"
        with self._to_blame(StepFailed):
            self._order(Wait())
            return unpack_output(self._answer(self._team.peers[0], Drew))

    def memory(self) -> MemoryStatistics:
        """Of all ranks together."""
        if self._team is None:
            return self._alone.memory()
        every = self._memory
        return MemoryStatistics(
            sum(each.weights_bytes for each in every),
            sum(each.cache_bytes for each in every),
            sum(each.scratch_bytes for each in every),
        )

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._alone.close()
        if self._team is not None:
            for peer in self._team.peers:
                try:
                    peer.order(Close())
                except WireError as error:
                    log.debug("%s is not there to be closed: %s", peer.name, error)
            self._team.end(ENDING_S)

    # ---- the ranks ----------------------------------------------------------------------------------------------------

    def _check_possible(self, spec: ModelSpec, options: LoadOptions) -> None:
        """Refuse what cannot be before anything is started."""
        from backends.mlx.collective import check_ring

        devices, path = options.device_ids, options.checkpoint
        ranks = len(devices)
        if devices != tuple(range(ranks)):
            wanted = ",".join(map(str, range(ranks)))
            raise ConfigError(
                f"--d {','.join(map(str, devices))} names devices that MLX does not have: its ranks are processes of one "
                f"machine, counted from 0: for {ranks} of them say --d {wanted}"
            )
        if self._team is not None and ranks != len(self._team.peers):
            raise ConfigError(f"{len(self._team.peers)} ranks run, {ranks} are wanted: make a new backend")
        check_ring()
        if path is None or (self._opener == OPENER and not Path(path).exists()):
            raise UnsupportedModel(f"{ranks} ranks each open the model's files, and this model has none: leave --d out")
        if options.fp8_kvcache and "fp8_kvcache" not in self._info.supports:
            raise UnsupportedModel("the mlx backend has an fp8 KV cache on Metal only: leave --fp8-kvcache out")
        check_heads(spec, ranks)

    def _start(self, ranks: int, progress: Progress) -> None:
        progress("starting ranks", 0, ranks)
        self._team = team = Team(ranks, self._info.max_batch_tokens, self._opener)
        self._info = replace(self._info, device=f"{ranks} ranks, {self._info.device}")
        for peer in team.peers:
            peer.watch(self._lost)
        with self._to_blame():
            self._answers(Ready)
        team.met()
        progress("starting ranks", ranks, ranks)

    def _order(self, first: Message, others: Message | None = None) -> None:
        """others: what the ranks behind the first are told, if it is not the same."""
        assert self._team is not None
        self._check()
        for peer in self._team.peers:
            peer.order(first if others is None or peer.rank == 0 else others)

    def _answers(self, kind: type[Kind], progress: Progress | None = None) -> list[Kind]:
        """One of each rank, in their order."""
        assert self._team is not None
        return [self._answer(peer, kind, progress) for peer in self._team.peers]

    def _answer(self, peer: Peer, kind: type[Kind], progress: Progress | None = None) -> Kind:
        while isinstance(answer := peer.answer(), Loading):
            self._check()
            if progress is not None:
                progress(answer.what, answer.done, answer.total)
        if answer is None:
            raise WireError(f"{peer.name} is lost")
        if not isinstance(answer, kind):
            raise WireError(f"{peer.name} says {type(answer).__name__}, {kind.__name__} is due")
        return answer

    def _check(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))

    def _lost(self, peer: Peer, error: str, text: str) -> None:
        """From a rank's thread: nothing goes on without it."""
        if BROKEN_SUM in text and self._failed.wait(BLAME_S):
            return                                       # it lost another, which is told now
        self._fail(ERRORS.get(error, StepFailed)(text))

    def _fail(self, error: RilletError) -> None:
        """Remember the first failure and end the ranks, which lets go whoever waits for one. From any thread."""
        with self._lock:
            if self._failure is not None or self._closed:
                return
            self._failure = error
        log.error("%s: all ranks end", error)
        self._failed.set()
        if self._team is not None:
            self._team.end(0.0)

    @contextmanager
    def _to_blame(self, kind: type[RilletError] | None = None) -> Iterator[None]:
        """An error in here ends all ranks. If a rank is to blame, it is that rank's error that goes on, as a `kind`."""
        try:
            yield
        except Exception as error:
            if isinstance(error, WireError):
                self._failed.wait(BLAME_S)               # what broke here tells not why
            failure = self._failure
            if failure is not None:
                raise (kind or type(failure))(str(failure)) from error
            found = error if isinstance(error, RilletError) else StepFailed(f"the ranks cannot be reached: {error}")
            self._fail(found)
            raise found from error
