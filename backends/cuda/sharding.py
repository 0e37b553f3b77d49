"""One model over several devices: which part of every tensor a rank has, and the spec of a model of just these parts.

Each rank has some heads and some of every feed-forward's width (of every expert's, too), so that a branch's sum over the
ranks is the whole branch. Widths are cut where the storage type's blocks end, if need be into parts that are not equal: bits
stay the file's. The runner asks for it from outside; forward knows nothing of it, except that it sums branches.
"""

import logging
from dataclasses import dataclass, replace
from math import lcm

import numpy as np

from backends.cuda.bfloat16 import to_bfloat16
from engine.errors import BadModelFile, UnsupportedModel
from engine.model.spec import Attention, Dense, FeedForward, Layer, Mixture, ModelSpec
from engine.weights.tensors import STORAGE, Part, RawTensor, TensorSource, to_float32

__all__ = ["ShardedSource", "check_heads", "shard_spec"]

log = logging.getLogger(__name__)
UNITS = (16, 8, 1)               # widths that kernels like, best first
WIDENED_VALUES = 1 << 24         # of a tensor that exist as float32 at a time


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows (or entries of a vector), or columns, start : stop of a tensor."""

    columns: bool
    start: int
    stop: int


class ShardedSource:
    """A TensorSource of one rank's parts, in the shapes of `spec`, which is the model of this rank."""

    def __init__(self, source: TensorSource, whole: ModelSpec, rank: int, ranks: int) -> None:
        """whole: the model of `source`. Raises UnsupportedModel if it cannot be cut for so many ranks."""
        assert 0 <= rank < ranks
        widths = Widths(source, whole, rank, ranks)
        self.source, self.rank = source, rank
        self.shapes = whole.shapes()
        self.spec = _shard(whole, widths)
        self.cuts = [_layer_cuts(*layers, widths) for layers in zip(whole.layers, self.spec.layers, strict=True)]
        self.made: dict[str, RawTensor] = {}             # copies, until they are released
        if rank == 0:
            self._tell_widening(ranks)

    def names(self) -> list[str]:
        return list(self.source.names())

    def tensor(self, name: str) -> RawTensor:
        """The part of this rank: a view where it is rows, a copy where it is columns. KeyError, BadModelFile."""
        if name in self.made:
            return self.made[name]
        tensor = self.source.tensor(name)
        if tensor.shape != self.shapes.get(name, tensor.shape):
            message = f"its shape is {tensor.shape}, the model wants {self.shapes[name]}: download the file again"
            raise BadModelFile(message, file=tensor.file, tensor=name)
        if name.endswith(".attention_output_bias") and self.rank > 0:
            return _zeros_like(tensor)                   # it must be added once
        match self._cut(name):
            case None:
                return tensor
            case Cut(columns=True) as cut:
                part = self.made[name] = _columns(tensor, cut)
                return part
            case cut:
                return _rows(tensor, name, cut)

    def release(self, name: str) -> None:
        self.made.pop(name, None)
        self.source.release(name)

    def _cut(self, name: str) -> Cut | None:
        first, _, rest = name.partition(".")
        if first != "layers":
            return None
        number, _, short = rest.partition(".")
        if short.startswith("experts."):
            short = "experts." + short.rpartition(".")[2]
        return self.cuts[int(number)].get(short)

    def _tell_widening(self, ranks: int) -> None:
        """One line about matrices that are cut within blocks: what they take more on all devices together."""
        more, kinds = 0.0, set()
        for name in self.source.names():
            cut = self._cut(name)
            if cut is not None and cut.columns:
                tensor = self.source.tensor(name)
                if _within_blocks(tensor, cut):
                    kinds.add(f"{name.rpartition('.')[2]} ({tensor.storage.name})")
                    more += 2 * tensor.rows * tensor.shape[-1] - tensor.data.nbytes
        if kinds:
            log.info("cut for %d devices, %s rest as bfloat16: %.0f MB more", ranks, ", ".join(sorted(kinds)), more / 1e6)


def shard_spec(whole: ModelSpec, source: TensorSource, rank: int, ranks: int) -> ModelSpec:
    """The model that `rank` runs. Raises UnsupportedModel if it cannot be cut for so many ranks."""
    return _shard(whole, Widths(source, whole, rank, ranks))


def check_heads(whole: ModelSpec, ranks: int) -> None:
    """Raise UnsupportedModel if so many ranks cannot share the heads of every layer; it says how many could."""
    for layer in whole.layers:
        a = layer.attention
        if not _heads_divide(a, ranks):
            possible = ", ".join(str(n) for n in range(1, min(a.heads, 64) + 1) if _heads_divide(a, n))
            raise UnsupportedModel(
                f"{whole.family}: {a.heads} heads with {a.kv_heads} key/value heads cannot be shared by {ranks} devices: "
                f"name as many as one of {possible} with --d"
            )


# ---- where to cut -----------------------------------------------------------------------------------------------------


class Widths:
    """Where feed-forwards are cut for one rank: the same in all layers of one kind, and agreed on by all ranks, because it
    follows from the checkpoint."""

    def __init__(self, source: TensorSource, whole: ModelSpec, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.family = rank, ranks, whole.family
        self.blocks: dict[tuple[str, int], int] = {}     # (kind, width) -> what all its `down` can be cut at
        there = set(source.names())
        for number, layer in enumerate(whole.layers):
            for kind, width in _widths(layer.feed_forward):
                for name in _down_names(f"layers.{number}.", kind, layer.feed_forward):
                    if name in there:                    # what is missing is the loader's to say
                        block = source.tensor(name).storage.block
                        self.blocks[kind, width] = lcm(block, self.blocks.get((kind, width), 1))

    def part(self, kind: str, width: int) -> tuple[int, int]:
        """start, stop: whole blocks if there are enough. Later ranks have the larger parts, since the first one samples."""
        block = self.blocks.get((kind, width), 1)
        for unit in (*(lcm(block, unit) for unit in UNITS), *UNITS):
            count = width // unit
            if width % unit == 0 and count >= self.ranks:
                return count * self.rank // self.ranks * unit, count * (self.rank + 1) // self.ranks * unit
        raise UnsupportedModel(
            f"{self.family}: a feed-forward {width} wide cannot be shared by {self.ranks} devices: name fewer with --d"
        )


def _widths(feed: FeedForward) -> list[tuple[str, int]]:
    match feed:
        case Dense(width=width):
            return [("", width)]
        case Mixture(width=width, shared_width=None):
            return [("experts.", width)]
        case Mixture(width=width, shared_width=int(shared)):
            return [("experts.", width), ("shared_", shared)]
        case _:
            raise AssertionError("a feed-forward that spec.py has and this does not")


def _down_names(at: str, kind: str, feed: FeedForward) -> list[str]:
    if kind == "experts." and isinstance(feed, Mixture):
        return [f"{at}experts.{expert}.down" for expert in range(feed.experts)]
    return [f"{at}{kind}down"]


def _shard(whole: ModelSpec, widths: Widths) -> ModelSpec:
    check_heads(whole, widths.ranks)
    return replace(whole, layers=tuple(_shard_layer(layer, widths) for layer in whole.layers))


def _shard_layer(layer: Layer, widths: Widths) -> Layer:
    a, ranks = layer.attention, widths.ranks
    attention = replace(a, heads=a.heads // ranks, kv_heads=max(1, a.kv_heads // ranks))
    return replace(layer, attention=attention, feed_forward=_shard_feed(layer.feed_forward, widths))


def _heads_divide(a: Attention, ranks: int) -> bool:
    """Whether each rank can have as many heads, and key/value heads of their own or one that several ranks keep."""
    return a.heads % ranks == 0 and (a.kv_heads % ranks == 0 or ranks % a.kv_heads == 0)


def _shard_feed(feed: FeedForward, widths: Widths) -> FeedForward:
    mine = {kind: stop - start for kind, width in _widths(feed) for start, stop in [widths.part(kind, width)]}
    match feed:
        case Dense():
            return replace(feed, width=mine[""])
        case Mixture():
            return replace(feed, width=mine["experts."], shared_width=mine.get("shared_"))


def _layer_cuts(whole: Layer, part: Layer, widths: Widths) -> dict[str, Cut]:
    """Canonical name within the layer -> what the rank has of it; what is not here it has whole."""
    a, rank, size = whole.attention, widths.rank, whole.attention.head_size
    queries = (rank * part.attention.heads * size, (rank + 1) * part.attention.heads * size)
    head = rank * a.kv_heads // widths.ranks             # the first key/value head of the rank
    keys = (head * size, (head + part.attention.kv_heads) * size)
    cuts = {name: Cut(False, *queries) for name in ("query", "query_bias")}
    cuts |= {name: Cut(False, *keys) for name in ("key", "key_bias", "value", "value_bias")}
    cuts["attention_output"] = Cut(True, *queries)
    for kind, width in _widths(whole.feed_forward):
        mine = widths.part(kind, width)
        cuts |= {f"{kind}gate": Cut(False, *mine), f"{kind}up": Cut(False, *mine), f"{kind}down": Cut(True, *mine)}
    return cuts


# ---- how to cut -------------------------------------------------------------------------------------------------------


def _zeros_like(tensor: RawTensor) -> RawTensor:
    zeros = np.zeros(int(np.prod(tensor.shape)) * STORAGE["F32"].bytes, np.uint8)
    return RawTensor(tensor.name, tensor.shape, STORAGE["F32"], zeros, tensor.file)


def _rows(tensor: RawTensor, name: str, cut: Cut) -> RawTensor:
    if len(tensor.shape) > 1:
        return Part(tensor.name, cut.start, cut.stop - cut.start).of(tensor, name)
    storage, data = tensor.storage, tensor.data
    if storage.quantized:
        storage, data = STORAGE["F32"], to_float32(tensor).view(np.uint8)
    data = data[cut.start * storage.bytes : cut.stop * storage.bytes]
    return RawTensor(tensor.name, (cut.stop - cut.start,), storage, data, tensor.file)


def _within_blocks(tensor: RawTensor, cut: Cut) -> bool:
    block = tensor.storage.block
    return bool(cut.start % block or cut.stop % block)


def _columns(tensor: RawTensor, cut: Cut) -> RawTensor:
    """Columns of a matrix: the file's own blocks; where the cut is within blocks, bfloat16 of the weights that they mean."""
    storage, rows = tensor.storage, tensor.rows
    first, last = cut.start // storage.block, -(-cut.stop // storage.block)
    bytes_of_rows = tensor.data.reshape(rows, tensor.row_bytes)[:, first * storage.bytes : last * storage.bytes]
    shape = (rows, cut.stop - cut.start)
    if first * storage.block == cut.start and last * storage.block == cut.stop:
        data = np.ascontiguousarray(bytes_of_rows).reshape(-1)
        return RawTensor(tensor.name, shape, storage, data, tensor.file)
    covered, skipped = (last - first) * storage.block, cut.start - first * storage.block
    widened = np.empty(shape, np.uint16)
    step = max(1, WIDENED_VALUES // covered)
    for row in range(0, rows, step):
        some = np.ascontiguousarray(bytes_of_rows[row : row + step])
        values = to_float32(RawTensor(tensor.name, (len(some), covered), storage, some.reshape(-1), tensor.file))
        widened[row : row + step] = to_bfloat16(values[:, skipped : skipped + shape[1]])
    return RawTensor(tensor.name, shape, STORAGE["BF16"], widened.reshape(-1).view(np.uint8), tensor.file)
