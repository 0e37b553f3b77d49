"""The forward pass: one loop that reads like the paper, for every family. runner.py calls it on the compute thread.

A Model knows spec, weights and cache; it knows neither tickets nor sampling. What layers have in common in a step (slots,
rotations, blocks of queries) is made once, before the loop.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from backends.cpu import mixture
from backends.cpu.fused import Fused
from backends.cpu.ops import Cache, Ops, Rows, StepShape
from backends.cpu.rope import Rotation
from backends.cpu.weights import DenseWeights, LayerWeights, MixtureWeights, ModelWeights, Stack
from engine.errors import UnsupportedModel
from engine.model.spec import Dense, Layer, Mixture, ModelSpec, Rope
from engine.step import IntArray, StepInput

__all__ = ["PAGE_TOKENS", "Model", "Shapes", "make_cache", "page_bytes", "refuse_unsupported", "step_shape"]

PAGE_TOKENS = 32
Shapes = Mapping[Rope, StepShape]
QUERY_LINES = 32    # lines (queries x heads of a group) that a block of queries aims at


class Model:
    """A loaded model: give it a step, get the states of its tokens; give it states, get logits."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, workers: int) -> None:
        self.spec, self.weights = spec, weights
        self.ops = Ops(workers, spec.norm_epsilon)
        self.rotations = {layer.attention.rope: Rotation.of(layer.attention.rope) for layer in spec.layers}
        self.output = Stack(weights.output.rows, (weights.output,))
        self.fused = Fused.of(spec, weights.layers, self.ops)

    def forward(
        self, tokens: IntArray, shapes: Shapes, cache: Cache, launching: Callable[[], None] = lambda: None
    ) -> Rows:
        """States of all tokens before the last norm, (T, D). tokens: the step's, with no reference left. launching is called
        when what is left is long and does without Python's lock."""
        ops = self.ops
        x = ops.embed(tokens, self.weights.embedding, self.spec.hidden_size)                      # (T, D)
        if self.fused is not None:
            self.fused.run(ops, x, cache, shapes[self.fused.attention.rope], launching)
            return x
        launching()
        for number, (layer, w) in enumerate(zip(self.spec.layers, self.weights.layers, strict=True)):
            qkv = ops.linear(ops.rms_norm(x, w.attention_norm), w.qkv, "qkv")                     # (T, (H + 2 KV) hs)
            shape = shapes[layer.attention.rope]
            ops.rotate(qkv, number, layer.attention, w, cache, shape)
            mixed = ops.attend(qkv, number, layer.attention, cache, shape)                        # (T, H hs)
            self.join(x, mixed, w.attention_output, w.attention_output_bias, w.attention_post_norm)
            self.feed(x, ops.rms_norm(x, w.feed_norm), layer, w)
        return x

    def feed(self, x: Rows, normed: Rows, layer: Layer, w: LayerWeights) -> None:
        """x += the layer's feed-forward, dense or mixture."""
        match layer.feed_forward, w.feed:
            case Dense(activation=activation), DenseWeights():
                gate_up = self.ops.linear(normed, w.feed.gate_up, "gate_up")                      # (T, 2 F)
                self.join(x, self.ops.gated(gate_up, activation), w.feed.down, NOTHING, w.feed_post_norm)
            case Mixture() as spec, MixtureWeights():
                mixed = mixture.feed(self.ops, normed, spec, w.feed)                              # (T, D)
                self.ops.add(x, self.ops.rms_norm(mixed, w.feed_post_norm) if layer.post_norms else mixed)
            case _:
                raise AssertionError("the loader makes the weights from the spec")

    def join(self, x: Rows, branch: Rows, stack: Stack, bias: NDArray[np.float32], post_norm: NDArray[np.float32]) -> None:
        """x += branch W^T + bias, normed before it is added where the layer has post norms."""
        if not len(post_norm):
            self.ops.add_linear(x, branch, stack, bias)
            return
        projected = self.ops.linear(branch, stack, "projected")
        if len(bias):
            self.ops.add_bias(projected, bias)
        self.ops.add(x, self.ops.rms_norm(projected, post_norm))

    def final_states(self, x: Rows, at: NDArray[np.intp]) -> Rows:
        """The last norm of some of the tokens, (len(at), D)."""
        chosen = self.ops.rows("chosen", len(at), x.values.shape[1])
        np.take(x.values, at, axis=0, out=chosen.values[: len(at)])
        return self.ops.rms_norm(chosen, self.weights.norm, "final")

    def logits(self, states: Rows) -> NDArray[np.float32]:
        """(S, V), valid until the next call."""
        return self.ops.linear(states, self.output, "logits").values[: states.tokens]

    def shapes(self, step: StepInput) -> Shapes:
        """What the layers of each rope share in this step. It may be asked on any thread."""
        return {rope: step_shape(self.spec, step, rotation) for rope, rotation in self.rotations.items()}

    def warm_up(self, step: StepInput, cache: Cache) -> None:
        """Compile what the layers have, on a step of one token, beside attention."""
        x = self.ops.embed(np.zeros(1, np.int32), self.weights.embedding, self.spec.hidden_size)
        if self.fused is not None:
            self.fused.warm_up(self.ops)
            self.logits(self.final_states(x, np.zeros(1, np.intp)))
            return
        first, attention = self.weights.layers[0], self.spec.layers[0].attention
        qkv = self.ops.linear(self.ops.rms_norm(x, first.attention_norm), first.qkv, "qkv")
        self.ops.rotate(qkv, 0, attention, first, cache, self.shapes(step)[attention.rope])
        self.feed(x, self.ops.rms_norm(x, first.feed_norm), self.spec.layers[0], first)
        self.logits(self.final_states(x, np.zeros(1, np.intp)))


def step_shape(spec: ModelSpec, step: StepInput, rotation: Rotation) -> StepShape:
    cosine, sine = rotation.at(step.positions)
    tables = np.ascontiguousarray(step.page_tables)
    return StepShape(step.slots.astype(np.int64), query_blocks(spec, step), tables, cosine, sine)


NOTHING = np.empty(0, np.float32)


def query_blocks(spec: ModelSpec, step: StepInput) -> IntArray:
    """Cut each row's queries into blocks for attention, the costly ones first so that the threads end together."""
    attention = spec.layers[0].attention
    size = max(1, QUERY_LINES // (attention.heads // attention.kv_heads))
    blocks = []
    for row, (start, end) in enumerate(zip(step.row_starts[:-1].tolist(), step.row_starts[1:].tolist(), strict=True)):
        before = int(step.kv_lengths[row]) - (end - start)
        blocks += [(at, min(size, end - at), row, before + at - start + 1) for at in range(start, end, size)]
    blocks.sort(key=lambda block: block[1] * (block[3] + block[1]), reverse=True)
    return np.array(blocks, np.int32).reshape(-1, 4)


def refuse_unsupported(spec: ModelSpec) -> None:
    """Raise UnsupportedModel for what this backend does not have, before any memory is taken."""
    first = spec.layers[0].attention
    for number, layer in enumerate(spec.layers):
        a = layer.attention
        if (a.heads, a.kv_heads, a.head_size) != (first.heads, first.kv_heads, first.head_size):
            raise UnsupportedModel(
                f"{spec.family}: layer {number} has other attention heads than layer 0, which the cpu backend's pages "
                "cannot hold: choose another model"
            )
        if a.head_size % 4 or a.head_size > 512:
            raise UnsupportedModel(
                f"{spec.family}: head size {a.head_size} is not a multiple of 4 up to 512, which the cpu backend wants"
            )


def page_bytes(spec: ModelSpec) -> int:
    a = spec.layers[0].attention
    return 2 * 4 * len(spec.layers) * a.kv_heads * a.head_size * PAGE_TOKENS


def make_cache(spec: ModelSpec, pages: int) -> Cache:
    """A pool of zeroed pages; the operating system gives memory to a page when it is first written."""
    a = spec.layers[0].attention
    shape = (pages, len(spec.layers), a.kv_heads)
    return Cache(
        keys=np.zeros((*shape, a.head_size, PAGE_TOKENS), np.float32),
        values=np.zeros((*shape, PAGE_TOKENS, a.head_size), np.float32),
    )
