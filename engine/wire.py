"""Frames between processes of one machine: TCP on the loopback address, a secret first, then length and bytes, for threads.

The ranks of a tensor-parallel backend talk over it. It knows neither messages nor devices: what a frame means is its users'
matter, and they decode it with msgspec, never with pickle. Whoever connects is hostile until the secret has been compared.
"""

import hmac
import logging
import secrets
import selectors
import socket
import struct
import threading
from collections import deque
from queue import Empty, SimpleQueue
from time import monotonic

__all__ = ["MOST_BYTES", "SECRET_BYTES", "Connection", "Listener", "WireError", "connect", "new_secret"]

log = logging.getLogger("rillet")

HOST = "127.0.0.1"
MAGIC = b"rillet1\n"
SECRET_BYTES = 64                # the first half is shown by whoever connects, the second by whoever listens
HALF = SECRET_BYTES // 2
MOST_BYTES = 64 << 20            # of a frame, where its user knows no better
MOST_GREETINGS = 32              # that are going on at a time
GREETING_S = 5.0
LOOK_UP_S = 0.25                 # how soon a thread sees that its connection was closed by another
JOINED_BYTES = 1 << 16           # smaller frames go out in one piece
LENGTH = struct.Struct("<I")


class WireError(ConnectionError):
    """The other side is gone, late, or says what it must not; the connection is of no more use."""


def new_secret() -> bytes:
    """What the two sides of a connection know and nobody else does. It goes through a pipe, never on a command line."""
    return secrets.token_bytes(SECRET_BYTES)


class Connection:
    """Frames in both directions. One thread may send while another receives; close() may come from any."""

    def __init__(self, sock: socket.socket, *, most_bytes: int = MOST_BYTES) -> None:
        """Takes over the socket. A frame of more than most_bytes ends the connection, on either side."""
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.most_bytes = most_bytes
        self._socket = sock
        self._sending = threading.Lock()
        self._closed = False
        self._readable, self._writable = selectors.DefaultSelector(), selectors.DefaultSelector()
        self._readable.register(sock, selectors.EVENT_READ)
        self._writable.register(sock, selectors.EVENT_WRITE)

    def send(self, *parts: bytes | bytearray | memoryview, timeout_s: float = 30.0) -> None:
        """One frame of these bytes. WireError if the other side does not take it in time."""
        views = [memoryview(part).cast("B") for part in parts]
        size = sum(view.nbytes for view in views)
        if not 0 < size <= self.most_bytes:
            raise WireError(f"a frame of {size:,} bytes is not sent: 1 to {self.most_bytes:,} may be")
        deadline = monotonic() + timeout_s
        with self._sending:
            if size <= JOINED_BYTES:
                self._write(memoryview(b"".join((LENGTH.pack(size), *views))), deadline)
            else:
                for view in (memoryview(LENGTH.pack(size)), *views):
                    self._write(view, deadline)

    def receive(self, *, wait_s: float | None = None, rest_s: float = 30.0) -> bytearray:
        """The next frame: wait so long for its first byte (None: until the connection ends), and rest_s for all of it."""
        head = bytearray(LENGTH.size)
        began = self._read(memoryview(head)[:1], None if wait_s is None else monotonic() + wait_s)
        deadline = began + rest_s
        self._read(memoryview(head)[1:], deadline)
        (size,) = LENGTH.unpack(head)
        if not 0 < size <= self.most_bytes:
            self.close()
            raise WireError(f"a frame of {size:,} bytes comes in: 1 to {self.most_bytes:,} may be")
        frame = bytearray(size)
        self._read(memoryview(frame), deadline)
        return frame

    def close(self) -> None:
        """End it, also for the other side and for threads that wait here; idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:                                  # the other side was first
            log.debug("a connection was already gone")
        self._readable.close()
        self._writable.close()
        self._socket.close()

    def _read(self, into: memoryview, deadline: float | None) -> float:
        """Fill `into`; the time at which its last byte came."""
        while into.nbytes:
            try:
                count = self._socket.recv_into(into)
            except BlockingIOError:
                self._wait(self._readable, deadline, "is silent")
                continue
            except OSError as error:
                raise self._gone(error) from error
            if count == 0:
                raise self._gone(None)
            into = into[count:]
        return monotonic()

    def _write(self, view: memoryview, deadline: float) -> None:
        while view.nbytes:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                self._wait(self._writable, deadline, "takes nothing")
            except OSError as error:
                raise self._gone(error) from error

    def _wait(self, selector: selectors.BaseSelector, deadline: float | None, what: str) -> None:
        while not self._closed:
            left = LOOK_UP_S if deadline is None else deadline - monotonic()
            if left <= 0:
                self.close()                             # half a frame is lost: there is no way on
                raise WireError(f"the other side {what} for too long")
            try:
                if selector.select(min(left, LOOK_UP_S)):
                    return
            except (OSError, ValueError) as error:       # closed by another thread meanwhile
                raise self._gone(error) from error
        raise self._gone(None)

    def _gone(self, error: Exception | None) -> WireError:
        whose = "this side closed it" if self._closed else "the other side closed it" if error is None else str(error)
        return WireError(f"the connection is gone: {whose}")


class Listener:
    """Connections whose other side knows the secret. Strangers are turned away and hold nobody up."""

    def __init__(self, secret: bytes, *, most_bytes: int = MOST_BYTES) -> None:
        assert len(secret) == SECRET_BYTES
        self._secret = secret
        self._most_bytes = most_bytes
        self._greetings: deque[Connection] = deque()     # oldest first
        self._lock = threading.Lock()                    # of _greetings, and of what is accepted while this closes
        self._accepted: SimpleQueue[Connection] = SimpleQueue()
        self._closed = threading.Event()
        self._socket = socket.create_server((HOST, 0), backlog=MOST_GREETINGS)
        self._socket.settimeout(LOOK_UP_S)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, name="rillet-listener", daemon=True)
        self._thread.start()

    def accept(self, timeout_s: float) -> Connection:
        """The next connection; WireError if none comes in time."""
        try:
            return self._accepted.get(timeout=timeout_s)
        except Empty:
            raise WireError(f"nobody connected within {timeout_s:g} s") from None

    def close(self) -> None:
        """Take no more connections, and end those that nobody accepted; idempotent."""
        with self._lock:                                 # whoever is greeted from here on is closed by its greeting
            self._closed.set()
        self._thread.join()
        while not self._accepted.empty():
            self._accepted.get().close()

    def _listen(self) -> None:
        with self._socket:
            while not self._closed.is_set():
                try:
                    sock, _ = self._socket.accept()
                except TimeoutError:
                    continue
                except OSError as error:                 # a connection that was reset before it was taken, say
                    log.warning("a connection could not be taken: %s", error)
                    self._closed.wait(LOOK_UP_S)
                    continue
                connection = Connection(sock, most_bytes=self._most_bytes)
                with self._lock:
                    self._greetings.append(connection)
                    surplus = self._greetings.popleft() if len(self._greetings) > MOST_GREETINGS else None
                if surplus is not None:                  # the one that has been silent longest makes room
                    surplus.close()
                threading.Thread(target=self._greet, args=(connection,), name="rillet-greeting", daemon=True).start()

    def _greet(self, connection: Connection) -> None:
        try:
            shown = bytearray(len(MAGIC) + HALF)
            connection._read(memoryview(shown), monotonic() + GREETING_S)
            if hmac.compare_digest(bytes(shown), MAGIC + self._secret[:HALF]):
                connection._write(memoryview(self._secret[HALF:]), monotonic() + GREETING_S)
                self._take(connection)
            else:
                log.warning("somebody without the secret connected to port %d and was turned away", self.port)
                connection.close()
        except WireError:
            connection.close()
        finally:
            with self._lock:
                if connection in self._greetings:
                    self._greetings.remove(connection)

    def _take(self, connection: Connection) -> None:
        """It has shown the secret: hand it to accept(), unless this is closed or the connection had to make room."""
        with self._lock:
            if connection not in self._greetings:
                return
            self._greetings.remove(connection)
            if not self._closed.is_set():
                self._accepted.put(connection)
                return
        connection.close()


def connect(port: int, secret: bytes, *, most_bytes: int = MOST_BYTES, timeout_s: float = GREETING_S) -> Connection:
    """A connection to the Listener at `port`. WireError if there is none, or one that does not know the secret."""
    assert len(secret) == SECRET_BYTES
    try:
        sock = socket.create_connection((HOST, port), timeout=timeout_s)
    except OSError as error:
        raise WireError(f"nobody listens at port {port}: {error}") from error
    connection = Connection(sock, most_bytes=most_bytes)
    try:
        deadline = monotonic() + timeout_s
        connection._write(memoryview(MAGIC + secret[:HALF]), deadline)
        shown = bytearray(HALF)
        connection._read(memoryview(shown), deadline)
        if not hmac.compare_digest(bytes(shown), secret[HALF:]):
            raise WireError(f"who listens at port {port} does not know the secret")
    except WireError:
        connection.close()
        raise
    return connection
