"""The processes of the other ranks: started, met, heard and ended. parallel.py calls start_processes.

Each is a `python -m backends.cuda.rank` that sees the same modules as this process. The secret goes through its stdin; its
stderr comes into our log, and its last line into the error if it dies.
"""

import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import monotonic

import msgspec

from backends.cuda.messages import decode_join
from backends.cuda.rank import Settings
from backends.cuda.seat import CUDA_SEAT, Place, find_factory
from backends.cuda.team import Peer, Team
from engine.errors import DeviceUnavailable
from engine.wire import Connection, Listener, WireError, new_secret

__all__ = ["RankProcess", "start_processes"]

log = logging.getLogger("rillet")
STARTING_S = 120.0               # a cold disk and a driver that wakes up take their time
JOINING_S = 5.0
LOOK_S = 0.1
LAST_LINES, LINE_BYTES = 20, 2048
LEVELS = logging.getLevelNamesMapping()


class RankProcess:
    """backends.cuda.team.Life of a child process."""

    def __init__(self, settings: Settings) -> None:
        self.rank = settings.rank
        self.lines: deque[str] = deque(maxlen=LAST_LINES)
        modules = os.pathsep.join(str(Path(folder).absolute()) for folder in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "backends.cuda.rank"], env={**os.environ, "PYTHONPATH": modules},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )  # fmt: skip
        self.listening = Thread(target=self.listen, name=f"rillet-rank-{self.rank}-log", daemon=True)
        self.listening.start()
        assert self.process.stdin is not None
        with suppress(OSError), self.process.stdin as stdin:                 # one that died at once is noticed soon enough
            stdin.write(msgspec.json.encode(settings) + b"\n")

    def listen(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            while line := stderr.readline(LINE_BYTES):
                text = line.decode(errors="replace").rstrip()
                if text:
                    self.lines.append(text)
                    level, _, message = text.partition(" ")
                    if level in LEVELS:
                        log.log(LEVELS[level], "rank %d: %s", self.rank, message)
                    else:
                        log.debug("rank %d: %s", self.rank, text)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)
        self.listening.join(1.0)
        status = self.process.returncode
        how = "it hangs" if status is None else f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return f"{self.lines[-1]} ({how})" if self.lines else how

    def end(self, wait_s: float) -> None:
        for ask, wait in ((None, wait_s), (self.process.terminate, 2.0), (self.process.kill, 2.0)):
            if ask is not None:
                ask()
            try:
                self.process.wait(wait)
                break
            except subprocess.TimeoutExpired:
                continue
        self.listening.join(1.0)


class Meeting:
    """Connections of the ranks, as they come in, told apart by what they are for."""

    def __init__(self, listener: Listener, processes: Mapping[int, RankProcess]) -> None:
        self.listener, self.processes = listener, processes
        self.met: dict[str, dict[int, Connection]] = {"orders": {}, "sums": {}}

    def all_for(self, purpose: str) -> dict[int, Connection]:
        """Every rank's connection for that purpose. DeviceUnavailable if one died or is too late."""
        met, deadline = self.met[purpose], monotonic() + STARTING_S
        while met.keys() != self.processes.keys():
            try:
                self.greet(self.listener.accept(LOOK_S))
            except WireError:
                self.look(met, deadline)
        return met

    def greet(self, connection: Connection) -> None:
        try:
            join = decode_join(connection.receive(wait_s=JOINING_S))
        except WireError as error:
            log.warning("a rank connected and did not say which: %s", error)
            connection.close()
            return
        met = self.met.get(join.purpose)
        if met is None or join.rank not in self.processes or join.rank in met:
            connection.close()
        else:
            met[join.rank] = connection

    def look(self, met: Mapping[int, Connection], deadline: float) -> None:
        for rank, process in self.processes.items():
            if process.ended():
                raise DeviceUnavailable(f"rank {rank} ended before it began: {process.last_words()}")
        if monotonic() > deadline:
            missing = sorted(self.processes.keys() - met.keys())
            raise DeviceUnavailable(f"the processes of ranks {missing} did not connect within {STARTING_S:g} s: see the log")

    def close(self) -> None:
        self.listener.close()
        for met in self.met.values():
            for connection in met.values():
                connection.close()


def start_processes(device_ids: tuple[int, ...], factory: str = CUDA_SEAT) -> Team:
    """A process for each device but the first, which is ours. Raises DeviceUnavailable; then nothing stays behind."""
    ranks, secret = len(device_ids), new_secret()
    listener = Listener(secret)
    processes: dict[int, RankProcess] = {}
    meeting = Meeting(listener, processes)
    try:
        nccl_id = _nccl_id() if factory == CUDA_SEAT else None
        level = log.getEffectiveLevel()
        for rank in range(1, ranks):
            processes[rank] = RankProcess(
                Settings(rank, ranks, device_ids[rank], listener.port, secret, nccl_id, factory, level)
            )
        seat = find_factory(factory)(Place(0, ranks, device_ids[0], nccl_id, lambda: meeting.all_for("sums")))
        try:
            orders = meeting.all_for("orders")
        except BaseException:
            seat.backend.close()
            raise
        peers = [Peer(rank, device_ids[rank], orders[rank], processes[rank]) for rank in sorted(processes)]
        return Team(seat, tuple(peers), meeting.close)
    except BaseException:
        meeting.close()
        for process in processes.values():
            process.end(0.0)
        raise


def _nccl_id() -> bytes | None:
    """Of a new NCCL group; None where there is no NCCL."""
    if sys.platform != "win32":
        from backends.cuda.nccl import new_unique_id

        try:
            return new_unique_id()
        except DeviceUnavailable as error:
            log.warning("%s: until then sums between devices go through the host, which is slow", error)
    return None
