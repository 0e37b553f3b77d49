"""HuggingFaceRepository: one repository on the Hugging Face hub, through huggingface_hub and its cache.

hub.py makes one and asks for names and files. huggingface_hub does the work: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE
are its own, and its bars show only on a terminal. Every failure leaves here as a ModelNotFound with a cure.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from engine.errors import ConfigError, ModelNotFound
from engine.weights.hub_headers import guard_headers
from engine.weights.repository import safe_names

__all__ = ["HuggingFaceRepository"]

AT_ONCE = 4                                              # downloads
log = logging.getLogger("rillet")


class HuggingFaceRepository:
    """The repository `model_id` at `revision` (None: main). token None: HF_TOKEN or the stored login. Methods block.

    Offline, by the argument or by HF_HUB_OFFLINE, no method asks the network: the cache is read without huggingface_hub's
    functions, some of which ask the hub for other things. Where the hub cannot be reached, the cache stands in for it.
    """

    def __init__(
        self, model_id: str, revision: str | None = None, token: str | None = None, *, offline: bool = False
    ) -> None:
        from huggingface_hub import constants  # lazily: half a second, and only a hub's model needs it

        self.model_id = model_id
        self.revision = revision
        self.offline = offline or bool(constants.HF_HUB_OFFLINE)
        self._token = None if token is None else _checked(token)
        self._asked = False                              # names() has found the hub in reach
        self._where = model_id + (f" at revision {revision}" if revision else "")

    def names(self) -> tuple[str, ...]:
        """The repository's files; those in the cache where the hub is not asked. Raises ModelNotFound."""
        if self.offline:
            return _names_in(self._snapshot())
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

        try:
            info = HfApi(token=self._token).model_info(self.model_id, revision=self.revision, timeout=20)
        except (HFValidationError, RevisionNotFoundError) as error:
            raise self._failure(error) from error
        except Exception as error:         # of the hub's HTTP library, which differs from version to version
            if not (self._cached and self._cached.is_dir()):
                raise self._failure(error) from error
            log.warning("%s: taking it from the cache, the hub does not give it (%s)", self.model_id, type(error).__name__)
            self.offline = True
            return _names_in(self._cached)
        self._asked = True
        return tuple(file.rfilename for file in info.siblings or ())

    def fetch(self, names: Sequence[str]) -> Path:
        """Bring the files into the cache, those that are there already without a download. The snapshot's folder."""
        if not self._asked:
            self.names()                   # asks once; a download would ask an unreachable hub for half a minute
        if self.offline:
            return self._complete(self._snapshot(), names)
        try:
            folder = self._download(names[0], self.revision)
            if len(names) == 1:
                return folder
            with ThreadPoolExecutor(AT_ONCE, "rillet-download") as pool:
                try:                       # of the same commit, whatever is pushed meanwhile
                    list(pool.map(lambda name: self._download(name, folder.name), names[1:]))
                finally:
                    pool.shutdown(cancel_futures=True)
        except ModelNotFound:
            raise
        except Exception as error:         # see names()
            raise self._failure(error, names[0] if len(names) == 1 else None) from error
        return self._complete(folder, names)

    def _download(self, name: str, revision: str | None) -> Path:
        """Bring one file; the snapshot's folder. snapshot_download() is not used: it builds paths of a listing, unchecked."""
        from huggingface_hub import constants, hf_hub_download

        guard_headers()
        path = Path(hf_hub_download(self.model_id, name, revision=revision, token=self._token))
        root = Path(constants.HF_HUB_CACHE).resolve()
        places = (root / f"models--{self.model_id.replace('/', '--')}", root / "blobs")    # the second: shared ones
        if not any(path.resolve().is_relative_to(place.resolve()) for place in places):
            raise ModelNotFound(f"{self.model_id}/{name}: {path} leads out of the cache: delete that link and pull again")
        return path.parents[len(PurePosixPath(name).parts) - 1]

    def _complete(self, folder: Path, names: Sequence[str]) -> Path:
        """The folder, if it has all these files."""
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise ModelNotFound(
                f"{self._where}: {len(absent)} of {len(names)} files are not in the cache ({absent[0]}): bring them with "
                "`rillet pull`, with the hub in reach"
            )
        return folder

    @property
    def _cached(self) -> Path | None:
        """Where the cache has this revision, by huggingface_hub's documented layout; it need not be there."""
        from huggingface_hub import constants

        folder = Path(constants.HF_HUB_CACHE) / f"models--{self.model_id.replace('/', '--')}"
        revision = self.revision or "main"
        if not safe_names([revision]):
            return None
        try:
            commit = (folder / "refs" / revision).read_text("ascii").strip()
        except (OSError, ValueError):
            commit = revision                            # a commit itself
        return folder / "snapshots" / commit if safe_names([commit]) and "/" not in commit else None

    def _snapshot(self) -> Path:
        if (folder := self._cached) is None or not folder.is_dir():
            from huggingface_hub import constants

            how = "bring it with `rillet pull`" + (", without HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "")
            raise ModelNotFound(f"{self._where}: it is not in the cache, and no hub is asked: {how}")
        return folder

    def _failure(self, error: Exception, file: str | None = None) -> ModelNotFound:
        where = self._where if file is None else f"{self.model_id}/{file}" + self._where.removeprefix(self.model_id)
        return ModelNotFound(f"{where}: {self._cure(error)}")

    def _cure(self, error: Exception) -> str:
        from huggingface_hub import errors

        match error:
            case errors.GatedRepoError():                # a kind of RepositoryNotFoundError, so it comes first
                return "access is gated: accept its licence on huggingface.co and give a token (--hf-token or HF_TOKEN)"
            case errors.RepositoryNotFoundError():
                return "no such repository, or it is private: check the id, or give a token (--hf-token or HF_TOKEN)"
            case errors.RevisionNotFoundError():
                return "no such revision: check --revision"
            case errors.LocalEntryNotFoundError():
                return (
                    "the hub cannot be reached and it is not in the cache: check the network, or name a model on this disk "
                    "with --f or --w"
                )
            case errors.EntryNotFoundError():
                return "the repository has no such file: look at its list of files on huggingface.co"
            case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
                return "the hub refuses the token, or it may not read this: check it (--hf-token or HF_TOKEN)"
            case errors.HfHubHTTPError():
                return f"the hub answered with an error ({_first_line(error)}): try again later"
            case errors.HFValidationError():
                return "this is no hub id: write it as owner/name, owner/name:Q4_K_M, or as a path that exists"
            case ConnectionError():
                return f"the hub cannot be reached ({_first_line(error)}) and it is not in the cache: check the network"
            case _:                                      # the disk's errors, and those of the hub's HTTP library
                return f"the download failed ({_first_line(error)}): check network and disk and try again"


def _names_in(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()))


def _checked(token: str) -> str:
    """The token; ConfigError for one that no header can carry, whose text no message may show."""
    token = token.strip()
    if not token or not all("!" <= character <= "~" for character in token):
        raise ConfigError("the Hugging Face token has spaces or characters that no token has: give it as the hub shows it")
    return token


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
