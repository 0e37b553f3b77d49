"""The operations of a forward pass, under the names that papers use; each is lazy. model.py and the caches call them.

Where there is Metal, a sum and its norm are one kernel, and so are a gate and its activation; all else is MLX's own.
Norms, softmax and rotations are computed in float32 whatever the activations are; results have the activations' type.
"""

from math import pi, sqrt

import mlx.core as mx

from backends.mlx.metal_norms import NormKernels
from engine.model.spec import Activation, Mixture

__all__ = ["Ops", "attention", "choose_experts", "gated", "rotate"]


class Ops:
    """What needs the model's epsilon. norms: the kernels of a Mac, None elsewhere."""

    def __init__(self, epsilon: float, norms: NormKernels | None = None) -> None:
        self.epsilon, self.norms = epsilon, norms

    def rms_norm(self, x: mx.array, weight: mx.array) -> mx.array:
        """x / rms(x) * weight over the last axis."""
        return mx.fast.rms_norm(x, weight, self.epsilon)

    def add_rms_norm(self, x: mx.array, branch: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        """x + branch, (T, D), and its norm."""
        if self.norms is not None:
            return self.norms.add_rms_norm(x, branch, weight, self.epsilon)
        total = x + branch
        return total, self.rms_norm(total, weight)

    def gated(self, gate_up: mx.array, activation: Activation) -> mx.array:
        """activation(gate) * up of (..., 2 F), gate's numbers first: (..., F)."""
        return gated(gate_up, activation) if self.norms is None else self.norms.gated(gate_up, activation)


def rotate(x: mx.array, cosine: mx.array, sine: mx.array, interleaved: bool) -> mx.array:
    """Turn the first 2 R numbers of each head: x (T, heads, hs), cosine and sine (T, 1, R) float32."""
    size = 2 * cosine.shape[-1]
    turned = x[..., :size].astype(mx.float32)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = mx.stack([a * cosine - b * sine, b * cosine + a * sine], axis=-1).reshape(*x.shape[:-1], size)
    else:
        a, b = turned[..., : size // 2], turned[..., size // 2 :]
        turned = mx.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if size == x.shape[-1] else mx.concatenate([turned, x[..., size:]], axis=-1)


def attention(
    q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array, soft_cap: float | None
) -> mx.array:
    """softmax(scale q k) v where the mask allows it: q (n, H, Lq, hs), keys and values (n, KV, L, hs), mask (n, 1, Lq, L)."""
    if soft_cap is None:
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
    n, heads, length, size = q.shape
    kv_heads = keys.shape[1]
    grouped = q.astype(mx.float32).reshape(n, kv_heads, heads // kv_heads, length, size)
    scores = scale * (grouped @ keys.astype(mx.float32)[:, :, None].swapaxes(-1, -2))              # (n, KV, G, Lq, L)
    scores = mx.where(mask[:, :, None], soft_cap * mx.tanh(scores / soft_cap), -mx.inf)
    mixed = mx.softmax(scores, axis=-1) @ values.astype(mx.float32)[:, :, None]
    return mixed.reshape(q.shape).astype(q.dtype)


def gated(gate_up: mx.array, activation: Activation) -> mx.array:
    """activation(gate) * up of (..., 2 F), gate's numbers first: (..., F)."""
    gate, up = mx.split(gate_up, 2, axis=-1)
    if activation == "silu":
        return gate * mx.sigmoid(gate) * up
    wide = gate.astype(mx.float32)                                # its cube leaves float16
    curve = 0.5 * wide * (1.0 + mx.tanh(sqrt(2 / pi) * (wide + 0.044715 * wide * wide * wide)))
    return curve.astype(gate.dtype) * up


def choose_experts(logits: mx.array, spec: Mixture) -> tuple[mx.array, mx.array]:
    """Each token's experts (T, k) int32, and their shares (T, k) float32: logits (T, E)."""
    shares = mx.softmax(logits.astype(mx.float32), axis=-1)
    kept = spec.experts_per_token
    chosen = mx.argpartition(-shares, kth=kept - 1, axis=-1)[:, :kept] if kept < spec.experts else _all_of(shares)
    shares = mx.take_along_axis(shares, chosen, axis=-1)
    if spec.normalize_top_k:
        shares = shares / shares.sum(axis=-1, keepdims=True)
    return chosen.astype(mx.int32), shares


def _all_of(shares: mx.array) -> mx.array:
    return mx.broadcast_to(mx.arange(shares.shape[-1], dtype=mx.uint32), shares.shape)
