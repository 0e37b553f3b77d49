"""Mixture of experts by groups: each expert runs once per step, on the tokens that chose it. model.py calls feed().

An expert's answer for a token does not depend on which other tokens are in its group, and a token's experts are added in
ascending order, so that a token's result has the same bits in any company.
"""

import numpy as np
from numpy.typing import NDArray

from backends.cpu.kernels import mixture as kernels
from backends.cpu.ops import Ops, Rows
from backends.cpu.weights import DenseWeights, MixtureWeights
from engine.model.spec import Activation, Mixture

__all__ = ["choose_experts", "feed"]

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]


def choose_experts(logits: Rows, spec: Mixture) -> tuple[IntArray, FloatArray]:
    """Each token's experts, best first, and their shares, (T, experts_per_token) each."""
    experts = np.empty((logits.tokens, spec.experts_per_token), np.int32)
    shares = np.empty(experts.shape, np.float32)
    kernels.choose(logits.values, spec.normalize_top_k, experts, shares, logits.tokens)
    return experts, shares


def feed(ops: Ops, x: Rows, spec: Mixture, w: MixtureWeights) -> Rows:
    """The sum over a token's experts of share x answer, and the shared expert's, (T, D)."""
    total = ops.rows("mixture", x.tokens, x.values.shape[1])
    total.values[: x.tokens] = 0
    experts, shares = choose_experts(ops.linear(x, w.router, "router"), spec)
    order = np.argsort(experts, axis=None, kind="stable")              # by expert; within one by token
    tokens = (order // spec.experts_per_token).astype(np.int32)
    by_expert, by_share = experts.reshape(-1)[order], shares.reshape(-1)[order]
    chosen, starts = np.unique(by_expert, return_index=True)
    for expert, start, stop in zip(chosen.tolist(), starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
        group = tokens[start:stop]
        inputs = ops.rows("expert_inputs", len(group), x.values.shape[1])
        kernels.gather(x.values, x.groups, group, inputs.values, inputs.groups)
        answer = gated_feed(ops, inputs, w.experts[expert], spec.activation, "expert")
        kernels.add_weighed(answer.values, by_share[start:stop], group, total.values)
    if w.shared is not None and w.shared_router is not None:
        logits = ops.linear(x, w.shared_router, "shared_router")
        weight = np.empty(x.tokens, np.float32)
        kernels.sigmoids(logits.values, weight, x.tokens)
        answer = gated_feed(ops, x, w.shared, spec.activation, "shared")
        kernels.add_weighed(answer.values, weight, np.arange(x.tokens, dtype=np.int32), total.values)
    return total


def gated_feed(ops: Ops, x: Rows, w: DenseWeights, activation: Activation, name: str) -> Rows:
    gate_up = ops.linear(x, w.gate_up, name + "_gate_up")
    return ops.linear(ops.gated(gate_up, activation, name + "_gated"), w.down, name + "_down")
