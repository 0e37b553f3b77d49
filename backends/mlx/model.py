"""The forward pass: one loop that reads like the paper, for every family. session.py calls it on the device thread.

A Model knows spec and weights. Where keys and values go, and what a token sees, is the affair of the step's pages (cache.py).
Everything here is lazy: nothing is computed before session.py asks for the results.
"""

import mlx.core as mx

from backends.mlx.cache import StepPages
from backends.mlx.collective import ALONE, Collective
from backends.mlx.ops import Ops, choose_experts
from backends.mlx.tree import DenseWeights, LayerWeights, MixtureWeights, ModelWeights
from engine.model.spec import Activation, Dense, Layer, Mixture, ModelSpec

__all__ = ["Model"]


class Model:
    """A loaded model: tokens and their pages -> states; states -> logits."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, ops: Ops, collective: Collective = ALONE) -> None:
        self.spec, self.weights, self.ops, self.collective = spec, weights, ops, collective
        norms = [layer.attention_norm for layer in weights.layers]
        self.next_norms = [*norms[1:], weights.norm]             # a layer's result is normed by who reads it

    def forward(self, tokens: mx.array, pages: StepPages) -> mx.array:
        """(T,) ids -> states after the last norm, (T, D)."""
        x = self.weights.embedding.gather(tokens)                                                 # (T, D)
        normed = self.ops.rms_norm(x, self.weights.layers[0].attention_norm)
        for number, (layer, w) in enumerate(zip(self.spec.layers, self.weights.layers, strict=True)):
            mixed = self.collective.total(self.mix(number, layer, w, normed, pages))
            x, normed = self.join(x, mixed, w.attention_post_norm, w.feed_norm)
            fed = self.collective.total(self.feed(layer, w, normed))
            x, normed = self.join(x, fed, w.feed_post_norm, self.next_norms[number])
        return normed

    def mix(self, number: int, layer: Layer, w: LayerWeights, normed: mx.array, pages: StepPages) -> mx.array:
        """Attention over the pages, (T, D)."""
        a, tokens = layer.attention, len(normed)
        qkv = plus(w.qkv(normed), w.qkv_bias).reshape(tokens, -1, a.head_size)                    # (T, H + 2 KV, hs)
        q = pages.place(number, a, w.head_norms, qkv)            # q/k norm and rope; keys and values are in the cache now
        mixed = pages.attend(number, a, q).reshape(tokens, -1)                                    # (T, H hs)
        return plus(w.attention_output(mixed), w.attention_output_bias)

    def feed(self, layer: Layer, w: LayerWeights, normed: mx.array) -> mx.array:
        """The feed-forward, dense or mixture, (T, D)."""
        match layer.feed_forward, w.feed:
            case Dense(activation=activation), DenseWeights() as feed:
                return self.dense_feed(feed, normed, activation)
            case Mixture(activation=activation) as spec, MixtureWeights() as feed:
                chosen, shares = choose_experts(feed.router(normed), spec)                        # (T, k)
                answers = feed.down(self.ops.gated(feed.gate_up(normed, chosen), activation), chosen)  # (T, k, D)
                total = (answers * shares[..., None]).sum(axis=1)
                if feed.shared is not None and feed.shared_router is not None:
                    share = mx.sigmoid(feed.shared_router(normed).astype(mx.float32))             # (T, 1)
                    total = total + share * self.dense_feed(feed.shared, normed, activation)
                return total.astype(normed.dtype)
            case _:
                raise AssertionError("the loader makes the weights from the spec")

    def dense_feed(self, w: DenseWeights, x: mx.array, activation: Activation) -> mx.array:
        """down(activation(gate x) * up x)"""
        return w.down(self.ops.gated(w.gate_up(x), activation))

    def join(
        self, x: mx.array, branch: mx.array, post_norm: mx.array | None, next_norm: mx.array
    ) -> tuple[mx.array, mx.array]:
        """x + branch, the branch normed first where the layer has post norms; and the sum's norm."""
        branch = branch if post_norm is None else self.ops.rms_norm(branch, post_norm)
        return self.ops.add_rms_norm(x, branch, next_norm)

    def logits(self, states: mx.array) -> mx.array:
        """(n, D) -> (n, V) float32."""
        return self.weights.output(states).astype(mx.float32)


def plus(x: mx.array, bias: mx.array | None) -> mx.array:
    return x if bias is None else x + bias
