"""python -m backends.mlx.rank: one of several ranks that share a model, in a process of its own. team.py starts it.

What it needs to know comes through stdin, the secret included, and orders over a loopback connection: load, allocate, step,
wait, close. It opens the checkpoint by itself. Rank 0 draws and says what; the others compute their part of every sum. It
ends when it is told to, or when whoever started it is gone. Everything of MLX happens in its main thread.
"""

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, Timer
from typing import Protocol, cast

import msgspec

from backends.mlx.messages import (
    Allocate,
    Close,
    Failed,
    Join,
    Load,
    Loaded,
    Loading,
    Message,
    Order,
    Pages,
    Ready,
    Step,
    Wait,
    decode_order,
    encode,
    pack_output,
    unpack_step,
)
from backends.mlx.runner import MlxBackend
from backends.mlx.sharding import ShardedSource
from engine.backend import Ticket
from engine.errors import BadModelFile
from engine.model.spec import ModelSpec
from engine.weights.checkpoint import open_checkpoint
from engine.weights.tensors import TensorSource
from engine.wire import Connection, WireError, connect

__all__ = ["OPENER", "Settings", "digest_of"]

log = logging.getLogger("rillet")
SETTINGS_BYTES = 1 << 16
MEETING_S = 90               # so long the ranks have to meet; MLX itself would wait for ever
STUCK_S = 10.0                   # so long the process has to end by itself when nobody hears it
OPENER = "backends.mlx.rank:open_model"
FLOAT32 = frozenset({"f32", "float32"})


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of JSON on stdin. The ring's own settings are in the environment."""

    rank: int
    ranks: int
    port: int
    secret: bytes
    max_batch_tokens: int
    opener: str                      # "module:function": what opens a checkpoint, so that tests can have models without files
    log_level: int


class OpenModel(Protocol):
    """A checkpoint, as far as a rank needs it."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def tensors(self) -> TensorSource: ...
    def close(self) -> None: ...


def open_model(path: str) -> OpenModel:
    return open_checkpoint(Path(path))


def digest_of(spec: ModelSpec) -> str:
    """The same for the same model, in every process."""
    return sha256(repr(spec).encode()).hexdigest()


class Inbox:
    """Orders as they come in, read by a thread, so that a rank that is busy notices when nobody is there any more."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.orders: SimpleQueue[Order] = SimpleQueue()
        Thread(target=self.read, name="rillet-orders", daemon=True).start()

    def read(self) -> None:
        order: Order | None = None
        try:
            while not isinstance(order, Close):
                order = decode_order(self.connection.receive())
                self.orders.put(order)
        except WireError as error:
            log.info("nobody gives orders any more, and so this ends: %s", error)
            self.orders.put(Close())
        end_soon()                       # from here on a sum that others do not join must not keep us


def end_soon() -> None:
    timer = Timer(STUCK_S, os._exit, (70,))
    timer.daemon = True
    timer.start()


class Rank:
    """Does what it is told, one order after another."""

    def __init__(self, settings: Settings, connection: Connection) -> None:
        """Meets the others. Raises DeviceUnavailable."""
        from backends.mlx.collective import meet

        module, _, function = settings.opener.partition(":")
        self.open_model = cast(Callable[[str], OpenModel], getattr(import_module(module), function))
        self.settings, self.connection = settings, connection
        if sys.platform != "win32":
            signal.alarm(MEETING_S)      # which ends a process even while MLX holds all its threads
        self.collective = meet(settings.rank, settings.ranks)
        if sys.platform != "win32":
            signal.alarm(0)
        self.backend: MlxBackend | None = None
        self.tickets: deque[Ticket] = deque()

    def serve(self) -> None:
        """Until Close."""
        inbox = Inbox(self.connection)
        self.say(Ready())
        while not isinstance(order := inbox.orders.get(), Close):
            answer = self.obey(order)
            if answer is not None:
                self.say(answer)
        self.close()

    def obey(self, order: Order) -> Message | None:
        if isinstance(order, Load):
            return self.load(order)
        backend = self.backend
        assert backend is not None, "Load comes first"
        match order:
            case Allocate(budget_bytes):
                return Pages(backend.allocate_cache(budget_bytes), backend.memory())
            case Step():
                self.tickets.append(backend.submit(unpack_step(order)))
            case Wait():
                output = backend.wait(self.tickets.popleft())
                return pack_output(output) if self.settings.rank == 0 else None
        return None

    def load(self, order: Load) -> Message:
        import mlx.core as mx

        self.close()
        options, path, rank = order.options, order.options.checkpoint, self.settings.rank
        assert path is not None
        self.backend = MlxBackend(collective=self.collective, max_batch_tokens=self.settings.max_batch_tokens)
        activations_have_32_bits = options.dtype in FLOAT32 or (options.dtype == "auto" and not mx.metal.is_available())
        floats = "F32" if activations_have_32_bits else "BF16"
        with closing(self.open_model(path)) as model:
            spec = model.spec.at_context(options.context_length)
            if digest_of(spec) != order.digest:
                raise BadModelFile("it changed while it was loaded: start again", file=path)
            source = ShardedSource(model.tensors, spec, rank, self.settings.ranks, floats=floats)
            self.backend.load(source.spec, source, replace(options, device_ids=(0,)), self.progress)
        assert self.backend.session is not None
        return Loaded(self.backend.memory(), str(self.backend.session.weights.dtype))

    def progress(self, what: str, done: int, total: int) -> None:
        if self.settings.rank == 0:
            self.say(Loading(what, done, total))

    def say(self, message: Message) -> None:
        self.connection.send(encode(message))

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()
            self.backend = None
        self.tickets.clear()


def run(settings: Settings, connection: Connection) -> None:
    """Serve; what goes wrong is told before it is raised."""
    try:
        Rank(settings, connection).serve()
    except BaseException as error:
        end_soon()
        try:
            connection.send(encode(Failed(type(error).__name__, str(error))))
        except WireError:
            log.info("nobody hears of it: %s", error)
            return
        raise


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # Ctrl-C reaches all processes of a terminal; we are told to end
    settings = msgspec.json.decode(sys.stdin.buffer.readline(SETTINGS_BYTES), type=Settings)
    logging.basicConfig(stream=sys.stderr, level=settings.log_level, format="%(levelname)s %(message)s")
    with closing(connect(settings.port, settings.secret)) as connection:
        connection.send(encode(Join(settings.rank)))
        run(settings, connection)


if __name__ == "__main__":
    main()
