"""RawTensor -> what the linear kernels read: quantized lanes, dense lanes, vectors. model.py loads through `load_weights`.

What a storage type becomes is decided in matrices.py; what costs memory by that is told in one log line per type.
Matrices that read the same input (query/key/value, gate/up) are stacked, so that a step has fewer launches. Nothing here
keeps a view of the file: each tensor is released as soon as it is repacked.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from backends.cpu.matrices import Matrix
from backends.cpu.packing import DENSE, PACKINGS, pack
from engine.backend import Progress
from engine.errors import BadModelFile, ConfigError
from engine.model.spec import Dense, FeedForward, Layer, Mixture, ModelSpec
from engine.weights.tensors import RawTensor, TensorSource, to_float32

__all__ = ["DenseWeights", "LayerWeights", "MixtureWeights", "ModelWeights", "Stack", "load_weights"]

log = logging.getLogger(__name__)
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices that read the same input and write neighbouring columns."""

    rows: int
    matrices: tuple[Matrix, ...]

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices)


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """A gated feed-forward."""

    gate_up: Stack
    down: Stack

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    """Experts, who chooses them, and the expert that every token goes to."""

    router: Stack
    experts: tuple[DenseWeights, ...]
    shared: DenseWeights | None
    shared_router: Stack | None

    @property
    def nbytes(self) -> int:
        shared = sum(part.nbytes for part in (self.shared, self.shared_router) if part is not None)
        return self.router.nbytes + sum(expert.nbytes for expert in self.experts) + shared


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; a vector that the layer does not have is empty."""

    attention_norm: FloatArray
    qkv: Stack
    qkv_bias: FloatArray
    query_norm: FloatArray
    key_norm: FloatArray
    attention_output: Stack
    attention_output_bias: FloatArray
    attention_post_norm: FloatArray
    feed_norm: FloatArray
    feed: DenseWeights | MixtureWeights
    feed_post_norm: FloatArray

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.__slots__)


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    norm: FloatArray
    output: Matrix                  # the embedding itself where the two are tied

    @property
    def nbytes(self) -> int:
        tied = self.output is self.embedding
        layers = sum(layer.nbytes for layer in self.layers)
        return layers + self.norm.nbytes + self.embedding.nbytes + (0 if tied else self.output.nbytes)


DTYPES = {
    "auto": None,
    "f32": "F32", "float32": "F32",
    "bf16": "BF16", "bfloat16": "BF16",
    "f16": "F16", "float16": "F16",
}   # fmt: skip


def load_weights(spec: ModelSpec, source: TensorSource, dtype: str, progress: Progress) -> ModelWeights:
    """Repack every tensor of the checkpoint. dtype "f32" holds all of them as float32: the oracle."""
    return Loader(spec, source, dtype, progress).load()


class Loader:
    """Takes tensors from a source one after another; counts them for the progress bar and for the closing log lines."""

    def __init__(self, spec: ModelSpec, source: TensorSource, dtype: str, progress: Progress) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not known to the cpu backend: choose one of {', '.join(DTYPES)}")
        self.spec, self.source, self.progress = spec, source, progress
        self.dense = DTYPES[dtype]
        self.shapes = spec.shapes()
        self.done = 0
        self.widened: dict[str, tuple[int, int]] = {}     # storage type -> bytes in the file, bytes here

    def load(self) -> ModelWeights:
        embedding = self.matrix("embedding")
        layers = tuple(self.layer(f"layers.{number}.", layer) for number, layer in enumerate(self.spec.layers))
        norm = self.vector("norm")
        output = embedding if self.spec.tied_output else self.matrix("output")
        for name, (file_bytes, here) in self.widened.items():
            log.info("%s weights rest as bfloat16: %.0f MB of file, %.0f MB here", name, file_bytes / 1e6, here / 1e6)
        return ModelWeights(embedding, layers, norm, output)

    def layer(self, at: str, layer: Layer) -> LayerWeights:
        return LayerWeights(
            attention_norm=self.vector(at + "attention_norm"),
            qkv=self.stack(at + "query", at + "key", at + "value"),
            qkv_bias=np.concatenate([self.vector(at + f"{name}_bias") for name in ("query", "key", "value")]),
            query_norm=self.vector(at + "query_norm"),
            key_norm=self.vector(at + "key_norm"),
            attention_output=self.stack(at + "attention_output"),
            attention_output_bias=self.vector(at + "attention_output_bias"),
            attention_post_norm=self.vector(at + "attention_post_norm"),
            feed_norm=self.vector(at + "feed_norm"),
            feed=self.feed(at, layer.feed_forward),
            feed_post_norm=self.vector(at + "feed_post_norm"),
        )

    def feed(self, at: str, spec: FeedForward) -> DenseWeights | MixtureWeights:
        match spec:
            case Dense():
                return self.dense_feed(at)
            case Mixture(experts=experts, shared_width=shared):
                return MixtureWeights(
                    router=self.stack(at + "router"),
                    experts=tuple(self.dense_feed(f"{at}experts.{expert}.") for expert in range(experts)),
                    shared=self.dense_feed(at + "shared_") if shared is not None else None,
                    shared_router=self.stack(at + "shared_router") if shared is not None else None,
                )

    def dense_feed(self, at: str) -> DenseWeights:
        return DenseWeights(self.stack(at + "gate", at + "up"), self.stack(at + "down"))

    def take(self, name: str) -> RawTensor:
        try:
            tensor = self.source.tensor(name)
        except KeyError:
            raise BadModelFile("the tensor is missing", file="checkpoint", tensor=name) from None
        if tensor.shape != self.shapes[name]:
            message = f"its shape is {tensor.shape}, the model wants {self.shapes[name]}"
            raise BadModelFile(message, file=tensor.file, tensor=name)
        return tensor

    def give_back(self, name: str) -> None:
        self.source.release(name)
        self.done += 1
        self.progress("loading weights", self.done, len(self.shapes))

    def vector(self, name: str) -> FloatArray:
        """A norm or bias as float32; empty if the model has none."""
        if name not in self.shapes:
            return np.empty(0, np.float32)
        values = np.array(to_float32(self.take(name)), np.float32)
        self.give_back(name)
        return values

    def matrix(self, name: str) -> Matrix:
        return self.stack(name).matrices[0]

    def stack(self, *names: str) -> Stack:
        """The matrices under one another: as one, as far as neighbours rest in the same way."""
        rows = sum(self.shapes[name][0] for name in names)
        named = [(name, self.take(name)) for name in names]
        runs = groupby(named, key=lambda pair: self.storage(pair[1]))
        return Stack(rows, tuple(self.pack(storage, list(pairs)) for storage, pairs in runs))

    def storage(self, tensor: RawTensor) -> str:
        """The storage type that the tensor gets here."""
        name = tensor.storage.name
        if self.dense == "F32":
            return "F32"
        if name in PACKINGS:
            return name
        if name in DENSE:
            return self.dense or name
        return "BF16"

    def pack(self, storage: str, named: Sequence[tuple[str, RawTensor]]) -> Matrix:
        names = iter(named)

        def taken(tensor: RawTensor) -> None:
            self.note_widening(tensor, storage)
            self.give_back(next(names)[0])

        return pack(storage, [tensor for _, tensor in named], taken)

    def note_widening(self, tensor: RawTensor, storage: str) -> None:
        name = tensor.storage.name
        if name not in DENSE and storage == "BF16":
            file_bytes, here = self.widened.get(name, (0, 0))
            count = tensor.rows * tensor.shape[-1]
            self.widened[name] = (file_bytes + tensor.data.nbytes, here + 2 * count)
