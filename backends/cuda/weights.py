"""RawTensor -> what the kernels read: matrices in fragment order, vectors as float32. runner.py loads through load_weights.

Matrices that read the same input (query/key/value, gate/up) lie under one another if they are of one storage type. A type
that does not rest as it is becomes bfloat16, with one log line that says what that costs. Nothing keeps a view of the file.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from backends.cuda.device import Array, Device, Stream, make_array
from backends.cuda.matrices import PACKINGS, ROW_TILE, Matrix, Packer
from engine.backend import Progress
from engine.errors import BadModelFile, ConfigError
from engine.model.spec import Dense, FeedForward, Layer, Mixture, ModelSpec
from engine.weights.tensors import RawTensor, TensorSource, to_float32

__all__ = ["DenseWeights", "LayerWeights", "MixtureWeights", "ModelWeights", "Stack", "load_weights"]

log = logging.getLogger(__name__)
DTYPES = {
    "auto": None,
    "bf16": "BF16", "bfloat16": "BF16",
    "f16": "F16", "float16": "F16",
}  # fmt: skip
FLOATS = frozenset({"BF16", "F16", "F32", "F64"})


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices that read the same input and write neighbouring columns."""

    rows: int
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """A gated feed-forward; or of all experts of a layer."""

    gate_up: Stack
    down: Stack


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    router: Stack
    experts: DenseWeights
    shared: DenseWeights | None
    shared_router: Stack | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; a vector that the layer does not have is None."""

    attention_norm: Array
    qkv: Stack
    qkv_bias: Array | None
    query_norm: Array | None
    key_norm: Array | None
    attention_output: Stack
    attention_output_bias: Array | None
    attention_post_norm: Array | None
    feed_norm: Array
    feed: DenseWeights | MixtureWeights
    feed_post_norm: Array | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    norm: Array
    output: Matrix                   # the embedding itself where the two are tied
    nbytes: int


def load_weights(
    device: Device, stream: Stream, spec: ModelSpec, source: TensorSource, dtype: str, progress: Progress
) -> ModelWeights:
    """Every tensor of the checkpoint onto the device. Raises BadModelFile, ConfigError, OutOfDeviceMemory."""
    return Loader(device, stream, spec, source, dtype, progress).load()


class Loader:
    """Takes tensors from a source one after another; counts them for the progress bar and for the closing log lines."""

    def __init__(
        self, device: Device, stream: Stream, spec: ModelSpec, source: TensorSource, dtype: str, progress: Progress
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not known to the cuda backend: choose one of {', '.join(DTYPES)}")
        self.device, self.stream = device, stream
        self.packer = Packer(device, stream)
        self.spec, self.source, self.progress = spec, source, progress
        self.dense = DTYPES[dtype]
        self.shapes = spec.shapes()
        self.done = 0
        self.nbytes = 0
        self.widened: dict[str, tuple[int, int]] = {}     # storage type -> bytes in the file, bytes here

    def load(self) -> ModelWeights:
        embedding = self.stack("embedding").matrices[0]
        layers = tuple(self.layer(f"layers.{number}.", layer) for number, layer in enumerate(self.spec.layers))
        norm = self.needed("norm")
        output = embedding if self.spec.tied_output else self.stack("output").matrices[0]
        self.packer.close()
        for name, (file_bytes, here) in self.widened.items():
            log.info("%s weights rest as bfloat16: %.0f MB of file, %.0f MB here", name, file_bytes / 1e6, here / 1e6)
        return ModelWeights(embedding, layers, norm, output, self.nbytes)

    def layer(self, at: str, layer: Layer) -> LayerWeights:
        return LayerWeights(
            attention_norm=self.needed(at + "attention_norm"),
            qkv=self.stack(at + "query", at + "key", at + "value"),
            qkv_bias=self.vector(*(f"{at}{name}_bias" for name in ("query", "key", "value"))),
            query_norm=self.vector(at + "query_norm"),
            key_norm=self.vector(at + "key_norm"),
            attention_output=self.stack(at + "attention_output"),
            attention_output_bias=self.vector(at + "attention_output_bias"),
            attention_post_norm=self.vector(at + "attention_post_norm"),
            feed_norm=self.needed(at + "feed_norm"),
            feed=self.feed(at, layer.feed_forward),
            feed_post_norm=self.vector(at + "feed_post_norm"),
        )

    def feed(self, at: str, spec: FeedForward) -> DenseWeights | MixtureWeights:
        match spec:
            case Dense():
                return DenseWeights(self.stack(at + "gate", at + "up"), self.stack(at + "down"))
            case Mixture(experts=experts, shared_width=shared):
                return MixtureWeights(
                    router=self.stack(at + "router"),
                    experts=DenseWeights(
                        self.stack("gate", "up", experts=[f"{at}experts.{expert}." for expert in range(experts)]),
                        self.stack("down", experts=[f"{at}experts.{expert}." for expert in range(experts)]),
                    ),
                    shared=DenseWeights(self.stack(at + "shared_gate", at + "shared_up"), self.stack(at + "shared_down"))
                    if shared is not None else None,
                    shared_router=self.stack(at + "shared_router") if shared is not None else None,
                )  # fmt: skip

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

    def needed(self, name: str) -> Array:
        vector = self.vector(name)
        assert vector is not None, name
        return vector

    def vector(self, *names: str) -> Array | None:
        """Norms or biases in a row as float32; None if the model has none."""
        there = [name for name in names if name in self.shapes]
        if not there:
            return None
        values = np.concatenate([to_float32(self.take(name)) for name in there], dtype=np.float32)
        vector = make_array(self.device, "f32", *values.shape)
        self.stream.copy_in(vector.address, values)
        self.stream.record().wait()                      # the host's numbers are gone after this
        for name in there:
            self.give_back(name)
        self.nbytes += vector.nbytes
        return vector

    def stack(self, *names: str, experts: Sequence[str] = ("",)) -> Stack:
        """The matrices under one another: as one, as far as neighbours rest in the same way. experts: prefixes."""
        rows = sum(self.shapes[experts[0] + name][0] for name in names)
        kinds = {name: self.storage([self.take(expert + name) for expert in experts]) for name in names}
        together = all(self.shapes[experts[0] + name][0] % ROW_TILE == 0 for name in names[:-1])
        runs = [list(run) for _, run in groupby(names, key=lambda name: (kinds[name], together or name))]
        return Stack(rows, tuple(self.pack(kinds[run[0]], run, experts) for run in runs))

    def pack(self, storage: str, names: Sequence[str], experts: Sequence[str]) -> Matrix:
        shapes = [self.shapes[experts[0] + name] for name in names]
        matrix = self.packer.empty(storage, sum(shape[0] for shape in shapes), shapes[0][1], len(experts))
        for number, expert in enumerate(experts):
            first = 0
            for name, shape in zip(names, shapes, strict=True):
                tensor = self.take(expert + name)
                self.packer.fill(matrix, tensor, first, number)
                self.note_widening(tensor, storage)
                self.give_back(expert + name)
                first += shape[0]
        self.nbytes += matrix.nbytes
        return matrix

    def storage(self, tensors: Sequence[RawTensor]) -> str:
        """How the tensors rest: as they are if they are alike and can, else as floats."""
        names = {tensor.storage.name for tensor in tensors}
        name = names.pop()
        if names or (name not in PACKINGS and name not in FLOATS):
            return "BF16"
        if name in FLOATS:
            return self.dense or (name if name in PACKINGS else "BF16")
        return name

    def note_widening(self, tensor: RawTensor, storage: str) -> None:
        name = tensor.storage.name
        if name != storage:
            file_bytes, here = self.widened.get(name, (0, 0))
            count = tensor.rows * tensor.shape[-1]
            self.widened[name] = (file_bytes + tensor.data.nbytes, here + 2 * count)
