"""Team: rank 0's seat, and the other ranks as rank 0 sees them. parallel.py leads it; processes.py, or a test, makes it."""

from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Protocol, TypeVar

from backends.cuda.messages import Failed, Loaded, Message, Pages, Ready, decode_answer, encode
from backends.cuda.seat import Seat
from engine.wire import Connection, WireError

__all__ = ["Life", "Lost", "Peer", "Team"]

Answer = TypeVar("Answer", Ready, Loaded, Pages)


class Life(Protocol):
    """What runs a rank."""

    def last_words(self) -> str:
        """The last line that it wrote to stderr, and how it ended; waits a little for both."""
        ...

    def end(self, wait_s: float) -> None:
        """Let it end by itself for so long, then end it. Bounded in time; idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Lost:
    """A rank that is no more: the error it told of, "" if it could not, and what is known."""

    rank: int
    error: str
    text: str


class Peer:
    """Another rank."""

    def __init__(self, rank: int, device_id: int, connection: Connection, life: Life) -> None:
        self.rank, self.name = rank, f"rank {rank} (device {device_id})"
        self.connection, self.life = connection, life
        self.answers: SimpleQueue[Ready | Loaded | Pages | None] = SimpleQueue()

    def watch(self, lost: Callable[[Lost], None]) -> None:
        """Hear what it says, in a thread; `lost` is called there, once, when it failed or its connection ended."""
        Thread(target=self._hear, args=(lost,), name=f"rillet-rank-{self.rank}", daemon=True).start()

    def _hear(self, lost: Callable[[Lost], None]) -> None:
        try:
            while True:
                match decode_answer(self.connection.receive()):
                    case Failed(error, text):
                        lost(Lost(self.rank, error, f"{self.name} failed: {error}: {text}"))
                        return
                    case answer:
                        self.answers.put(answer)
        except WireError as error:
            lost(Lost(self.rank, "", f"{self.name} is lost: {self.life.last_words()} ({error})"))
        finally:
            self.answers.put(None)

    def order(self, message: Message) -> None:
        """Raises WireError."""
        self.connection.send(encode(message))

    def answer(self, kind: type[Answer]) -> Answer | None:
        """Its next answer; None if it is lost."""
        answer = self.answers.get()
        if answer is None:
            self.answers.put(None)
            return None
        if not isinstance(answer, kind):
            raise WireError(f"{self.name} says {type(answer).__name__}, {kind.__name__} is due")
        return answer


@dataclass(frozen=True, slots=True)
class Team:
    """dismissed: called last, when all ranks have ended."""

    seat: Seat
    peers: tuple[Peer, ...]
    dismissed: Callable[[], None] = lambda: None
