"""python -m backends.cuda.rank: one of several devices that share a model, in a process of its own. parallel.py starts it.

What it needs to know comes through stdin, the secret included, and orders over a loopback connection: load, allocate, step,
close. It opens the checkpoint by itself; it draws nothing. It ends when rank 0 says so, or is gone.
"""

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread, Timer

import msgspec

from backends.cuda.messages import (
    Allocate,
    Close,
    Failed,
    Join,
    Load,
    Loaded,
    Message,
    Pages,
    Ready,
    Step,
    decode_order,
    encode,
    unpack_step,
)
from backends.cuda.seat import Place, Seat, find_factory
from engine.backend import Backend, LoadOptions, Ticket
from engine.errors import BadModelFile
from engine.model.spec import ModelSpec
from engine.weights.checkpoint import open_checkpoint
from engine.wire import Connection, WireError, connect

__all__ = ["Settings", "digest_of", "serve"]

log = logging.getLogger("rillet")
SETTINGS_BYTES = 1 << 16
SOON_S = 0.05                    # so long a step in flight may be left alone, in case the next one comes meanwhile
STUCK_S = 10.0                   # so long the process has to end when rank 0 is gone

Order = Load | Allocate | Step | Close


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of JSON on stdin."""

    rank: int
    ranks: int
    device_id: int
    port: int
    secret: bytes
    nccl_id: bytes | None
    factory: str
    log_level: int


def digest_of(spec: ModelSpec) -> str:
    """The same for the same model, in every process."""
    return sha256(repr(spec).encode()).hexdigest()


class Inbox:
    """Orders as they come in, read by a thread. When rank 0 is gone, the rank's sums are aborted: nobody will join them."""

    def __init__(self, connection: Connection, abort: Callable[[str], None], gone: Callable[[], None]) -> None:
        self.connection, self.abort, self.gone = connection, abort, gone
        self.orders: SimpleQueue[Order | None] = SimpleQueue()
        self.over = False                # rank 0 is gone: nobody hears us
        Thread(target=self.read, name="rillet-orders", daemon=True).start()

    def read(self) -> None:
        try:
            while True:
                order = decode_order(self.connection.receive())
                self.orders.put(order)
                if isinstance(order, Close):
                    return
        except WireError as error:
            self.over = True
            self.gone()
            self.abort(f"rank 0 is gone: {error}")
            self.orders.put(None)


def serve(connection: Connection, seat: Seat, gone: Callable[[], None] = lambda: None) -> None:
    """Do what rank 0 says until it says Close or is gone. What goes wrong is told to it, and raised.

    gone: called, from another thread, when the connection ends without a Close.
    """
    inbox = Inbox(connection, seat.collective.abort, gone)
    tickets: deque[Ticket] = deque()     # that nobody waited for
    try:
        connection.send(encode(Ready(seat.backend.info.device)))
        while (order := _next_order(inbox, tickets, seat.backend)) is not None:
            match order:
                case Close():
                    return
                case Step():
                    tickets.append(seat.backend.submit(unpack_step(order)))
                case _:
                    connection.send(encode(_prepare(order, seat)))
    except BaseException as error:
        if not inbox.over and _tell(connection, error):
            raise
        log.info("rank 0 is gone, and so this ends: %s", error)
    finally:
        seat.backend.close()


def _next_order(inbox: Inbox, tickets: deque[Ticket], backend: Backend) -> Order | None:
    """The next order. Meanwhile steps are waited for: an error of the device must not stay unseen until one comes."""
    while True:
        if len(tickets) == 2:            # rank 0 sends no third before the first is done
            backend.wait(tickets.popleft())
        try:
            return inbox.orders.get(timeout=SOON_S if tickets else None)
        except Empty:
            backend.wait(tickets.popleft())


def _prepare(order: Load | Allocate, seat: Seat) -> Message:
    backend = seat.backend
    if isinstance(order, Allocate):
        return Pages(backend.allocate_cache(order.budget_bytes), backend.memory())
    seat.collective.open()
    _load(backend, order.options, order.digest)
    return Loaded(backend.memory())


def _load(backend: Backend, options: LoadOptions, digest: str) -> None:
    assert options.checkpoint is not None
    with closing(open_checkpoint(Path(options.checkpoint))) as checkpoint:
        spec = checkpoint.spec.at_context(options.context_length)
        if digest_of(spec) != digest:
            raise BadModelFile("it changed while it was loaded: start again", file=options.checkpoint)
        backend.load(spec, checkpoint.tensors, options, lambda what, done, total: None)


def _tell(connection: Connection, error: BaseException) -> bool:
    """Whether rank 0 could be told of it."""
    try:
        connection.send(encode(Failed(type(error).__name__, str(error))))
    except WireError:
        return False
    return True


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # Ctrl-C reaches all processes of a terminal; rank 0 ends us
    settings = msgspec.json.decode(sys.stdin.buffer.readline(SETTINGS_BYTES), type=Settings)
    logging.basicConfig(stream=sys.stderr, level=settings.log_level, format="%(levelname)s %(message)s")

    def meet(purpose: str) -> Connection:
        connection = connect(settings.port, settings.secret)
        connection.send(encode(Join(settings.rank, purpose)))
        return connection

    def give_up() -> None:
        timer = Timer(STUCK_S, os._exit, (70,))
        timer.daemon = True
        timer.start()

    with closing(meet("orders")) as orders:
        place = Place(
            settings.rank, settings.ranks, settings.device_id, settings.nccl_id, lambda: {0: meet("sums")}
        )
        try:
            seat = find_factory(settings.factory)(place)
        except BaseException as error:
            _tell(orders, error)
            raise
        serve(orders, seat, give_up)


if __name__ == "__main__":
    main()
