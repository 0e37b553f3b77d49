"""One model over several ranks: which part of every tensor a rank has, and the spec of a model of just these parts.

A rank has some heads, and some of the width of every feed-forward, each expert's too, so that the ranks' branches add up to
the whole branch. Widths are cut where blocks or groups of quantized weights end, if need be into parts that are not equal:
the bits stay the file's. Embedding, norms and routers are whole everywhere; the output matrix only where tokens are drawn.
rank.py loads through it; the graph knows nothing of it, except that it sums branches.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import lcm, prod

import numpy as np
from numpy.typing import NDArray

from engine.errors import BadModelFile, UnsupportedModel
from engine.model.spec import Attention, Dense, FeedForward, Layer, Mixture, ModelSpec
from engine.weights.tensors import STORAGE, Part, RawTensor, TensorSource, to_float32

__all__ = ["ShardedSource", "check_heads"]

log = logging.getLogger("rillet")
NEAT = (32, 8, 1)                # multiples that a part's width should have, best first
WIDENED_WEIGHTS = 1 << 24        # that exist as float32 at a time
BIAS_OF_SUM = ".attention_output_bias"


@dataclass(frozen=True, slots=True)
class Cut:
    """start : stop of a tensor's rows (or of a vector), or of its columns."""

    start: int
    stop: int
    columns: bool = False


class ShardedSource:
    """A TensorSource of one rank's parts, in the shapes of `spec`, the model of this rank."""

    def __init__(self, source: TensorSource, whole: ModelSpec, rank: int, ranks: int, *, floats: str = "BF16") -> None:
        """whole: the model of `source`. floats: the storage type (BF16, F32) of what must be cut within blocks.

        Raises UnsupportedModel if the model cannot be cut for so many ranks.
        """
        assert 0 <= rank < ranks
        check_heads(whole, ranks)
        self.source, self.rank, self.floats = source, rank, floats
        self.shapes = whole.shapes()
        widths = Widths(source, whole, rank, ranks)
        layers = [shard_layer(layer, widths) for layer in whole.layers]
        self.spec = replace(whole, layers=tuple(layers), tied_output=whole.tied_output or rank > 0)
        self.cuts = [cuts_of(layer, part, widths) for layer, part in zip(whole.layers, layers, strict=True)]
        if rank == 0:
            self._tell_widened(ranks)

    def names(self) -> list[str]:
        return list(self.source.names())

    def tensor(self, name: str) -> RawTensor:
        """The part of this rank: a view where it is rows, a copy where it is columns. KeyError, BadModelFile."""
        tensor = self.source.tensor(name)
        if tensor.shape != self.shapes.get(name, tensor.shape):
            message = f"its shape is {tensor.shape}, the model wants {self.shapes[name]}: download the file again"
            raise BadModelFile(message, file=tensor.file, tensor=name)
        if name.endswith(BIAS_OF_SUM) and self.rank > 0:                  # it must be added once
            zeros = np.zeros(prod(tensor.shape), np.float32).view(np.uint8)
            return replace(tensor, storage=STORAGE["F32"], data=zeros)
        cut = self._cut(name)
        if cut is None:
            return tensor
        return columns_of(tensor, cut, self.floats) if cut.columns else rows_of(tensor, name, cut)

    def release(self, name: str) -> None:
        self.source.release(name)

    def _cut(self, name: str) -> Cut | None:
        head, _, rest = name.partition(".")
        number, _, part = rest.partition(".")
        if head != "layers":
            return None
        kind, _, _ = part.partition(".")
        return self.cuts[int(number)].get(f"experts.{part.rpartition('.')[2]}" if kind == "experts" else part)

    def _tell_widened(self, ranks: int) -> None:
        """One line about matrices that are cut within blocks: what they take more on all ranks together."""
        more, kinds, item = 0, set(), STORAGE[self.floats].bytes
        for name in self.source.names():
            cut = self._cut(name)
            if cut is not None and cut.columns:
                tensor = self.source.tensor(name)
                if within_blocks(tensor, cut):
                    kinds.add(f"{name.rpartition('.')[2]} ({tensor.storage.name})")
                    more += item * prod(tensor.shape) - bytes_in_file(tensor)
        if kinds:
            listed = ", ".join(sorted(kinds))
            log.info("cut for %d ranks, %s rest as %s: %.0f MB more", ranks, listed, self.floats, more / 1e6)


# ---- where to cut -----------------------------------------------------------------------------------------------------


def check_heads(whole: ModelSpec, ranks: int) -> None:
    """Raise UnsupportedModel if so many ranks cannot share every layer's heads evenly; it says how many could."""
    for layer in whole.layers:
        a = layer.attention
        if not heads_divide(a, ranks):
            possible = ", ".join(str(n) for n in range(1, min(a.heads, 64) + 1) if heads_divide(a, n))
            raise UnsupportedModel(
                f"{whole.family}: {a.heads} heads with {a.kv_heads} key/value heads cannot be shared by {ranks} ranks: name "
                f"as many as one of {possible} with --d"
            )


def heads_divide(a: Attention, ranks: int) -> bool:
    """Whether each rank has as many heads, and key/value heads of its own, or one that several ranks keep."""
    return a.heads % ranks == 0 and (a.kv_heads % ranks == 0 or ranks % a.kv_heads == 0)


class Widths:
    """Where feed-forwards are cut: the same in all layers of one kind. It follows from the checkpoint, so ranks agree."""

    def __init__(self, source: TensorSource, whole: ModelSpec, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.family = rank, ranks, whole.family
        self.blocks: dict[tuple[str, int], int] = {}     # (kind, width) -> weights in a block, of all its `down`
        there = set(source.names())                      # what is missing is the loader's to say
        for number, layer in enumerate(whole.layers):
            for kind, width in widths_of(layer.feed_forward):
                for name in downs(f"layers.{number}.", kind, layer.feed_forward):
                    if name in there:
                        block = source.tensor(name).storage.block
                        self.blocks[kind, width] = lcm(block, self.blocks.get((kind, width), 1))

    def part(self, kind: str, width: int) -> tuple[int, int]:
        """start, stop: whole blocks if there are enough. Later ranks have the larger parts, since the first one draws."""
        block = self.blocks.get((kind, width), 1)
        for unit in (*(lcm(block, neat) for neat in NEAT), *NEAT):
            units, rest = divmod(width, unit)
            if rest == 0 and units >= self.ranks:
                return units * self.rank // self.ranks * unit, units * (self.rank + 1) // self.ranks * unit
        raise UnsupportedModel(
            f"{self.family}: a feed-forward {width} wide cannot be shared by {self.ranks} ranks: name fewer with --d"
        )


def widths_of(feed: FeedForward) -> Iterator[tuple[str, int]]:
    """Each gated feed-forward in it: how its tensors' names begin, and its width."""
    match feed:
        case Dense(width=width):
            yield "", width
        case Mixture(width=width, shared_width=shared):
            yield "experts.", width
            if shared is not None:
                yield "shared_", shared


def downs(at: str, kind: str, feed: FeedForward) -> list[str]:
    if kind == "experts." and isinstance(feed, Mixture):
        return [f"{at}experts.{expert}.down" for expert in range(feed.experts)]
    return [f"{at}{kind}down"]


def shard_layer(layer: Layer, widths: Widths) -> Layer:
    a, ranks = layer.attention, widths.ranks
    attention = replace(a, heads=a.heads // ranks, kv_heads=max(1, a.kv_heads // ranks))
    mine = {kind: stop - start for kind, width in widths_of(layer.feed_forward) for start, stop in [widths.part(kind, width)]}
    match layer.feed_forward:
        case Dense() as dense:
            feed: FeedForward = replace(dense, width=mine[""])
        case Mixture() as mixture:
            feed = replace(mixture, width=mine["experts."], shared_width=mine.get("shared_"))
    return replace(layer, attention=attention, feed_forward=feed)


def cuts_of(layer: Layer, part: Layer, widths: Widths) -> dict[str, Cut]:
    """Name within the layer, experts without their numbers -> what the rank has of it; what is not here it has whole."""
    a, mine, size, rank = layer.attention, part.attention, layer.attention.head_size, widths.rank
    heads = rank * mine.heads * size, (rank + 1) * mine.heads * size
    first = rank * a.kv_heads // widths.ranks            # of the rank's key/value heads
    keys = first * size, (first + mine.kv_heads) * size
    cuts = {name: Cut(*heads) for name in ("query", "query_bias")}
    cuts |= {name: Cut(*keys) for name in ("key", "key_bias", "value", "value_bias")}
    cuts["attention_output"] = Cut(*heads, columns=True)
    for kind, width in widths_of(layer.feed_forward):
        at = widths.part(kind, width)
        cuts |= {f"{kind}gate": Cut(*at), f"{kind}up": Cut(*at), f"{kind}down": Cut(*at, columns=True)}
    return cuts


# ---- how to cut -------------------------------------------------------------------------------------------------------


def rows_of(tensor: RawTensor, name: str, cut: Cut) -> RawTensor:
    """Rows of a matrix or entries of a vector, a view of the file's bytes."""
    if len(tensor.shape) > 1:
        return Part(tensor.name, cut.start, cut.stop - cut.start).of(tensor, name)
    storage, data = tensor.storage, tensor.data
    if storage.quantized:                                # no file has such vectors; one that has is not cut by bytes
        storage, data = STORAGE["F32"], to_float32(tensor).view(np.uint8)
    data = data[cut.start * storage.bytes : cut.stop * storage.bytes]
    return RawTensor(tensor.name, (cut.stop - cut.start,), storage, data, tensor.file)


def columns_of(tensor: RawTensor, cut: Cut, floats: str) -> RawTensor:
    """Columns of a matrix: the file's own blocks; where the cut is within blocks, the weights that they mean as `floats`."""
    block = tensor.storage.block
    first, last = cut.start // block, -(-cut.stop // block)
    if not within_blocks(tensor, cut):
        return blocks_of(tensor, first, last)
    shape, skipped = (tensor.rows, cut.stop - cut.start), cut.start - first * block
    storage = STORAGE[floats]
    widened = np.empty((tensor.rows, shape[1] * storage.bytes), np.uint8)
    step = max(1, WIDENED_WEIGHTS // ((last - first) * block))
    for start in range(0, tensor.rows, step):
        some = Part(tensor.name, start, min(step, tensor.rows - start)).of(tensor, tensor.name)
        with np.errstate(over="ignore", invalid="ignore"):               # a scale may be infinite: so are its weights then
            values = to_float32(blocks_of(some, first, last))[:, skipped : skipped + shape[1]]
        widened[start : start + step] = bytes_of(values, floats)
    return RawTensor(tensor.name, shape, storage, widened.reshape(-1), tensor.file)


def within_blocks(tensor: RawTensor, cut: Cut) -> bool:
    return bool(cut.start % tensor.storage.block or cut.stop % tensor.storage.block)


def blocks_of(tensor: RawTensor, first: int, last: int) -> RawTensor:
    """Blocks first : last of each row, with the scales that belong to them."""
    storage, rows = tensor.storage, tensor.rows
    data = tensor.data.reshape(rows, tensor.row_bytes)[:, first * storage.bytes : last * storage.bytes]
    beside = tuple(blocks_of(each, first, last) for each in tensor.beside)           # one scale for each group, a block
    shape = (rows, (last - first) * storage.block)
    return RawTensor(tensor.name, shape, storage, np.ascontiguousarray(data).reshape(-1), tensor.file, beside)


def bytes_of(values: NDArray[np.float32], floats: str) -> NDArray[np.uint8]:
    """float32 as it is, or as bfloat16, rounded to the nearest, ties to even: (rows, bytes)."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    if floats == "F32":
        return bits.view(np.uint8)
    assert floats == "BF16", floats
    up = (bits >> 16 & 1) + np.uint32(0x7FFF)
    rounded = np.where(np.isnan(values), bits | 0x400000, bits + up)
    return (rounded >> 16).astype(np.uint16).view(np.uint8)


def bytes_in_file(tensor: RawTensor) -> int:
    return tensor.data.nbytes + sum(each.data.nbytes for each in tensor.beside)
