"""The models in the caches of both hubs, and how one of them is removed.

`rillet list` and `rillet remove` call it. It reads folders and never a model's file. What it deletes lies in one repository's
folder of a hub's cache: a link that leads out of there is a refusal, not a path to follow.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, ModelNotFound
from engine.weights.modelscope import cache_folder, models_folder
from engine.weights.repository import Variant, choose_variant, gguf_variants, safe_names

__all__ = ["CachedModel", "Removal", "cached_models", "plan_removal"]


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One model that --m understands: a quantization of a GGUF repository, or a repository's safetensors.

    used: when a file of it was last read or written, in seconds since the epoch, as far as the file system keeps it.
    """

    source: str                            # huggingface or modelscope
    name: str                              # owner/name, or owner/name:Q4_K_M
    form: str                              # what it is made of, in words
    size_bytes: int
    used: float


@dataclass(frozen=True, slots=True)
class _File:
    name: str                              # within the repository
    path: Path                             # in the cache, often a link
    blob: Path                             # the bytes
    size: int
    used: float


@dataclass(frozen=True, slots=True)
class Removal:
    """What is about to be deleted; nothing is until execute()."""

    name: str
    files: int
    size_bytes: int
    strategy: Any                          # huggingface_hub's, or the paths in ModelScope's cache

    def execute(self) -> None:
        """Delete it. Raises OSError."""
        if isinstance(self.strategy, tuple):
            for path in self.strategy:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        else:
            self.strategy.execute()


def cached_models() -> list[CachedModel]:
    """Every model in the caches, by source and name."""
    found = [model for repo in _hugging_face_repos() for model in _models("huggingface", repo.repo_id, _files_of_repo(repo))]
    for folder in _modelscope_folders():
        name = f"{folder.parent.name}/{folder.name.replace('___', '.')}"
        found += _models("modelscope", name, _files_in(folder))
    return sorted(found, key=lambda model: (model.source, model.name))


def plan_removal(model_id: str, tag: str | None, source: str) -> Removal:
    """How `model_id`, or the quantization `tag` of it, leaves the cache. Raises ModelNotFound, ConfigError."""
    return (_plan_modelscope if source == "modelscope" else _plan_hugging_face)(model_id, tag)


def _models(source: str, name: str, files: Iterable[_File]) -> list[CachedModel]:
    by_name: dict[str, list[_File]] = {}                 # a file of two revisions stands there twice
    for file in files:
        by_name.setdefault(file.name, []).append(file)
    models = []
    variants = gguf_variants(by_name)
    for variant in variants:
        form = "GGUF" + ("" if variant.label is None else f" {variant.label}")
        total = len(variant.files) + len(variant.missing)
        form += f", {len(variant.files)} of {total} parts" if variant.missing else f", {total} parts" if total > 1 else ""
        tagged = f"{name}:{variant.label}" if variant.label and len(variants) > 1 else name
        models.append(_model(source, tagged, form, (file for part in variant.files for file in by_name[part])))
    shards = [file for file in by_name if file.endswith(".safetensors")]
    if shards and "config.json" in by_name:
        others = (file for key, same in by_name.items() if not key.endswith(".gguf") for file in same)
        form = "safetensors" + (f", {len(shards)} shards" if len(shards) > 1 else "")
        models.append(_model(source, name, form, others))
    return models


def _model(source: str, name: str, form: str, files: Iterable[_File]) -> CachedModel:
    blobs = {file.blob: file for file in files}
    return CachedModel(
        source, name, form, sum(file.size for file in blobs.values()), max(file.used for file in blobs.values())
    )


# ---- Hugging Face -----------------------------------------------------------------------------------------------------


def _scan() -> Any:
    """huggingface_hub's view of its cache, or None without one."""
    from huggingface_hub import scan_cache_dir  # lazily: half a second
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir()
    except (CacheNotFound, ValueError):
        return None


def _hugging_face_repos() -> list[Any]:
    cache = _scan()
    return [] if cache is None else [repo for repo in cache.repos if repo.repo_type == "model"]


def _files_of_repo(repo: Any) -> list[_File]:
    return [_file_of(revision, file) for revision in repo.revisions for file in revision.files]


def _file_of(revision: Any, file: Any) -> _File:
    name = file.file_path.relative_to(revision.snapshot_path).as_posix()
    used = max(file.blob_last_accessed, file.blob_last_modified)
    return _File(name, file.file_path, file.blob_path, file.size_on_disk, used)


def _plan_hugging_face(model_id: str, tag: str | None) -> Removal:
    cache = _scan()
    repos = [] if cache is None else [repo for repo in cache.repos if (repo.repo_type, repo.repo_id) == ("model", model_id)]
    if not repos or not (files := _files_of_repo(repos[0])):
        raise ModelNotFound(f"{model_id[:200]}: it is not in Hugging Face's cache: `rillet list` tells what is")
    repo = repos[0]
    if tag is None:
        alone = replace(cache, repos=frozenset({repo}))  # two repositories may have a commit of the same hash
        strategy = alone.delete_revisions(*(revision.commit_hash for revision in repo.revisions))
        chosen = files
    else:
        names = set(_variant(files, tag, model_id).files)
        pairs = [(_file_of(revision, file), file) for revision in repo.revisions for file in revision.files]
        delete_files = getattr(cache, "delete_files", None)
        if delete_files is None:
            raise ConfigError(f"{tag} alone cannot be removed: pip install -U huggingface_hub, or remove all of {model_id}")
        chosen = [ours for ours, _ in pairs if ours.name in names]
        strategy = delete_files(*(theirs for ours, theirs in pairs if ours.name in names))
    root = cache.cache_dir.resolve() / repo.repo_path.name
    deleted = [*strategy.blobs, *strategy.snapshots, *strategy.refs, *(file.path for file in chosen)]
    astray = [path for path in deleted if not path.parent.resolve().is_relative_to(root)]
    astray += [path for path in strategy.repos if path.resolve() != root]
    if astray:
        raise ModelNotFound(f"{model_id}: {astray[0]} lies outside of its folder: delete it yourself if you mean it")
    return Removal(_called(model_id, tag), len(chosen), sum({file.blob: file.size for file in chosen}.values()), strategy)


# ---- ModelScope -------------------------------------------------------------------------------------------------------


def _modelscope_folders() -> list[Path]:
    """owner/name folders; links, which ModelScope's client makes for names with dots, stand for folders that are there."""
    try:
        owners = [owner for owner in models_folder().iterdir() if _is_folder(owner)]
        return sorted(folder for owner in owners for folder in owner.iterdir() if _is_folder(folder))
    except OSError:
        return []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not path.name.startswith(".")


def _files_in(folder: Path) -> list[_File]:
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            state = path.stat()
            name = path.relative_to(folder).as_posix()
            found.append(_File(name, path, path, state.st_size, max(state.st_atime, state.st_mtime)))
    return found


def _plan_modelscope(model_id: str, tag: str | None) -> Removal:
    folder = cache_folder(model_id)
    if not safe_names([model_id]) or folder not in _modelscope_folders():
        raise ModelNotFound(f"{model_id[:200]}: it is not in ModelScope's cache: `rillet list` tells what is")
    files = _files_in(folder)
    if tag is None:
        alias = folder.with_name(model_id.partition("/")[2])                 # a link that ModelScope's client makes
        paths = (folder, alias) if alias.is_symlink() else (folder,)
        return Removal(model_id, len(files), sum(file.size for file in files), paths)
    names = set(_variant(files, tag, model_id).files)
    chosen = [file for file in files if file.name in names]
    return Removal(_called(model_id, tag), len(chosen), sum(f.size for f in chosen), tuple(f.path for f in chosen))


# ---- both -------------------------------------------------------------------------------------------------------------


def _variant(files: Iterable[_File], tag: str, model_id: str) -> Variant:
    """The cached variant of that tag, whole or not."""
    variants = [Variant(variant.label, variant.files) for variant in gguf_variants(file.name for file in files)]
    return choose_variant(variants, tag, f"{model_id} in the cache")[0]


def _called(model_id: str, tag: str | None) -> str:
    return model_id if tag is None else f"{model_id}:{tag}"
