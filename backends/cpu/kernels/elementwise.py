"""Row by row operations: rms norm, gated activations, adding.

ops.py calls these. Each prepares, beside its values, what the quantized products want of their groups.
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.arithmetic import exponential, tanh
from backends.cpu.kernels.groups import Groups, prepare
from backends.cpu.kernels.jit import inner, kernel, signed

__all__ = ["add_bias", "add_rows", "gated", "rms_norm", "silu_or_gelu"]

Floats = NDArray[np.float32]

ONE, HALF = np.float32(1), np.float32(0.5)
GELU_A, GELU_B = np.float32(0.7978845608028654), np.float32(0.044715)   # sqrt(2 / pi)


@inner
def inverse_rms(x: Floats, t: int, epsilon: np.float32) -> np.float32:
    s0 = s1 = s2 = s3 = np.float32(0)      # four chains, because each addition waits for the one before it
    columns = x.shape[1]
    whole = columns // 4 * 4
    for k in range(0, whole, 4):
        s0 += x[t, k] * x[t, k]
        s1 += x[t, k + 1] * x[t, k + 1]
        s2 += x[t, k + 2] * x[t, k + 2]
        s3 += x[t, k + 3] * x[t, k + 3]
    for k in range(whole, columns):
        s0 += x[t, k] * x[t, k]
    return np.float32(ONE / np.sqrt((s0 + s1 + s2 + s3) / np.float32(columns) + epsilon))


@inner
def norm_row(x: Floats, weight: Floats, epsilon: np.float32, out: Floats, groups: Groups, t: int) -> None:
    scale = inverse_rms(x, t, epsilon)
    for k in range(x.shape[1]):
        out[t, k] = x[t, k] * scale * weight[k]
    prepare(out, groups, t, 0, out.shape[1])


@kernel
def rms_norm(x: Floats, weight: Floats, epsilon: np.float32, out: Floats, groups: Groups, tokens: int) -> None:
    if tokens == 1:
        norm_row(x, weight, epsilon, out, groups, tokens - 1)
    else:
        for token in prange(tokens):
            norm_row(x, weight, epsilon, out, groups, signed(token))


@inner
def silu_or_gelu(is_silu: bool, gate: np.float32) -> np.float32:
    if is_silu:
        return gate / (ONE + exponential(-gate))
    return HALF * gate * (ONE + tanh(GELU_A * (gate + GELU_B * gate * gate * gate)))


@inner
def gated_row(gate_up: Floats, is_silu: bool, out: Floats, groups: Groups, t: int) -> None:
    width = out.shape[1]
    for k in range(width):
        out[t, k] = silu_or_gelu(is_silu, gate_up[t, k]) * gate_up[t, width + k]
    prepare(out, groups, t, 0, width)


@kernel
def gated(gate_up: Floats, is_silu: bool, out: Floats, groups: Groups, tokens: int) -> None:
    """activation(gate) * up; gate_up is (T, 2 F): gate, then up."""
    if tokens == 1:                        # a launch of threads would take longer
        gated_row(gate_up, is_silu, out, groups, tokens - 1)
    else:
        for token in prange(tokens):
            gated_row(gate_up, is_silu, out, groups, signed(token))


@kernel
def add_rows(x: Floats, branch: Floats, tokens: int) -> None:
    for token in prange(tokens):
        t = signed(token)
        for k in range(x.shape[1]):
            x[t, k] += branch[t, k]


@kernel
def add_bias(x: Floats, bias: Floats, tokens: int) -> None:
    for token in prange(tokens):
        t = signed(token)
        for k in range(x.shape[1]):
            x[t, k] += bias[k]
