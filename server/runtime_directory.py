"""The private directory in which the workers of one server find their engine process; and the locks in it.

The name comes from multiprocessing's key, which hypercorn hands to each of its workers and nobody else has, or is drawn by
our own supervisor, which tells its workers: two servers on one machine never meet. Only this user can look into it. It holds
two locks, and a file with the engine's address and secret.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from engine import SECRET_BYTES, Address, ConfigError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["Lock", "RuntimeDirectory"]

log = logging.getLogger("rillet.server")
ADDRESS = "address.json"
REPLACE_TRIES = 40                                       # Windows refuses while somebody reads
REPLACE_PAUSE_S = 0.05


class Lock:
    """An exclusive lock on a file, which ends with its holder however that dies. take() never waits, and raises
    ConfigError where the file cannot be made. `prepare` is called before, to see that its directory is there."""

    def __init__(self, path: Path, prepare: Callable[[], None]) -> None:
        self.path = path
        self._prepare = prepare
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Whether it is held now; True also if it was held before."""
        if self._descriptor is not None:
            return True
        self._prepare()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            message = f"{self.path} cannot be made: {error.strerror}: make room there, or set TMPDIR to a folder of yours"
            raise ConfigError(message) from error
        try:
            if sys.platform == "win32":
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:                                  # another process has it
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let it go; harmless if it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class RuntimeDirectory:
    """Raises ConfigError if the directory cannot be made, or is not this user's alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prepare()

    def prepare(self) -> None:
        """Make it, and see that it is private."""
        _make_private(self.path.parent)
        _make_private(self.path)

    @classmethod
    def of_server(cls) -> "RuntimeDirectory":
        """The one that all workers of this process's server have in common."""
        key = bytes(multiprocessing.current_process().authkey)
        return cls(_home() / hashlib.sha256(b"rillet engine" + key).hexdigest()[:24])

    @classmethod
    def new(cls) -> "RuntimeDirectory":
        """One that no other server has."""
        return cls(_home() / secrets.token_hex(12))

    def lock(self, name: str) -> Lock:
        return Lock(self.path / f"{name}.lock", self.prepare)

    def publish(self, address: Address) -> None:
        """Where the engine process is, in one piece or not at all."""
        new = self.path / f"{ADDRESS}.{os.getpid()}"
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"port": address.port, "secret": address.secret.hex()}, file)
        for tries_left in reversed(range(REPLACE_TRIES)):
            try:
                new.replace(self.path / ADDRESS)
                return
            except PermissionError:
                if not tries_left:
                    raise
                time.sleep(REPLACE_PAUSE_S)

    def address(self) -> Address | None:
        """What was published last; whoever it was may be gone."""
        try:
            said = json.loads((self.path / ADDRESS).read_bytes())
            address = Address(int(said["port"]), bytes.fromhex(said["secret"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return address if 0 < address.port < 65536 and len(address.secret) == SECRET_BYTES else None

    def remove(self) -> None:
        """When nobody needs it any more."""
        shutil.rmtree(self.path, ignore_errors=True)


def _home() -> Path:
    """This user's part of where the system wants such directories; of the folder for temporary files if there is none."""
    wanted = os.environ.get("XDG_RUNTIME_DIR", "")
    root = Path(wanted) if wanted and os.access(wanted, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    user = ""                                            # Windows has such a folder for each user
    if sys.platform != "win32":
        user = f"-{os.getuid()}"
    return root / f"rillet{user}"


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        message = f"the directory {path} cannot be made: {error.strerror}: set TMPDIR to a folder of yours"
        raise ConfigError(message) from error
    if sys.platform != "win32":                          # there the folder for temporary files is each user's own
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigError(f"{path} is not a directory of this user alone: remove it, or set TMPDIR to a folder of yours")
