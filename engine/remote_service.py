"""EngineService: one engine for other processes of this machine. Each connection has its own streams, which end with it.

server.engine_process runs it, engine.remote talks to it. What a step draws for all streams of a connection goes out in one
write; a stream whose reader is slow is joined in its mailbox, so nothing grows and nobody else waits.
"""

import logging
from collections.abc import Callable

import anyio
import anyio.abc
import msgspec

from engine.api import Engine
from engine.backend import Progress
from engine.errors import EngineClosed
from engine.outbox import Outbox
from engine.remote_messages import (
    Admitted,
    Call,
    Close,
    Failed,
    Loading,
    Ready,
    Refused,
    Returned,
    Stop,
    Taken,
    decode_from_client,
    encode,
    pack_error,
    unpack_params,
)
from engine.remote_serving import ServedStream
from engine.wire import WireError, new_secret
from engine.wire_async import Address, FrameListener, FrameStream

__all__ = ["EngineService"]

log = logging.getLogger("rillet")
PROGRESS_S = 0.25                                        # how often the progress of loading is passed on
LAST_WORDS_S = 1.0                                       # for which newcomers still hear why it failed
FLUSH_S = 5.0


class EngineService:
    """`make` gets a progress callback and returns an Engine that was not entered. Used once."""

    def __init__(self, make: Callable[[Progress], Engine]) -> None:
        self.engine: Engine | None = None                # None: it loads, or is no more
        self.peers: set[_Peer] = set()
        self.vacant_since: float | None = None           # when the last connection ended, or the service began
        self._make = make
        self._loading = Loading("starting", 0, 0)
        self._state: Loading | Ready | Failed = self._loading

    async def run(self, tell: Callable[[Address], None]) -> Exception:
        """Listen, tell where, load, serve until cancelled. Returns why loading or the engine failed, once clients know."""
        listener = await FrameListener.open(new_secret())
        self.vacant_since = anyio.current_time()
        async with anyio.create_task_group() as group:
            group.start_soon(listener.serve, self._attend)
            tell(listener.address)
            failure = await self._serve(group)
            group.cancel_scope.cancel()
        return failure

    async def _serve(self, group: anyio.abc.TaskGroup) -> Exception:
        group.start_soon(self._pass_progress_on)
        try:
            async with self._make(self._report) as engine:
                self._say(ready(engine))
                self.engine = engine
                failure = await engine.wait_failed()
                self._say(Failed(pack_error(failure)))
                await self._last_words()
        except Exception as error:
            failure = error
            self._say(Failed(pack_error(error)))
            await self._last_words()
        finally:
            self.engine = None
        return failure

    async def drain(self, deadline_s: float) -> None:
        """Refuse what is new; what runs may end within deadline_s, then it is aborted. Returns when clients have it all."""
        if self.engine is not None:
            await self.engine.drain(deadline_s)
            await self._flush()

    async def _last_words(self) -> None:
        await self._flush()
        await anyio.sleep(LAST_WORDS_S)
        await self._flush()

    async def _flush(self) -> None:
        with anyio.move_on_after(FLUSH_S):
            for peer in list(self.peers):
                await peer.wait_sent()

    def _report(self, what: str, done: int, total: int) -> None:
        """On the device thread."""
        self._loading = Loading(what, done, total)

    async def _pass_progress_on(self) -> None:
        while isinstance(self._state, Loading):
            if self._state is not self._loading:
                self._say(self._loading)
            await anyio.sleep(PROGRESS_S)

    def _say(self, state: Loading | Ready | Failed) -> None:
        """To all who are here, and to those who come."""
        self._state = state
        message = encode(state)
        for peer in self.peers:
            peer.outbox.put(message)

    async def _attend(self, frames: FrameStream) -> None:
        peer = _Peer(self, frames)
        self.peers.add(peer)
        peer.outbox.put(encode(self._state))
        self.vacant_since = None
        try:
            await peer.run()
        finally:
            self.peers.discard(peer)
            if not self.peers:
                self.vacant_since = anyio.current_time()


def ready(engine: Engine) -> Ready:
    tokenizer, dialect = engine.tokenizer, engine.dialect
    return Ready(
        model_name=engine.model_name, model_names=engine.model_names, context_length=engine.context_length,
        max_num_seqs=engine.max_num_seqs, device=engine.device, has_chat_template=engine.has_chat_template,
        model_facts=engine.model_facts, sampling_defaults=engine.sampling_defaults,
        dialect=(engine.chat_template, dialect.tools, dialect.reasoning),
        pieces=tokenizer.pieces, special_ids=tokenizer.special_ids, bos_id=tokenizer.bos_id,
        drops_first_space=tokenizer.drops_first_space,
    )  # fmt: skip


class _Peer:
    """One connection."""

    def __init__(self, service: EngineService, frames: FrameStream) -> None:
        self._service = service
        self._frames = frames
        self.outbox = Outbox(self._news)
        self._calls: dict[int, anyio.CancelScope] = {}
        self._served: dict[int, ServedStream] = {}
        self._left = anyio.Event()                       # set when a stream has ended
        self._rung: dict[int, ServedStream] = {}              # those that may have news, oldest first

    async def run(self) -> None:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._write, group.cancel_scope)
                await self._read(group)
                group.cancel_scope.cancel()
        finally:
            for served in self._served.values():
                served.stream.cancel()

    async def wait_sent(self) -> None:
        """Until every stream has ended and the client has it all."""
        while self._served:
            self._left = anyio.Event()
            await self._left.wait()
        await self.outbox.wait_sent()

    async def _write(self, scope: anyio.CancelScope) -> None:
        try:
            await self.outbox.run(self._frames)
        except WireError as error:
            log.debug("a client can be sent nothing any more: %s", error)
            scope.cancel()

    async def _read(self, group: anyio.abc.TaskGroup) -> None:
        try:
            while True:
                for message in decode_from_client(await self._frames.receive()):
                    match message:
                        case Call():
                            self._calls[message.number] = scope = anyio.CancelScope()
                            group.start_soon(self._answer, message, scope)
                        case Taken(number, items):
                            if (served := self._served.get(number)) is not None:
                                served.taken(items)
                        case Stop(number):
                            if (served := self._served.get(number)) is not None:
                                served.stream.cancel()
                        case Close(number):
                            await self._close(number)
        except WireError as error:
            log.debug("a client has left: %s", error)
        except msgspec.MsgspecError as error:
            log.warning("a client says what cannot be understood, its connection ends: %s", error)

    async def _close(self, number: int) -> None:
        if (scope := self._calls.get(number)) is not None:
            scope.cancel()
        if (served := self._served.pop(number, None)) is not None:
            self._rung.pop(number, None)
            self._left.set()
            await served.stream.aclose()

    async def _answer(self, call: Call, scope: anyio.CancelScope) -> None:
        with scope:
            try:
                engine = self._service.engine
                if engine is None:
                    raise EngineClosed("the engine is not ready: ask again soon")
                if call.method == "stream":
                    await self._admit(engine, call, scope)
                else:
                    value = await getattr(engine, call.method)(**call.arguments)
                    self.outbox.put(encode(Returned(call.number, msgspec.Raw(encode(value)))))
            except Exception as error:
                refused = pack_error(error)
                if not refused.kind:
                    log.error("a call of %s failed by a fault of the engine", call.method, exc_info=error)
                self.outbox.put(encode(Refused(call.number, refused)))
            finally:
                del self._calls[call.number]

    async def _admit(self, engine: Engine, call: Call, scope: anyio.CancelScope) -> None:
        wishes = unpack_params(call.arguments.pop("params"))
        stream = await engine.stream(call.arguments.pop("prompt"), wishes, **call.arguments)
        if scope.cancel_called:                          # it came with the last turn
            await stream.aclose()
            return
        self.outbox.put(encode(Admitted(call.number, stream.prompt_token_ids)))
        self._served[call.number] = served = ServedStream(call.number, stream, self.ring)
        served.set()

    def ring(self, served: ServedStream) -> None:
        if served.number in self._served:                # a stream that is closed rings a last time
            self._rung[served.number] = served
            self.outbox.ring()

    def _news(self) -> bytes | None:
        """One item of the stream that has waited longest."""
        while self._rung:
            number, served = next(iter(self._rung.items()))
            del self._rung[number]
            item = served.next_item()
            if item is None:
                continue
            if item.ended:
                del self._served[number]
                self._left.set()
            else:
                self._rung[number] = served              # there may be more
            return encode(item)
        return None
