"""Which models kernels/forward.py serves, and its arguments. model.py asks for a Fused and calls run() where there is one.

That is every dense model whose matrices are quantized, on a machine with byte products: Llama, Mistral, Qwen2, Qwen3. The
others (experts, norms behind the branches, dense matrices, layers of unlike attention) go through model.py's own loop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.cpu.kernels.forward import (
    ATTENTION_OUTPUT,
    DOWN,
    GATE,
    QUERY,
    SLOTS,
    STEP,
    UP,
    attention_function,
    forward,
    stages_function,
)
from backends.cpu.kernels.integer import MATRIX
from backends.cpu.kernels.jit import LANES
from backends.cpu.kernels.stages import NAP
from backends.cpu.matrices import Planes
from backends.cpu.ops import Cache, Ops, Rows, StepShape
from backends.cpu.weights import DenseWeights, LayerWeights, Stack
from engine.model.spec import Attention, Dense, Layer, ModelSpec

__all__ = ["Fused"]

FloatArray = NDArray[np.float32]
KEPT = (
    "keys", "values", "x", "normed", "normed_groups", "qkv", "mixed", "mixed_groups", "gated", "gated_groups",
)  # fmt: skip
STRIDES = {
    "low": "low_stride", "high": "high_stride", "scale": "scale_stride", "minimum": "minimum_stride", "fine": "fine_stride",
    "fine_minimum": "fine_stride",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fused:
    """All layers of a model as arrays. `matrices` points into the weights: it must not outlive them."""

    matrices: NDArray[np.void]      # (layers, SLOTS)
    norms: FloatArray               # (layers, 2, D)
    biases: FloatArray              # (layers, columns of qkv or 0)
    head_norms: FloatArray          # (layers, 2, head size or 0)
    windows: NDArray[np.int64]
    attention: Attention            # of all layers, but for the window
    width: int                      # of the feed-forward
    step: NDArray[np.void]          # (1,) of STEP: what is the same in every step is filled in
    kept: list[NDArray[Any]]        # the arrays of the step before that are mostly the same, whose addresses are filled in

    @classmethod
    def of(cls, spec: ModelSpec, layers: tuple[LayerWeights, ...], ops: Ops) -> "Fused | None":
        """None where the model is not of the kind."""
        first, feed = spec.layers[0].attention, spec.layers[0].feed_forward
        if not (ops.integer and isinstance(feed, Dense)):
            return None
        rows = []
        for layer, w in zip(spec.layers, layers, strict=True):
            if not same_kind(layer.attention, first) or layer.feed_forward != feed or not served(layer, w):
                return None
            assert isinstance(w.feed, DenseWeights)
            row = np.zeros(SLOTS, MATRIX)
            place(row, QUERY, w.qkv)
            place(row, ATTENTION_OUTPUT, w.attention_output)
            place_halves(row, w.feed.gate_up, feed.width)
            place(row, DOWN, w.feed.down)
            rows.append(row)
        matrices = np.stack(rows)
        norms = np.stack([(w.attention_norm, w.feed_norm) for w in layers])
        biases = np.stack([w.qkv_bias for w in layers])
        head_norms = np.stack([(w.query_norm, w.key_norm) for w in layers])
        windows = np.array([layer.attention.sliding_window or 0 for layer in spec.layers], np.int64)
        step = np.zeros(1, STEP)
        for name, array in (
            ("matrices", matrices), ("norms", norms), ("biases", biases), ("head_norms", head_norms), ("windows", windows),
        ):  # fmt: skip
            step[name] = array.ctypes.data
        for name, number in (
            ("nap", NAP), ("stages", stages_function().address), ("layers", len(layers)), ("hidden", spec.hidden_size),
            ("width", feed.width),
            ("heads", first.heads), ("kv_heads", first.kv_heads), ("head_size", first.head_size), ("page_tokens", LANES),
            ("bias_columns", biases.shape[1]), ("norm_size", head_norms.shape[2]), ("is_silu", feed.activation == "silu"),
            ("interleaved", first.rope.interleaved), ("epsilon", ops.epsilon), ("scale", first.scale),
            ("cap", first.soft_cap or 0),
        ):  # fmt: skip
            step[name] = number
        return cls(matrices, norms, biases, head_norms, windows, first, feed.width, step, [])

    def run(self, ops: Ops, x: Rows, cache: Cache, at: StepShape, launching: Callable[[], None]) -> None:
        """All layers, on x in place. launching: see Model.forward."""
        a = self.attention
        normed = ops.rows("rms_norm", x.tokens, x.values.shape[1])
        qkv = ops.rows("qkv", x.tokens, (a.heads + 2 * a.kv_heads) * a.head_size)
        mixed = ops.rows("attention", x.tokens, a.heads * a.head_size)
        gated = ops.rows("gated", x.tokens, self.width)
        step = self.step
        kept = [
            cache.keys, cache.values, x.values, normed.values, normed.groups, qkv.values, mixed.values, mixed.groups,
            gated.values, gated.groups,
        ]  # fmt: skip
        if len(self.kept) != len(kept) or any(new is not old for new, old in zip(kept, self.kept, strict=True)):
            assert all(array.flags.c_contiguous for array in kept)
            for name, array in zip(KEPT, kept, strict=True):
                step[name] = array.ctypes.data
            step["attention"], step["pages"] = attention_function().address, len(cache.keys)
            step["room"] = min(len(rows.values) for rows in (x, normed, mixed, gated))
            self.kept[:] = kept
        for name, number in at.described:
            step[name] = number
        launching()
        forward(step, ops.workers)

    def warm_up(self, ops: Ops) -> None:
        """Compile all but attention, by a step of no layers."""
        step = self.step.copy()
        step["layers"] = 0
        forward(step, ops.workers)


def same_kind(one: Attention, other: Attention) -> bool:
    def shape(a: Attention) -> tuple[Any, ...]:
        return a.heads, a.kv_heads, a.head_size, a.scale, a.soft_cap, a.rope

    return shape(one) == shape(other)


def served(layer: Layer, w: LayerWeights) -> bool:
    """Whether the layer is all planes, without what the kernel leaves out."""
    if layer.post_norms or len(w.attention_output_bias) or not isinstance(w.feed, DenseWeights):
        return False
    a = layer.attention
    stacks = (w.qkv, w.attention_output, w.feed.gate_up, w.feed.down)
    single = len(w.attention_output.matrices) == len(w.feed.down.matrices) == 1
    whole = a.heads // a.kv_heads * a.head_size % LANES == 0       # attention prepares its own result
    return single and whole and all(isinstance(matrix, Planes) for stack in stacks for matrix in stack.matrices)


def place(row: NDArray[np.void], slot: int, stack: Stack) -> None:
    for matrix in stack.matrices:
        assert isinstance(matrix, Planes)
        row[slot] = matrix.described[0]
        slot += 1


def place_halves(row: NDArray[np.void], stack: Stack, width: int) -> None:
    """Gate and up, which lie in one matrix if they are of one type."""
    place(row, GATE, stack)
    if len(stack.matrices) == 1:
        blocks = width // LANES                   # down is quantized, so that the width is a multiple of 32
        row[UP] = row[GATE]
        for name, stride in STRIDES.items():
            row[UP][name] += blocks * row[GATE][stride]
        row[GATE]["rows"] = row[UP]["rows"] = width
        row[GATE]["blocks"] = row[UP]["blocks"] = blocks
