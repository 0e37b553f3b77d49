"""The operations of a forward pass, under the names that papers use. model.py calls them; they launch kernels.

Results lie in a workspace that is made once for the largest step: the result of an operation is valid until the operation of
the same name runs again. Nothing here waits.
"""

from dataclasses import dataclass

import numpy as np

from backends.cuda import attention, elementwise, mixture, products
from backends.cuda.attention import CacheLayout, SplitWorkspace
from backends.cuda.device import Array, Device, Kernel, Stream, make_array
from backends.cuda.matrices import Matrix
from backends.cuda.mixture import Routing, RoutingRoom
from backends.cuda.rope import Rotation
from backends.cuda.steps import DeviceStep
from backends.cuda.weights import DenseWeights, LayerWeights, MixtureWeights, ModelWeights, Stack
from engine.model.spec import Activation, Attention, Mixture, ModelSpec, Rope

__all__ = ["Ops", "Sizes"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the workspace has room for."""

    tokens: int              # of a step
    rows: int                # of a step
    row_pages: int           # of one sequence
    logits: int              # rows of logits that exist at a time


class Ops:
    """Operations and the memory that they write to."""

    def __init__(self, device: Device, stream: Stream, spec: ModelSpec, layout: CacheLayout, sizes: Sizes) -> None:
        self.device, self.stream, self.spec, self.layout, self.sizes = device, stream, spec, layout, sizes
        self.attention = spec.layers[0].attention
        self.epsilon = spec.norm_epsilon
        self.pool = 0                                    # address of the pages
        self.workspace: dict[str, Array] = {}
        self.ropes = {rope: Rotation.of(rope) for rope in dict.fromkeys(layer.attention.rope for layer in spec.layers)}
        self.frequencies = {rope: self.constant(rotation.frequencies) for rope, rotation in self.ropes.items()}
        self.angles: dict[Rope, Array] = {}
        self.mixtures = {
            kind: RoutingRoom.make(device, kind, sizes.tokens, products.LEAST_TILE_TOKENS)
            for kind in dict.fromkeys(layer.feed_forward for layer in spec.layers)
            if isinstance(kind, Mixture)
        }
        self.split_workspace = SplitWorkspace.make(device, stream, self.attention)

    def constant(self, values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Array:
        there = make_array(self.device, "f64", *values.shape)
        self.stream.copy_in(there.address, np.ascontiguousarray(values))
        self.stream.record().wait()
        return there

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.workspace.values()) + sum(room.nbytes for room in self.mixtures.values())

    def rows(self, name: str, rows: int, columns: int, item: str = "bf16", *, each: int = 1) -> Array:
        """(rows, columns) of the workspace, whose memory is for the largest step; each: rows of a token."""
        room = self.workspace.get(name)
        if room is None:
            most = self.sizes.logits if name in ("logits", "final") else self.sizes.tokens * each
            room = self.workspace[name] = make_array(self.device, item, most, columns)
        assert room.shape[1] == columns, (name, room.shape, columns)
        assert room.item == item, (name, room.item, item)
        return room.first(rows)

    def kernels(self, weights: ModelWeights) -> list[Kernel]:
        """Everything that a model with these weights launches. Raises UnsupportedModel for what has no kernel."""
        spec = self.spec
        feeds = [layer.feed_forward for layer in spec.layers]
        widths = {feed.width for feed in feeds} | {feed.shared_width for feed in feeds if isinstance(feed, Mixture)}
        found = elementwise.elementwise_kernels(
            spec.hidden_size, {width for width in widths if width}, {feed.activation for feed in feeds}
        )
        for layer in spec.layers:
            found += attention.attention_kernels(layer.attention, self.layout.item)
        for kind in self.mixtures:
            mixture.refuse_mixture(kind)
            found += mixture.mixture_kernels(kind, spec.hidden_size)
        found += products.kernels_for(weights_of(weights), self.sizes.tokens)
        return list(dict.fromkeys(found))

    # ---- tokens and positions ---------------------------------------------------------------------------------------------

    def embed(self, tokens: Array, matrix: Matrix) -> Array:
        """(T, D) float32."""
        x = self.rows("x", tokens.shape[0], matrix.columns, "f32")
        products.take_rows(self.stream, tokens, matrix, x)
        return x

    def rotations(self, positions: Array) -> None:
        """Cosines and sines of the step's positions, for every rope of the model."""
        for number, (rope, rotation) in enumerate(self.ropes.items()):
            pairs = rope.rotary_size // 2
            room = self.rows(f"rotations {number}", positions.shape[0], 2 * pairs, "f32")
            self.angles[rope] = Array(room.address, (positions.shape[0], pairs, 2), "f32")
            attention.rotations(self.stream, positions, self.frequencies[rope], rotation.factor, self.angles[rope])

    # ---- norms and sums ---------------------------------------------------------------------------------------------------

    def rms_norm(self, x: Array, weight: Array) -> Array:
        out = self.rows("normed", x.shape[0], x.shape[1])
        elementwise.rms_norm(self.stream, x, weight, out, self.epsilon)
        return out

    def add_rms_norm(self, x: Array, branch: Array, weight: Array, bias: Array | None) -> Array:
        """x += branch + bias; its norm."""
        out = self.rows("normed", x.shape[0], x.shape[1])
        elementwise.add_rms_norm(self.stream, x, branch, weight, out, self.epsilon, bias)
        return out

    def add_normed(self, x: Array, branch: Array, post_norm: Array, bias: Array | None, weight: Array | None) -> Array:
        """x += the norm of branch + bias; the norm of x by `weight`, if there is one."""
        out = None if weight is None else self.rows("normed", x.shape[0], x.shape[1])
        elementwise.add_normed(self.stream, x, branch, post_norm, self.epsilon, bias, weight, out)
        return x if out is None else out

    def add(self, x: Array, branch: Array) -> None:
        elementwise.add(self.stream, x, branch)

    def final_norm(self, x: Array, at: Array, weight: Array) -> Array:
        """The last norm of some tokens, (S, D)."""
        out = self.rows("final", at.shape[0], x.shape[1])
        elementwise.rms_norm(self.stream, x, weight, out, self.epsilon, at)
        return out

    def final_states(self, x: Array, at: Array, weight: Array, out: Array) -> None:
        """The same as float32, for those who asked for states."""
        elementwise.rms_norm(self.stream, x, weight, out, self.epsilon, at)

    # ---- products -------------------------------------------------------------------------------------------------------

    def linear(self, x: Array, stack: Stack, name: str, item: str = "bf16") -> Array:
        """x W^T, (T, rows)."""
        out = self.rows(name, x.shape[0], stack.rows, item)
        column = 0
        for matrix in stack.matrices:
            products.product(self.stream, x, matrix, out, column)
            column += matrix.rows
        return out

    def logits(self, states: Array, matrix: Matrix) -> Array:
        """(S, V) float32."""
        return self.linear(states, Stack(matrix.rows, (matrix,)), "logits", "f32")

    def gated(self, gate_up: Array, activation: Activation, name: str = "gated") -> Array:
        """activation(gate) * up, (T, F)."""
        out = self.rows(name, gate_up.shape[0], gate_up.shape[1] // 2, each=self.each_of(name))
        elementwise.gated(self.stream, gate_up, activation, out)
        return out

    # ---- attention ------------------------------------------------------------------------------------------------------

    def rotate_and_write(self, qkv: Array, number: int, spec: Attention, w: LayerWeights, step: DeviceStep) -> None:
        """Biases, q/k norm and rope, in place; keys and values into their pages."""
        attention.rotate_and_write(
            self.stream, qkv, w.qkv_bias, w.query_norm, w.key_norm, self.epsilon, self.angles[spec.rope], step.slots,
            self.pool, self.layout, number, spec,
        )  # fmt: skip

    def splits(self, rows: int) -> int:
        return attention.splits_for(rows, self.attention, self.device.facts.multiprocessors, self.sizes.row_pages)

    def attend(self, qkv: Array, number: int, spec: Attention, step: DeviceStep) -> Array:
        """softmax(scale q k) v over the pages, (T, H hs)."""
        out = self.rows("mixed", qkv.shape[0], spec.heads * spec.head_size)
        if step.decode_rows:
            attention.attend_decode(
                self.stream, qkv, self.pool, self.layout, number, step.decode_rows, step.row_starts, step.kv_lengths,
                step.page_tables, step.table_width, self.splits(step.decode_rows), self.split_workspace, out, spec,
            )  # fmt: skip
        if step.blocks is not None:
            attention.attend_prefill(
                self.stream, qkv, self.pool, self.layout, number, step.blocks, step.page_tables, step.table_width, out, spec
            )
        return out

    # ---- mixture of experts -----------------------------------------------------------------------------------------------

    def each_of(self, name: str) -> int:
        """Rows of a token that a result of experts has."""
        return max((kind.experts_per_token for kind in self.mixtures), default=1) if name.startswith("expert") else 1

    def mixture(self, x: Array, spec: Mixture, w: MixtureWeights) -> Array:
        """The sum over a token's experts of share x answer, and the shared expert's, (T, D)."""
        tokens = x.shape[0]
        tile_tokens = products.tile_tokens(tokens, spec.experts_per_token, spec.experts)
        logits = self.linear(x, w.router, "router", "f32")
        routing = mixture.route(self.stream, logits, self.mixtures[spec], tile_tokens)
        positions = tokens * spec.experts_per_token
        gate_up = self.rows("expert gate_up", positions, w.experts.gate_up.rows, each=spec.experts_per_token)
        self.grouped(x, routing.source, w.experts.gate_up, routing, gate_up)
        gated = self.gated(gate_up, spec.activation, "expert gated")
        answers = self.rows("expert answers", positions, x.shape[1], each=spec.experts_per_token)
        self.grouped(gated, None, w.experts.down, routing, answers)
        out = self.rows("branch", tokens, x.shape[1])
        if w.shared is None or w.shared_router is None:
            mixture.combine(self.stream, answers, routing, out)
            return out
        shared = self.dense(x, w.shared, spec.activation, "shared")
        mixture.combine(self.stream, answers, routing, out, shared, self.linear(x, w.shared_router, "shared_router", "f32"))
        return out

    def grouped(self, x: Array, source: Array | None, stack: Stack, routing: Routing, out: Array) -> None:
        """Every position by the matrices of its expert."""
        column = 0
        for matrix in stack.matrices:
            products.product_of_experts(self.stream, x, source, matrix, routing.tiles, out, routing.tile_tokens, column)
            column += matrix.rows

    def dense(self, x: Array, w: DenseWeights, activation: Activation, name: str = "") -> Array:
        """down(activation(gate x) * up x), (T, D)."""
        gate_up = self.linear(x, w.gate_up, f"{name}gate_up")
        return self.linear(self.gated(gate_up, activation, f"{name}gated"), w.down, f"{name}branch")


def weights_of(weights: ModelWeights) -> list[Matrix]:
    """All matrices."""
    found = [weights.embedding, weights.output]
    for layer in weights.layers:
        stacks = [layer.qkv, layer.attention_output]
        match layer.feed:
            case DenseWeights(gate_up, down):
                stacks += [gate_up, down]
            case MixtureWeights(router, experts, shared, shared_router):
                stacks += [router, experts.gate_up, experts.down]
                stacks += [] if shared is None else [shared.gate_up, shared.down]
                stacks += [] if shared_router is None else [shared_router]
        found += [matrix for stack in stacks for matrix in stack.matrices]
    return found
