"""load_weights(): a checkpoint's tensors -> the tree that the graph reads (tree.py). The device thread calls it.

packing.py has the rule by which a matrix rests. Here is the order in which tensors are taken, one log line per storage type
that takes more than in its file, and nothing that keeps a view of the file but what the device reads in the mapping itself.
Vectors are rounded to the activations' type: a float32 one would make every state after it float32.
"""

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import mlx.core as mx
import numpy as np

from backends.mlx.experts import ExpertStack
from backends.mlx.mapping import Mappings
from backends.mlx.matrices import Experts, Matrix, Product
from backends.mlx.metal_products import BLOCK_BYTES, BlockProduct, ProductKernels
from backends.mlx.packing import Packer
from backends.mlx.race import blocks_are_faster
from backends.mlx.tree import DenseWeights, LayerWeights, MixtureWeights, ModelWeights, Stack
from backends.mlx.trial import product_works
from engine.backend import Progress
from engine.errors import BadModelFile, ConfigError, OutOfDeviceMemory
from engine.model.spec import Dense, FeedForward, Layer, Mixture, ModelSpec
from engine.weights.tensors import RawTensor, TensorSource, to_float32

__all__ = ["DenseWeights", "LayerWeights", "MixtureWeights", "ModelWeights", "Stack", "load_weights"]

log = logging.getLogger(__name__)
DTYPES: dict[str, mx.Dtype | None] = {
    "auto": None,
    "f32": mx.float32, "float32": mx.float32,
    "bf16": mx.bfloat16, "bfloat16": mx.bfloat16,
    "f16": mx.float16, "float16": mx.float16,
}  # fmt: skip
TIMED = mx.metal.is_available()          # what the shim takes says nothing
NOTED_GROWTH = 1.25          # times its bytes in the file, from which on a type is told of


def load_weights(
    spec: ModelSpec, source: TensorSource, dtype: str, progress: Progress, products: ProductKernels | None = None, *,
    ranks: int = 1,
) -> ModelWeights:
    """Every tensor of the checkpoint, on the device and evaluated.

    products: the kernels that read native blocks, where there are any; else such types become groups or floats.
    dtype: of the activations, and of the weights that are floats; "auto" is float32 where there is no Metal, else the type
    that most of the model's floats have. ranks: processes that share this machine's memory.
    Raises BadModelFile, UnsupportedModel, ConfigError, OutOfDeviceMemory.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not known to the mlx backend: choose one of {', '.join(DTYPES)}")
    metal, chosen, limit = mx.metal.is_available(), DTYPES[dtype], memory_limit()
    packer = Packer(
        chosen if chosen is not None else own_dtype(spec, source) if metal else mx.float32,
        forced=chosen is not None,
        columns_first=not metal,
        native={} if products is None else native_products(products),
        trial=worth_it,
        mappings=Mappings(possible=metal),
        limit_bytes=None if limit is None else limit // ranks,
    )
    try:
        return Loader(spec, source, packer, progress).load()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "malloc" not in str(error):          # MLX has no type of its own for it
            raise
        raise OutOfDeviceMemory(
            f"memory ran out after {packer.nbytes / 1e9:.1f} GB of weights ({str(error)[:120]}): take a smaller quantization "
            "or a smaller model"
        ) from error


def own_dtype(spec: ModelSpec, source: TensorSource) -> mx.Dtype:
    """float16 if more of the matrices' bytes are F16 than BF16, else bfloat16, whose range no model leaves."""
    bytes_of = {"F16": 0, "BF16": 0}
    for name, shape in spec.shapes().items():
        if len(shape) == 2 and (tensor := take(source, name, shape)).storage.name in bytes_of:
            bytes_of[tensor.storage.name] += tensor.data.nbytes
    return mx.float16 if bytes_of["F16"] > bytes_of["BF16"] else mx.bfloat16


def worth_it(product: Product, raw: RawTensor, dtype: mx.Dtype) -> bool:
    """Whether a storage type is to rest in its blocks: the kernels are right on this device, and not slower than MLX's."""
    return product_works(product, raw, dtype) and (not TIMED or blocks_are_faster(product, raw, dtype))


def native_products(kernels: ProductKernels) -> Mapping[str, Product]:
    """The storage types that the Metal kernels read in their own blocks, which are fewer bytes than MLX's groups."""
    return {kind: BlockProduct(kernels, kind) for kind in BLOCK_BYTES}


def memory_limit() -> int | None:
    """Bytes that weights may take: Metal's advice, or the machine's memory; None where neither is told."""
    told = mx.device_info().get("max_recommended_working_set_size")
    if isinstance(told, int) and told > 0:
        return told
    if sys.platform != "win32" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def take(source: TensorSource, name: str, shape: tuple[int, ...]) -> RawTensor:
    """The tensor, of the shape that the model wants."""
    try:
        tensor = source.tensor(name)
    except KeyError:
        raise BadModelFile("the tensor is missing", file="checkpoint", tensor=name) from None
    if tensor.shape != shape:
        raise BadModelFile(f"its shape is {tensor.shape}, the model wants {shape}", file=tensor.file, tensor=name)
    return tensor


class Loader:
    """Takes tensors from a source one after another; counts them for the progress bar and for the closing log lines."""

    def __init__(self, spec: ModelSpec, source: TensorSource, packer: Packer, progress: Progress) -> None:
        self.spec, self.source, self.packer, self.progress = spec, source, packer, progress
        self.shapes = spec.shapes()
        self.done = 0
        self.grown: dict[str, tuple[int, int]] = {}      # storage type -> bytes in the file, bytes here

    def load(self) -> ModelWeights:
        embedding = self.matrix("embedding", gathered=True)
        layers = tuple(self.layer(f"layers.{number}.", layer) for number, layer in enumerate(self.spec.layers))
        norm = self.needed("norm")
        output = embedding if self.spec.tied_output else self.matrix("output")
        for name, (there, here) in self.grown.items():
            if here > NOTED_GROWTH * there:
                log.info("%s weights: %.0f MB of file, %.0f MB here", name, there / 1e6, here / 1e6)
        return ModelWeights(self.packer.dtype, embedding, layers, norm, output, self.packer.nbytes, self.packer.mappings)

    def layer(self, at: str, layer: Layer) -> LayerWeights:
        return LayerWeights(
            attention_norm=self.needed(at + "attention_norm"),
            qkv=self.stack(at + "query", at + "key", at + "value"),
            qkv_bias=self.vector(*(f"{at}{name}_bias" for name in ("query", "key", "value"))),
            query_norm=self.vector(at + "query_norm"),
            key_norm=self.vector(at + "key_norm"),
            attention_output=self.matrix(at + "attention_output"),
            attention_output_bias=self.vector(at + "attention_output_bias"),
            attention_post_norm=self.vector(at + "attention_post_norm"),
            feed_norm=self.needed(at + "feed_norm"),
            feed=self.feed(at, layer.feed_forward),
            feed_post_norm=self.vector(at + "feed_post_norm"),
        )

    def feed(self, at: str, spec: FeedForward) -> DenseWeights | MixtureWeights:
        match spec:
            case Dense():
                return self.dense_feed(at)
            case Mixture(experts=experts, shared_width=shared):
                return MixtureWeights(
                    router=self.matrix(at + "router"),
                    gate_up=self.experts(at, experts, "gate", "up"),
                    down=self.experts(at, experts, "down"),
                    shared=self.dense_feed(at + "shared_") if shared is not None else None,
                    shared_router=self.matrix(at + "shared_router") if shared is not None else None,
                )

    def dense_feed(self, at: str) -> DenseWeights:
        return DenseWeights(self.stack(at + "gate", at + "up"), self.matrix(at + "down"))

    def take(self, name: str) -> RawTensor:
        return take(self.source, name, self.shapes[name])

    def give_back(self, name: str, raw: RawTensor) -> None:
        if not self.packer.mappings.holds(raw.data):
            self.source.release(name)
        self.done += 1
        self.progress("loading weights", self.done, len(self.shapes))

    def needed(self, name: str) -> mx.array:
        vector = self.vector(name)
        assert vector is not None, name
        return vector

    def vector(self, *names: str) -> mx.array | None:
        """Norms or biases in a row, of the activations' type; None if the model has none."""
        raws = {name: self.take(name) for name in names if name in self.shapes}
        if not raws:
            return None
        values = np.concatenate([to_float32(raw) for raw in raws.values()])
        vector = mx.array(values).astype(self.packer.dtype)
        mx.eval(vector)
        for name, raw in raws.items():
            self.give_back(name, raw)
        self.packer.nbytes += vector.nbytes
        return vector

    def matrix(self, name: str, *, gathered: bool = False) -> Matrix:
        return self.pack([name], gathered=gathered)

    def stack(self, *names: str) -> Stack:
        """The matrices under one another: as one, as far as neighbours are stored in the same way."""
        runs = groupby(names, key=lambda name: self.take(name).storage)
        matrices = tuple(self.pack(list(run)) for _, run in runs)
        return Stack(sum(matrix.rows for matrix in matrices), matrices)

    def pack(self, names: Sequence[str], *, gathered: bool = False) -> Matrix:
        before, raws = self.packer.nbytes, [self.take(name) for name in names]
        matrix = self.packer.matrix(raws, self.returning(names), gathered=gathered)
        self.note(raws, self.packer.nbytes - before)
        return matrix

    def experts(self, at: str, count: int, *parts: str) -> Experts:
        """Of all experts: the parts side by side, as one if they are stored in the same way."""
        runs = [list(run) for _, run in groupby(parts, key=lambda part: self.take(f"{at}experts.0.{part}").storage)]
        names = [[f"{at}experts.{number}.{part}" for number in range(count) for part in run] for run in runs]
        made = [self.pack_experts(each, count) for each in names]
        return made[0] if len(made) == 1 else ExpertStack(tuple(made))

    def pack_experts(self, names: Sequence[str], count: int) -> Experts:
        before, raws = self.packer.nbytes, [self.take(name) for name in names]
        made = self.packer.experts(raws, count, self.returning(names))
        self.note(raws, self.packer.nbytes - before)
        return made

    def returning(self, names: Iterable[str]) -> "Returning":
        return Returning(self, names)

    def note(self, raws: Sequence[RawTensor], here: int) -> None:
        kind = raws[0].storage.name
        there, already = self.grown.get(kind, (0, 0))
        file_bytes = sum(raw.data.nbytes + sum(each.data.nbytes for each in raw.beside) for raw in raws)
        self.grown[kind] = there + file_bytes, already + here


class Returning:
    """Gives tensors back by their canonical names, in the order in which they are taken."""

    def __init__(self, loader: Loader, names: Iterable[str]) -> None:
        self.loader, self.names = loader, iter(names)

    def __call__(self, raw: RawTensor) -> None:
        self.loader.give_back(next(self.names), raw)
