"""ModelScopeRepository: one repository on ModelScope, by its HTTP API, in a cache that its own client shares.

hub.py makes one. The cache is modelscope's, ~/.cache/modelscope/hub/models/owner/name or under MODELSCOPE_CACHE: one revision
at a time, dots of the name written as ___. MODELSCOPE_ENDPOINT or MODELSCOPE_DOMAIN name another site, MODELSCOPE_API_TOKEN
a token. Every failure leaves here as a ModelNotFound with a cure. Its index of a cache, a pickle, is never read.
"""

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from engine.errors import ConfigError, ModelNotFound
from engine.weights.download import Advance, DownloadFailed, download, get_json, sha256_of
from engine.weights.repository import safe_names

__all__ = ["NOTE", "ModelScopeRepository", "cache_folder", "models_folder"]

SITE = "https://www.modelscope.cn"
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
MAX_FILE_BYTES = 1 << 50
NOTE = ".rillet.json"                                    # in a model's folder: the revision, and the hashes that were seen
log = logging.getLogger("rillet")


def models_folder() -> Path:
    """Where ModelScope's client keeps models."""
    given = os.environ.get("MODELSCOPE_CACHE")
    return (Path(given).expanduser() if given else Path.home() / ".cache" / "modelscope" / "hub") / "models"


def cache_folder(model_id: str) -> Path:
    """Where this model is, or would be."""
    owner, _, name = model_id.partition("/")
    return models_folder() / owner / name.replace(".", "___")


@dataclass(frozen=True, slots=True)
class _Entry:
    size: int
    sha256: str | None


class ModelScopeRepository:
    """The repository `model_id` at `revision` (None: master). Methods block; offline none asks the network."""

    def __init__(self, model_id: str, revision: str | None = None, *, offline: bool = False) -> None:
        if not MODEL_ID.fullmatch(model_id) or ".." in model_id:
            raise ModelNotFound(f"{model_id[:200]!r} is no id of ModelScope: write it as owner/name")
        self.model_id = model_id
        self.revision = revision or "master"
        self.offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        self._folder = cache_folder(model_id)
        self._where = model_id + (f" at revision {revision}" if revision else "") + " on ModelScope"
        self._listed: dict[str, _Entry] | None = None

    def names(self) -> tuple[str, ...]:
        """The repository's files; those in the cache where the hub is not asked. Raises ModelNotFound."""
        listed = self._list()
        if listed is not None:
            return tuple(listed)
        if not (cached := self._cached_names()):
            raise ModelNotFound(f"{self._where}: it is not in the cache, and no hub is asked: bring it with `rillet pull`")
        return cached

    def fetch(self, names: Sequence[str]) -> Path:
        """Bring the files into the cache, those that are there already without a download. The model's folder."""
        listed = self._list()
        known = self._cached_names() if listed is None else listed
        if absent := [name for name in names if name not in known]:
            place = "the cache, and no hub is asked" if listed is None else "the repository: look at its list of files"
            raise ModelNotFound(f"{self._where}: {absent[0]} is not in {place}")
        if listed is None:
            return self._folder
        try:
            with _locked(models_folder() / ".lock" / f"rillet_{self.model_id.replace('/', '--')}.lock"):
                self._bring({name: listed[name] for name in names})
        except DownloadFailed as error:
            raise self._failure(error) from error
        except OSError as error:
            raise ModelNotFound(f"{self._where}: {self._folder} cannot be written ({error}): free some room there") from error
        return self._folder

    def _bring(self, entries: Mapping[str, _Entry]) -> None:
        note = self._note()
        # of another revision nothing is known: a file of the same size may be another one
        seen: dict[str, str] = note["sha256"] if note.get("revision") == self.revision else {}
        wanted = {name: entry for name, entry in entries.items() if not self._is_here(name, entry, seen.get(name))}
        total = sum(entry.size for entry in wanted.values())
        self._folder.mkdir(parents=True, exist_ok=True)
        if total > (free := shutil.disk_usage(self._folder).free):
            raise ModelNotFound(f"{self._where}: it needs {total:,} bytes, {self._folder} has {free:,} left: free some room")
        if wanted and note:                              # an interruption leaves no note of what is replaced now
            self._write_note(note | {"sha256": {name: sha for name, sha in note["sha256"].items() if name not in wanted}})
        with _bar(self.model_id, total) as advance:
            for name, entry in wanted.items():
                url = f"{self._api()}/repo?Revision={quote(self.revision, safe='')}&FilePath={quote(name, safe='')}"
                download(url, self._folder / name, entry.size, entry.sha256, _headers(), advance)
        brought = {name: entry.sha256 or "" for name, entry in entries.items()}
        self._write_note({"revision": self.revision, "sha256": seen | brought})

    def _is_here(self, name: str, entry: _Entry, seen: str | None) -> bool:
        """Whether the file is there in the hub's version: by its size and the hash noted of this revision, `seen`.

        What ModelScope's own client brought, or another revision, has none noted: it is computed, once. Where the hub
        states none either, only a file that was brought of this revision counts as there.
        """
        file = self._folder / name
        if not file.is_file() or file.stat().st_size != entry.size:
            return False
        if seen is None:
            return entry.sha256 is not None and sha256_of(file) == entry.sha256
        return seen == (entry.sha256 or "")

    def _list(self) -> dict[str, _Entry] | None:
        """The hub's list of files, asked for once; None offline, and where the hub does not answer but the cache can."""
        if self._listed is None and not self.offline:
            url = f"{self._api()}/repo/files?Revision={quote(self.revision, safe='')}&Recursive=True"
            try:
                self._listed = _read_listing(get_json(url, _headers()))
            except DownloadFailed as error:
                refused = error.status is not None and error.status < 500
                if refused or not self._cached_names():
                    raise self._failure(error) from error
                log.warning("%s: taking it from the cache, ModelScope does not answer (%s)", self.model_id, error)
                self.offline = True
        return self._listed

    def _api(self) -> str:
        return f"{_endpoint()}/api/v1/models/{self.model_id}"

    def _cached_names(self) -> tuple[str, ...]:
        note = self._note()
        if note.get("revision", "master") != self.revision:
            return ()
        if note:                                         # files of an earlier revision may lie there too
            return tuple(name for name in safe_names(note["sha256"]) if (self._folder / name).is_file())
        names = (file.relative_to(self._folder).as_posix() for file in self._folder.rglob("*") if file.is_file())
        return tuple(sorted(name for name in names if not name.startswith(".")))

    def _note(self) -> dict[str, Any]:
        try:
            note = json.loads((self._folder / NOTE).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        is_ours = isinstance(note, dict) and isinstance(note.get("revision"), str) and isinstance(note.get("sha256"), dict)
        return note if is_ours else {}

    def _write_note(self, note: Mapping[str, object]) -> None:
        fresh = self._folder / f"{NOTE}.new"
        fresh.write_text(json.dumps(note), "utf-8")
        fresh.replace(self._folder / NOTE)

    def _failure(self, error: DownloadFailed) -> ModelNotFound:
        match error.status:
            case 401 | 403:
                cure = "access needs a token, or another one: set MODELSCOPE_API_TOKEN"
            case 404:
                cure = "no such repository, revision or file, or it is private: check id and --revision, or give a token"
            case None:
                cure = f"{error}: check the network and try again"
            case _:
                cure = f"{error}: try again later"
        return ModelNotFound(f"{self._where}: {cure}")


def _read_listing(answer: object) -> dict[str, _Entry]:
    """The files of the API's answer. Its fields: Code, Data.Files[] of Path, Type (blob or tree), Size, Sha256."""
    match answer:
        case {"Code": 200, "Data": {"Files": list(files)}}:
            pass
        case _:
            raise DownloadFailed("the hub's list of files is not what it should be")
    entries = {}
    for file in files:
        match file:
            case {"Path": str(path), "Type": "blob", "Size": int(size)} if 0 <= size <= MAX_FILE_BYTES and _is_listed(path):
                sha256 = file.get("Sha256")
                entries[path] = _Entry(size, sha256.lower() if isinstance(sha256, str) and SHA256.fullmatch(sha256) else None)
    return entries


def _is_listed(path: str) -> bool:
    """Not what leaves the folder, and no hidden file: NOTE is one, and no model needs any."""
    return bool(safe_names([path])) and not any(part.startswith(".") for part in path.split("/"))


def _endpoint() -> str:
    given = (os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or SITE).strip().rstrip("/")
    return given if given.startswith(("http://", "https://")) else f"https://{given}"


def _headers() -> dict[str, str]:
    """A token goes both ways, as ModelScope's client sends it: older servers read the cookie."""
    token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
    if not token:
        return {}
    if not re.fullmatch(r"[!#-+\--:<-\[\]-~]+", token):                      # what a cookie may hold
        raise ConfigError("MODELSCOPE_API_TOKEN has characters that no token has: give it as ModelScope shows it")
    return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time brings a model's files."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # lazily: half a second

    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path):
        yield


@contextmanager
def _bar(name: str, total: int) -> Iterator[Advance]:
    """A bar on a terminal's stderr; nothing elsewhere."""
    if not sys.stderr.isatty() or total == 0:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)
