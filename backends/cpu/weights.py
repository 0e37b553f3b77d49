"""RawTensor -> what the linear kernels read: quantized lanes, dense lanes, vectors. model.py loads through `load_weights`.

One rule for every storage type: an exact repack if there is one, else bfloat16 with one log line that says what it costs.
Matrices that read the same input (query/key/value, gate/up) are stacked, so that a step has fewer launches. Nothing here
keeps a view of the file: each tensor is released as soon as it is repacked. Over 300 lines for the table of storage types.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from backends.cpu.kernels import repack
from backends.cpu.kernels.jit import LANES
from engine.backend import Progress
from engine.errors import BadModelFile, ConfigError, UnsupportedModel
from engine.model.spec import Dense, Layer, Mixture, ModelSpec
from engine.weights.tensors import RawTensor, TensorSource, to_float32

__all__ = ["DenseMatrix", "Lanes", "LayerWeights", "Matrix", "ModelWeights", "Stack", "load_weights"]

log = logging.getLogger(__name__)
FloatArray = NDArray[np.float32]
DenseArray = FloatArray | NDArray[np.uint16] | NDArray[np.int16]
WIDEN_BYTES = 64 << 20    # float32 bytes of a matrix that are made at a time, where it goes through float32


@dataclass(frozen=True, slots=True)
class Lanes:
    """A matrix in 4 or 8 bits: w = (q / 2^bits - 1/2) scale, or q / 2^bits scale + minimum where there are minima."""

    rows: int
    bits: int
    words: NDArray[np.uint32]       # (rows / 32, columns * bits / 32, 32)
    scale: FloatArray               # (rows / 32, groups, 32)
    minimum: FloatArray             # the same, or (0, 0, 0)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scale.nbytes + self.minimum.nbytes

    def take(self, rows: NDArray[np.int32]) -> FloatArray:
        """Some rows as float32: what an embedding looks up."""
        block, lane = rows // LANES, rows % LANES
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)
        q = (self.words[block, :, lane][:, :, None] >> shifts) & np.uint32(2**self.bits - 1)
        scale = self.scale[block, :, lane][:, :, None]
        parts = q.reshape(len(rows), scale.shape[1], -1) * np.float32(2.0**-self.bits)     # (n, groups, columns of a group)
        if len(self.minimum):
            values = parts * scale + self.minimum[block, :, lane][:, :, None]
        else:
            values = (parts - np.float32(0.5)) * scale
        return values.reshape(len(rows), -1)


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A matrix as float32, bfloat16 (in uint16) or float16 (in int16)."""

    rows: int
    weight: DenseArray              # (rows / 32, columns, 32)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def take(self, rows: NDArray[np.int32]) -> FloatArray:
        """Some rows as float32: what an embedding looks up."""
        chosen = self.weight[rows // LANES, :, rows % LANES]
        if chosen.dtype == np.uint16:
            return (chosen.astype(np.uint32) << 16).view(np.float32)
        return (chosen.view(np.float16) if chosen.dtype == np.int16 else chosen).astype(np.float32)


Matrix = Lanes | DenseMatrix


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices that read the same input and write neighbouring columns."""

    rows: int
    matrices: tuple[Matrix, ...]

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices)


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
    gate_up: Stack
    down: Stack
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


@dataclass(frozen=True, slots=True)
class Packing:
    """How a quantized storage type rests as lanes."""

    bits: int
    group: int
    minima: bool
    pack: Callable[[NDArray[np.uint8], NDArray[np.uint32], FloatArray, FloatArray, int], None]


PACKINGS = {
    "Q4_0": Packing(4, 32, False, repack.q4_0),
    "Q4_1": Packing(4, 32, True, repack.q4_1),
    "Q4_K": Packing(4, 32, True, repack.q4_k),
    "Q5_0": Packing(8, 32, False, repack.q5_0),
    "Q5_1": Packing(8, 32, True, repack.q5_1),
    "Q5_K": Packing(8, 32, True, repack.q5_k),
    "Q6_K": Packing(8, 16, False, repack.q6_k),
    "Q8_0": Packing(8, 32, False, repack.q8_0),
}
DENSE = {"F32": np.float32, "BF16": np.uint16, "F16": np.int16}
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
        match layer.feed_forward:
            case Dense():
                pass
            case Mixture(experts=experts):
                raise UnsupportedModel(
                    f"{self.spec.family}: the cpu backend has no mixture of experts yet ({experts} experts): "
                    "choose a dense model"
                )
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
            gate_up=self.stack(at + "gate", at + "up"),
            down=self.stack(at + "down"),
            feed_post_norm=self.vector(at + "feed_post_norm"),
        )

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
        rows, columns = sum(tensor.rows for _, tensor in named), named[0][1].shape[-1]
        blocks = -(-rows // LANES)
        first = 0
        if storage in DENSE:
            weight = np.zeros((blocks, columns, LANES), DENSE[storage])
            for name, tensor in named:
                for start, values in dense_pieces(tensor, storage):
                    repack.dense_rows(values, weight, first + start)
                first += tensor.rows
                self.note_widening(tensor, storage)
                self.give_back(name)
            return DenseMatrix(rows, weight)
        packing = PACKINGS[storage]
        words = np.zeros((blocks, columns * packing.bits // 32, LANES), np.uint32)
        scale = np.zeros((blocks, columns // packing.group, LANES), np.float32)
        minimum = np.zeros_like(scale) if packing.minima else np.zeros((0, 0, 0), np.float32)
        for name, tensor in named:
            packing.pack(tensor.data.reshape(tensor.rows, tensor.row_bytes), words, scale, minimum, first)
            first += tensor.rows
            self.give_back(name)
        return Lanes(rows, packing.bits, words, scale, minimum)

    def note_widening(self, tensor: RawTensor, storage: str) -> None:
        name = tensor.storage.name
        if name not in DENSE and storage == "BF16":
            file_bytes, here = self.widened.get(name, (0, 0))
            count = tensor.rows * tensor.shape[-1]
            self.widened[name] = (file_bytes + tensor.data.nbytes, here + 2 * count)


def dense_pieces(tensor: RawTensor, storage: str) -> Iterator[tuple[int, DenseArray]]:
    """(first row, rows as `storage`) of the tensor, a few rows at a time, so that float32 never holds all of them."""
    data = tensor.data.reshape(tensor.rows, tensor.row_bytes)
    if tensor.storage.name == storage:
        yield 0, data.view(DENSE[storage])
        return
    rows = max(1, WIDEN_BYTES // (4 * tensor.shape[-1]))
    piece = partial(RawTensor, name=tensor.name, storage=tensor.storage, file=tensor.file)
    for start in range(0, tensor.rows, rows):
        some = data[start : start + rows]
        values = to_float32(piece(shape=(len(some), tensor.shape[-1]), data=some.reshape(-1)))
        yield start, narrow(values, storage)


def narrow(values: FloatArray, storage: str) -> DenseArray:
    """float32 -> the bits of a dense storage type, rounded to nearest, ties to even."""
    match storage:
        case "BF16":
            bits = np.ascontiguousarray(values).view(np.uint32)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        case "F16":
            return values.astype(np.float16).view(np.int16)
        case _:
            return np.ascontiguousarray(values)
