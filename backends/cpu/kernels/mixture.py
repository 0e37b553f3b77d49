"""Mixture of experts: which experts a token goes to, collecting an expert's tokens, and adding its answers up.

mixture.py calls these between the linear products. They are compiled when a model has experts, never for a dense one.
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.arithmetic import exponential
from backends.cpu.kernels.groups import Groups
from backends.cpu.kernels.jit import inner, kernel, signed

__all__ = ["add_weighed", "choose", "gather", "sigmoids"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

ZERO, ONE = np.float32(0), np.float32(1)


@inner
def choose_row(x: Floats, normalize: bool, experts: Ints, shares: Floats) -> None:
    chosen = experts.shape[0]
    for c in range(chosen):
        best = -1
        for e in range(x.shape[0]):
            taken = False
            for before in range(c):
                taken = taken or experts[before] == e
            if not taken and (best < 0 or x[e] > x[best]):
                best = e
        experts[c] = best
    total = ZERO
    for e in range(x.shape[0]):
        total += exponential(x[e] - x[experts[0]])
    kept = ZERO
    for c in range(chosen):
        shares[c] = exponential(x[experts[c]] - x[experts[0]])
        kept += shares[c]
    divisor = kept if normalize else total
    for c in range(chosen):
        shares[c] /= divisor


@kernel
def choose(logits: Floats, normalize: bool, experts: Ints, shares: Floats, tokens: int) -> None:
    """The most probable experts of each token, (T, k), best first, ties to the lowest; their shares of the softmax over
    all experts, or over the chosen ones."""
    for token in prange(tokens):
        t = signed(token)
        choose_row(logits[t], normalize, experts[t], shares[t])


@kernel
def sigmoids(logits: Floats, shares: Floats, tokens: int) -> None:
    """1 / (1 + e^-x) of each token's one logit."""
    for token in prange(tokens):
        t = signed(token)
        shares[t] = ONE / (ONE + exponential(-logits[t, 0]))


@kernel
def gather(x: Floats, x_groups: Groups, tokens: Ints, out: Floats, groups: Groups) -> None:
    """out[i] = x[tokens[i]], and what is prepared of it."""
    for row in prange(tokens.shape[0]):
        i = signed(row)
        for k in range(x.shape[1]):
            out[i, k] = x[tokens[i], k]
        groups[i] = x_groups[tokens[i]]


@kernel
def add_weighed(branch: Floats, shares: Floats, tokens: Ints, total: Floats) -> None:
    """total[tokens[i]] += shares[i] branch[i]; no token stands twice."""
    for row in prange(tokens.shape[0]):
        i = signed(row)
        share = shares[i]
        for k in range(total.shape[1]):
            total[tokens[i], k] += share * branch[i, k]
