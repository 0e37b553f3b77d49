"""The forward pass on the device: one loop that reads like the paper, for every family. runner.py calls it, ops.py launches.

Everything here only queues work. What changes from step to step is read from device memory, so that the same loop can be
captured as a graph.
"""

from backends.cuda.collective import Collective
from backends.cuda.device import Array
from backends.cuda.ops import Ops
from backends.cuda.steps import DeviceStep
from backends.cuda.weights import DenseWeights, LayerWeights, MixtureWeights, ModelWeights
from engine.errors import UnsupportedModel
from engine.model.spec import Dense, Layer, Mixture, ModelSpec

__all__ = ["Model", "refuse_unsupported"]


class Model:
    """A loaded model: give it a step, get the states of its tokens; give it states, get logits."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, ops: Ops, collective: Collective) -> None:
        self.spec, self.weights, self.ops, self.collective = spec, weights, ops, collective

    def forward(self, step: DeviceStep) -> Array:
        """States of all tokens before the last norm, (T, D) float32."""
        ops = self.ops
        x = ops.embed(step.token_ids, self.weights.embedding)                                     # (T, D)
        ops.rotations(step.positions)
        normed = ops.rms_norm(x, self.weights.layers[0].attention_norm)                           # (T, D) bf16
        for number, (layer, w) in enumerate(zip(self.spec.layers, self.weights.layers, strict=True)):
            last = number + 1 == len(self.spec.layers)
            qkv = ops.linear(normed, w.qkv, "qkv")                                                # (T, (H + 2 KV) hs)
            ops.rotate_and_write(qkv, number, layer.attention, w, step)
            mixed = ops.attend(qkv, number, layer.attention, step)                                # (T, H hs)
            branch = ops.linear(mixed, w.attention_output, "branch")                              # (T, D)
            self.collective.all_reduce(ops.stream, branch)
            normed = self.join(x, branch, w.attention_output_bias, w.attention_post_norm, w.feed_norm)
            branch = self.feed(normed, layer, w)
            self.collective.all_reduce(ops.stream, branch)
            following = None if last else self.weights.layers[number + 1].attention_norm
            normed = self.join(x, branch, None, w.feed_post_norm, following)
        return x

    def feed(self, normed: Array, layer: Layer, w: LayerWeights) -> Array:
        """The layer's feed-forward, dense or mixture, (T, D) bf16."""
        match layer.feed_forward, w.feed:
            case Dense(activation=activation), DenseWeights():
                return self.ops.dense(normed, w.feed, activation)
            case Mixture() as spec, MixtureWeights():
                return self.ops.mixture(normed, spec, w.feed)
            case _:
                raise AssertionError("the loader makes the weights from the spec")

    def join(
        self, x: Array, branch: Array, bias: Array | None, post_norm: Array | None, following: Array | None
    ) -> Array:
        """x += branch + bias, normed before where the layer has post norms; the norm of x for what follows, if anything."""
        if post_norm is not None:
            return self.ops.add_normed(x, branch, post_norm, bias, following)
        if following is not None:
            return self.ops.add_rms_norm(x, branch, following, bias)
        assert bias is None, "only attention has a bias, and a norm follows it"
        self.ops.add(x, branch)
        return x

    def logits(self, x: Array, at: Array) -> Array:
        """(S, V) float32 of some tokens' states; `at` (S,) indices into T. Valid until the next call."""
        return self.ops.logits(self.ops.final_norm(x, at, self.weights.norm), self.weights.output)

    def hidden(self, x: Array, at: Array, out: Array) -> None:
        """out (H, D) float32: states after the last norm."""
        self.ops.final_states(x, at, self.weights.norm, out)


def refuse_unsupported(spec: ModelSpec) -> None:
    """Raise UnsupportedModel for what this backend does not have, before any memory is taken."""
    first = spec.layers[0].attention
    for number, layer in enumerate(spec.layers):
        a = layer.attention
        if (a.heads, a.kv_heads, a.head_size) != (first.heads, first.kv_heads, first.head_size):
            raise UnsupportedModel(
                f"{spec.family}: layer {number} has other attention heads than layer 0, which the cuda backend's pages "
                "cannot hold: choose another model"
            )
