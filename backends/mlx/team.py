"""The ranks of a model as their leader sees them: started, met, heard and ended. parallel.py leads them.

Each is a `python -m backends.mlx.rank` that sees the same modules as this process. The secret goes through its stdin; its
stderr comes into our log, and its last line into the error if it dies. The ring's ports are held until all ranks have met;
its sockets are MLX's own, on the loopback address, and know no secret: they listen only while the ranks meet.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic

import msgspec

from backends.mlx.messages import Answer, Failed, Message, decode_answer, decode_join, encode
from backends.mlx.rank import Settings
from engine.errors import DeviceUnavailable, StepFailed
from engine.wire import Connection, Listener, WireError, new_secret

__all__ = ["Peer", "Team"]

log = logging.getLogger("rillet")
HOST = "127.0.0.1"
STARTING_S = 60.0                # until each process has said who it is
JOINING_S = 5.0
LOOK_S = 0.1
SILENT_S = 300.0                 # so long a rank may say nothing when an answer is due
LAST_LINES, LINE_BYTES = 20, 2048
LEVELS = logging.getLevelNamesMapping()

Lost = Callable[["Peer", str, str], None]
"""(which rank, the error that it told of or "", what is known): called from the rank's thread."""


class Peer:
    """A rank: its process, its log, and its connection once it has come."""

    def __init__(self, settings: Settings, hosts: Path) -> None:
        self.rank, self.name = settings.rank, f"rank {settings.rank} of {settings.ranks}"
        self.connection: Connection | None = None
        self.answers: SimpleQueue[Answer | None] = SimpleQueue()         # None: it is lost
        self.lines: deque[str] = deque(maxlen=LAST_LINES)
        modules = os.pathsep.join(str(Path(folder).absolute()) for folder in sys.path)
        ring = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(settings.rank), "PYTHONPATH": modules}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "backends.mlx.rank"], env={**os.environ, **ring},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.logging = Thread(target=self._log, name=f"rillet-rank-{self.rank}-log", daemon=True)
        self.logging.start()
        assert self.process.stdin is not None
        with suppress(OSError), self.process.stdin as stdin:             # one that died at once is noticed soon enough
            stdin.write(msgspec.json.encode(settings) + b"\n")

    def watch(self, lost: Lost) -> None:
        """Hear what it says, in a thread; `lost` is called there, once, when it failed or its connection ended."""
        assert self.connection is not None
        Thread(target=self._hear, args=(self.connection, lost), name=f"rillet-rank-{self.rank}", daemon=True).start()

    def order(self, message: Message) -> None:
        """Raises WireError."""
        assert self.connection is not None
        self.connection.send(encode(message))

    def answer(self) -> Answer | None:
        """Its next answer; None if it is lost, StepFailed if it says nothing for too long."""
        try:
            answer = self.answers.get(timeout=SILENT_S)
        except Empty:
            raise StepFailed(f"{self.name} says nothing for {SILENT_S:g} s: start again") from None
        if answer is None:
            self.answers.put(None)
        return answer

    def last_words(self) -> str:
        """The last line that it wrote to stderr, and how it ended; waits a little for both."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)
        self.logging.join(1.0)
        status = self.process.returncode
        how = "it hangs" if status is None else f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return f"{self.lines[-1]} ({how})" if self.lines else how

    def end(self, wait_s: float) -> None:
        """Let it end by itself for so long, then end it. Bounded in time; idempotent."""
        for ask, wait in ((None, wait_s), (self.process.terminate, 2.0), (self.process.kill, 2.0)):
            if ask is not None:
                ask()
            try:
                self.process.wait(wait)
                break
            except subprocess.TimeoutExpired:
                continue
        self.logging.join(1.0)
        if self.connection is not None:
            self.connection.close()

    def _hear(self, connection: Connection, lost: Lost) -> None:
        try:
            while True:
                match decode_answer(connection.receive()):
                    case Failed(error, text):
                        lost(self, error, f"{self.name} failed: {text}")
                        return
                    case answer:
                        self.answers.put(answer)
        except WireError as error:
            lost(self, "", f"{self.name} is lost: {self.last_words()} ({error})")
        finally:
            self.answers.put(None)

    def _log(self) -> None:
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


class Team:
    """All ranks of a model, each in a process."""

    def __init__(self, ranks: int, max_batch_tokens: int, opener: str) -> None:
        """Start the processes and wait until each has said who it is. DeviceUnavailable; then nothing stays behind."""
        secret = new_secret()
        self.ports = [reserved_port() for _ in range(ranks)]
        self.peers: list[Peer] = []
        self.listener = Listener(secret)                 # until the end: its threads may still be greeting
        handle, path = tempfile.mkstemp(prefix="rillet-ring-", suffix=".json")
        self.hosts = Path(path)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump([[f"{HOST}:{port.getsockname()[1]}"] for port in self.ports], file)
            level = log.getEffectiveLevel()
            for rank in range(ranks):
                settings = Settings(rank, ranks, self.listener.port, secret, max_batch_tokens, opener, level)
                self.peers.append(Peer(settings, self.hosts))
            self._greet()
        except BaseException:
            self.end(0.0)
            raise

    def met(self) -> None:
        """All ranks have met: what only their meeting needed goes."""
        for port in self.ports:
            port.close()
        self.hosts.unlink(missing_ok=True)

    def end(self, wait_s: float) -> None:
        """All ranks at a time: they may end by themselves for so long, then they must. From any thread; idempotent."""
        endings = [Thread(target=peer.end, args=(wait_s,)) for peer in self.peers]
        for ending in endings:
            ending.start()
        for ending in endings:
            ending.join()
        self.listener.close()
        self.met()

    def _greet(self) -> None:
        deadline = monotonic() + STARTING_S
        while missing := [peer for peer in self.peers if peer.connection is None]:
            for peer in missing:
                if peer.process.poll() is not None:
                    raise DeviceUnavailable(f"{peer.name} ended before it began: {peer.last_words()}")
            if monotonic() > deadline:
                names = ", ".join(peer.name for peer in missing)
                raise DeviceUnavailable(f"{names} did not start within {STARTING_S:g} s: see the log")
            with suppress(WireError):
                self._take(self.listener.accept(LOOK_S))

    def _take(self, connection: Connection) -> None:
        try:
            rank = decode_join(connection.receive(wait_s=JOINING_S)).rank
        except WireError as error:
            log.warning("a rank connected and did not say which: %s", error)
            connection.close()
            return
        if 0 <= rank < len(self.peers) and self.peers[rank].connection is None:
            self.peers[rank].connection = connection
        else:
            connection.close()


def reserved_port() -> socket.socket:
    """A port that nobody else is given, but that a process of the same user may bind too, as MLX's ring does."""
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform != "win32":
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind((HOST, 0))
    return held
