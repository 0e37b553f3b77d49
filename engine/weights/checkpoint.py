"""A path -> everything that a model is: spec, tensors by canonical name, tokenizer, chat template, end tokens.

The engine opens a checkpoint once, at start, and closes it when the backend has its weights. What comes out is complete
and of the right shapes before any device sees it; what does not fit is a typed error that names file and tensor.
A new format is one more function in FORMATS.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.errors import BadModelFile, ModelNotFound, UnsupportedModel
from engine.model.families import canonical_names, spec_from_gguf
from engine.model.spec import ModelSpec
from engine.text.gguf_vocabulary import read_gguf_tokenizer
from engine.text.template import ChatTemplate
from engine.text.tokenizer import Tokenizer
from engine.weights.gguf_file import GgufFile
from engine.weights.tensors import RawTensor, TensorSource

__all__ = ["Checkpoint", "CheckpointTensors", "open_checkpoint"]

# general.sampling.* in GGUF -> the names of SamplingParams, with the values that a file may state
SAMPLING_KEYS: dict[str, tuple[str, float, float]] = {
    "temp": ("temperature", 0.0, 2.0),
    "top_k": ("top_k", 0, 1 << 24),
    "top_p": ("top_p", 1e-6, 1.0),
    "min_p": ("min_p", 0.0, 1.0),
    "penalty_repeat": ("repetition_penalty", 0.01, 10.0),
}


class CheckpointTensors(TensorSource, Protocol):
    """A TensorSource over open files."""

    def close(self) -> None:
        """Let go of the files; idempotent. A tensor that somebody still holds keeps its mapping alive."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files on disk, opened. sampling_defaults: what the model's makers advise, by SamplingParams' names."""

    path: Path
    name: str
    spec: ModelSpec
    tensors: CheckpointTensors
    tokenizer: Tokenizer
    template: ChatTemplate | None
    end_ids: frozenset[int]
    sampling_defaults: Mapping[str, float | int]

    def close(self) -> None:
        """Let go of the files; the tokenizer and the template live on. Idempotent."""
        self.tensors.close()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the model at `path`. Raises ModelNotFound, BadModelFile, UnsupportedModel."""
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file or folder: check the path, or download the model first")
    kind = "a folder" if path.is_dir() else path.suffix.lower()
    if kind not in FORMATS:
        raise UnsupportedModel(f"{path}: Rillet reads {' and '.join(FORMATS)} files for now, this is {kind or 'neither'}: "
                               "name a .gguf file")
    return FORMATS[kind](path)


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufFile(path)
    try:
        return _gguf_checkpoint(path, file)
    except BaseException:
        file.close()
        raise


def _gguf_checkpoint(path: Path, file: GgufFile) -> Checkpoint:
    values = file.metadata
    parts = values.get("split.count", 1)
    if parts not in (0, 1):
        raise UnsupportedModel(f"{path}: it is one of {parts} parts: join them with llama-gguf-split --merge")
    spec = spec_from_gguf(values, file.tensors, str(path))
    tensors = _GgufTensors(file, canonical_names(file.tensors, str(path)))
    _check(spec, tensors, path)
    tokenizer = read_gguf_tokenizer(values, str(path), spec.vocabulary_size)
    return Checkpoint(
        path=path,
        name=path.stem,                    # general.name is for people: it has spaces and says nothing of the file
        spec=spec,
        tensors=tensors,
        tokenizer=tokenizer,
        template=_template(values.get("tokenizer.chat_template"), tokenizer, path),
        end_ids=tokenizer.end_ids,
        sampling_defaults=_sampling_defaults(values, path),
    )


def _check(spec: ModelSpec, tensors: "_GgufTensors", path: Path) -> None:
    """Every tensor that the spec wants is there in its shape, and no other one is."""
    shapes = spec.shapes()
    for name, shape in shapes.items():
        if name not in tensors.gguf_names:
            raise BadModelFile(f"{name} of shape {shape} is missing: download the file again", file=str(path), tensor=name)
        tensor = tensors.tensor(name)
        if tensor.shape != shape:
            raise BadModelFile(
                f"its shape is {tensor.shape}, the metadata wants {shape} for {name}: download the file again",
                file=str(path),
                tensor=tensor.name,
            )
    if unused := [tensors.gguf_names[name] for name in tensors.names() if name not in shapes]:
        raise UnsupportedModel(
            f"{path}: its {spec.family} has {len(unused)} tensors that Rillet would leave out ({', '.join(unused[:4])}), "
            "which would change its answers: take another conversion"
        )


def _template(source: object, tokenizer: Tokenizer, path: Path) -> ChatTemplate | None:
    if source is None:
        return None
    if not isinstance(source, str):
        raise BadModelFile("tokenizer.chat_template is no text: download the file again", file=str(path))
    bos, eos = (
        "" if token is None else tokenizer.token_text(token) for token in (tokenizer.bos_id, tokenizer.eos_id)
    )
    return ChatTemplate(source, bos_token=bos, eos_token=eos, file=str(path))


def _sampling_defaults(values: Mapping[str, object], path: Path) -> dict[str, float | int]:
    defaults: dict[str, float | int] = {}
    for key, (name, low, high) in SAMPLING_KEYS.items():
        value = values.get(f"general.sampling.{key}")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise BadModelFile(
                f"general.sampling.{key} is {value!r}, it must be from {low:g} to {high:g}: download it again", file=str(path)
            )
        defaults[name] = value
    return defaults


class _GgufTensors:
    """The tensors of one GGUF file by canonical name; itself a CheckpointTensors."""

    def __init__(self, file: GgufFile, gguf_names: Mapping[str, str]) -> None:
        self.file = file
        self.gguf_names = gguf_names

    def names(self) -> Iterable[str]:
        return self.gguf_names.keys()

    def tensor(self, name: str) -> RawTensor:
        return self.file.tensors[self.gguf_names[name]]

    def release(self, name: str) -> None:
        self.file.release(self.tensor(name))

    def close(self) -> None:
        self.file.close()


FORMATS: dict[str, Callable[[Path], Checkpoint]] = {".gguf": _open_gguf}
