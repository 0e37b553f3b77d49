"""The operations of a forward pass, under the names that papers use. model.py calls them; they call the kernels.

Rows are the activations of a step: values and, for the quantized kernels, what groups.py prepares. The arrays come
from a workspace that is kept from step to step and has room for a whole tile of tokens.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from backends.cpu.kernels import attention, elementwise, grids, integer, linear, planes
from backends.cpu.kernels.groups import SPAN, Groups, make_groups, prepare_rows
from backends.cpu.kernels.position import rotate_and_write
from backends.cpu.kernels.vectors import has_byte_products
from backends.cpu.matrices import DenseMatrix, Grid, Matrix, Planes
from backends.cpu.weights import LayerWeights, Stack
from engine.model.spec import Activation, Attention

__all__ = ["Cache", "Ops", "Rows", "StepShape"]

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Rows:
    """Activations: the first `tokens` rows of values count, the rest is room for a whole tile."""

    values: FloatArray     # (T rounded up, columns)
    groups: Groups         # see groups.py: digits where the machine multiplies bytes, else sums
    tokens: int


@dataclass(frozen=True, slots=True)
class Cache:
    """The one page pool, all layers of a page together."""

    keys: FloatArray       # (pages, layers, kv heads, head size, page tokens)
    values: FloatArray     # (pages, layers, kv heads, page tokens, head size)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy(self, copies: IntArray) -> None:
        """Copy pages (source, target), in order."""
        for source, target in copies:
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]


@dataclass(frozen=True, slots=True)
class StepShape:
    """Where a step's tokens stand: rotation, slots and blocks of queries, the same for every layer with the same rope.

    All arrays are contiguous.
    """

    slots: NDArray[np.int64]      # (T,)
    blocks: IntArray              # (blocks, 4), see attention.attend
    tables: IntArray              # (B, W)
    cosine: FloatArray            # (T, rotary_size / 2)
    sine: FloatArray
    described: tuple[tuple[str, int], ...] = field(init=False)      # the fields of forward.STEP that say this

    def __post_init__(self) -> None:
        addresses = [(name, getattr(self, name).ctypes.data) for name in ("cosine", "sine", "slots", "blocks", "tables")]
        assert all(getattr(self, name).flags.c_contiguous for name, _ in addresses)
        rows, width = self.tables.shape
        sizes = ("tokens", len(self.slots)), ("block_count", len(self.blocks)), ("table_rows", rows), ("table_width", width)
        object.__setattr__(self, "described", (*addresses, *sizes, ("rotary_half", self.cosine.shape[1])))


class Ops:
    """Operations and the memory that they write to. A result is valid until the operation of the same name runs again."""

    def __init__(self, workers: int, epsilon: float, *, integer: bool | None = None) -> None:
        """integer: whether quantized products are of integers; None: if this machine has the instructions."""
        self.workers = workers
        self.integer = has_byte_products() if integer is None else integer
        self.epsilon = np.float32(epsilon)
        self.workspace: dict[str, Rows] = {}

    @property
    def nbytes(self) -> int:
        return sum(rows.values.nbytes + rows.groups.nbytes for rows in self.workspace.values())

    def rows(self, name: str, tokens: int, columns: int) -> Rows:
        """Rows of the workspace, at least as many as asked for; made anew when they are too small."""
        rows = self.workspace.get(name)
        if rows is None or len(rows.values) < tokens or rows.values.shape[1] != columns:
            room = -(-tokens // integer.TILE) * integer.TILE
            rows = Rows(np.zeros((room, columns), np.float32), make_groups(room, columns, integer=self.integer), tokens)
        if rows.tokens != tokens:
            rows = Rows(rows.values, rows.groups, tokens)
        self.workspace[name] = rows
        return rows

    def embed(self, tokens: IntArray, matrix: Matrix, columns: int) -> Rows:
        out = self.rows("embed", len(tokens), columns)
        out.values[: len(tokens)] = matrix.take(tokens)
        return out

    def rms_norm(self, x: Rows, weight: FloatArray, name: str = "rms_norm") -> Rows:
        out = self.rows(name, x.tokens, x.values.shape[1])
        elementwise.rms_norm(x.values, weight, self.epsilon, out.values, out.groups, x.tokens)
        return out

    def linear(self, x: Rows, stack: Stack, name: str) -> Rows:
        out = self.rows(name, x.tokens, stack.rows)
        self.apply(x, stack, out, add=False)
        return out

    def add_linear(self, total: Rows, x: Rows, stack: Stack, bias: FloatArray) -> None:
        """total += x W^T + bias"""
        self.apply(x, stack, total, add=True)
        if len(bias):
            self.add_bias(total, bias)

    def add_bias(self, x: Rows, bias: FloatArray) -> None:
        elementwise.add_bias(x.values, bias, x.tokens)

    def add(self, total: Rows, branch: Rows) -> None:
        elementwise.add_rows(total.values, branch.values, total.tokens)

    def apply(self, x: Rows, stack: Stack, out: Rows, *, add: bool) -> None:
        first = 0
        for matrix in stack.matrices:
            apply_matrix(x, matrix, out.values, first, add=add, workers=self.workers)
            first += matrix.rows

    def gated(self, gate_up: Rows, activation: Activation, name: str = "gated") -> Rows:
        """activation(gate) * up"""
        out = self.rows(name, gate_up.tokens, gate_up.values.shape[1] // 2)
        elementwise.gated(gate_up.values, activation == "silu", out.values, out.groups, out.tokens)
        return out

    def rotate(self, qkv: Rows, layer: int, spec: Attention, weights: LayerWeights, cache: Cache, at: StepShape) -> None:
        """Biases, q/k norm and rope, in place; keys and values into their pages."""
        rotate_and_write(
            qkv.values, weights.qkv_bias, weights.query_norm, weights.key_norm, self.epsilon, at.cosine, at.sine,
            spec.rope.interleaved, at.slots, cache.keys, cache.values, layer,
        )  # fmt: skip

    def attend(self, qkv: Rows, layer: int, spec: Attention, cache: Cache, at: StepShape) -> Rows:
        """softmax(scale q k) v over the pages, (T, H hs)."""
        out = self.rows("attention", qkv.tokens, spec.heads * spec.head_size)
        attention.attend(
            qkv.values, cache.keys, cache.values, layer, at.blocks, at.tables, np.float32(spec.scale),
            spec.sliding_window or 0, np.float32(spec.soft_cap or 0), self.workers, out.values, out.groups,
        )  # fmt: skip
        if spec.heads // spec.kv_heads * spec.head_size % SPAN:
            prepare_rows(out.values, out.groups, out.tokens)
        return out


def apply_matrix(x: Rows, matrix: Matrix, out: FloatArray, first: int, *, add: bool, workers: int) -> None:
    """Write (or add) x W^T to the columns of `out` from `first` on."""
    match matrix:
        case Planes() if x.groups.ndim == 3:
            integer.products(matrix.described, 0, x.groups, out, first, add, x.tokens, workers)
        case Planes(rows=rows, low=words, scale=scale, minimum=minimum) if matrix.plain:
            linear.lanes(x.values, x.groups, words, scale, minimum, rows, out, first, add, x.tokens)
        case Planes():
            m = matrix
            planes.planes(
                x.values, x.groups, m.low, m.low_bits, m.high, m.high_bits, m.codebook, m.scale, m.minimum,
                np.float32(m.factor), m.fine, m.fine_minimum, m.group, m.rows, out, first, add, x.tokens,
            )  # fmt: skip
        case Grid(rows=rows, kind=kind, blocks=blocks, storage=storage):
            grids.grids(x.values, kind, blocks, storage.bytes, rows, out, first, add, x.tokens)
        case DenseMatrix(rows=rows, weight=weight):
            linear.dense(x.values, weight, rows, out, first, add, x.tokens)
