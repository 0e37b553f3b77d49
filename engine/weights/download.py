"""get_json() and download(): HTTP for hubs without a client library here. Bounded, resumed, checked; standard library only.

modelscope.py calls it, on worker threads. A token goes to the host that was asked and to no other one; a file appears under
its name only when it is whole. Failures are DownloadFailed, whose `status` is the HTTP status or None.
"""

import errno
import hashlib
import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

__all__ = ["DownloadFailed", "download", "get_json", "sha256_of"]

TIMEOUT_S = 30.0                                         # of one read, not of a whole file
ATTEMPTS = 5                                             # in a row that bring nothing
CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 25
SECRETS = ("Authorization", "Cookie")
BROKEN = (OSError, http.client.HTTPException)            # what a second attempt may mend
DISK = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM)
Advance = Callable[[int], object]
log = logging.getLogger("rillet")


class DownloadFailed(Exception):
    """It did not come. status: the HTTP status, None where no server answered."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects without taking secrets to another host, and never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            raise DownloadFailed(f"the hub sends from {old.scheme} to {new.scheme}, which is not followed", code)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            for name in SECRETS:
                request.remove_header(name)
        return request


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS alone: build_opener() would also read files and FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(), _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor(), urllib.request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


def _open(url: str, headers: Mapping[str, str]) -> Any:
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            raise DownloadFailed(f"{url[:100]!r} is no http address")
        request = urllib.request.Request(url, headers={"User-Agent": "rillet", **headers})  # noqa: S310 (checked above)
        return _opener().open(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            reason = str(error.reason).partition("\n")[0]
            raise DownloadFailed(f"the hub answers {error.code} {reason}", error.code) from None
    except (ValueError, http.client.InvalidURL) as error:                    # an address that urllib cannot read
        raise DownloadFailed(f"the hub's address, or the one that it redirects to, is none ({error})") from None


def get_json(url: str, headers: Mapping[str, str]) -> Any:
    """The JSON at `url`. Raises DownloadFailed."""
    try:
        with _open(url, headers) as answer:
            data = answer.read(MAX_JSON_BYTES + 1)
    except BROKEN as error:
        raise DownloadFailed(f"the hub cannot be reached ({error})") from error
    if len(data) > MAX_JSON_BYTES:
        raise DownloadFailed(f"the hub's answer has more than {MAX_JSON_BYTES:,} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DownloadFailed(f"the hub's answer is no JSON ({error})") from None


def download(
    url: str, target: Path, size: int, sha256: str | None, headers: Mapping[str, str], advance: Advance = lambda count: None
) -> None:
    """Bring `url` to `target`, `size` bytes of this hash. Raises DownloadFailed.

    What has come lies in `<target>.<hash>.incomplete`, so that an interrupted download goes on where it was, in another
    process too; without a hash it starts anew. advance: called with the bytes that came; negative when they are of no use.
    """
    partial = target.with_name(f"{target.name}.{sha256[:16] if sha256 else 'unchecked'}.incomplete")
    partial.parent.mkdir(parents=True, exist_ok=True)
    if sha256 is None:
        partial.unlink(missing_ok=True)
    done = partial.stat().st_size if partial.exists() else 0
    advance(done)
    barren = 0
    while done < size or not partial.exists():
        before = done
        try:
            done = _receive(url, partial, done, size, headers, advance)
        except BROKEN as error:
            if isinstance(error, OSError) and error.errno in DISK:
                raise
            done = partial.stat().st_size if partial.exists() else 0
            barren = 0 if done > before else barren + 1
            if barren >= ATTEMPTS:
                raise DownloadFailed(f"the connection breaks off again and again ({error})") from error
            log.info("%s broke off at %d bytes (%s): going on", target.name, done, error)
            if barren:
                time.sleep(2.0 ** (barren - 1))
    if done != size or (sha256 is not None and sha256_of(partial) != sha256.lower()):
        partial.unlink()
        raise DownloadFailed(f"{target.name} does not have the size or the SHA-256 that the hub states: try again")
    partial.replace(target)


def _receive(url: str, partial: Path, done: int, size: int, headers: Mapping[str, str], advance: Advance) -> int:
    """Append what the server sends from byte `done` on, at most up to `size`; the size of the file then."""
    ranged = {"Range": f"bytes={done}-"} if done else {}
    with _open(url, {**headers, **ranged, "Accept-Encoding": "identity"}) as answer:
        if done and not (answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {done}-")):
            advance(-done)                               # the server sends the whole file
            done = 0
        with partial.open("ab" if done else "wb") as out:
            while part := answer.read(min(CHUNK_BYTES, size - done + 1)):
                done += len(part)
                if done > size:
                    out.truncate(0)
                    raise DownloadFailed(f"{partial.name}: the hub sends more than the {size:,} bytes that it states")
                out.write(part)
                advance(len(part))
    if done < size:
        raise ConnectionError(f"{done:,} of {size:,} bytes came")
    return done


def sha256_of(path: Path) -> str:
    """In lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
