"""Norms, gates and sums of rows: launches of norm.cu, gated.cu and rows.cu. ops.py calls these.

x is the residual stream, float32; what lies between two kernels is bfloat16; norm weights and biases are float32. Any number
of columns works; multiples of 4 (of 8 for gates) are fast. Nothing here waits.
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np

from backends.cuda.device import Array, Kernel, Stream
from engine.model.spec import Activation

__all__ = ["add", "add_bias", "add_normed", "add_rms_norm", "elementwise_kernels", "gated", "rms_norm"]

Join = Literal["NOTHING", "ADD", "ADD_NORMED"]
WARP, NORM_THREADS, THREADS = 32, 1024, 256
NORM_SHARED = 33 * 4
NUMBERS = {"bf16": "bf16", "f32": "float"}
ABSENT = 0


def elementwise_kernels(hidden_size: int, widths: Iterable[int], activations: Iterable[Activation]) -> list[Kernel]:
    """What a model needs: widths of its feed-forwards, this rank's share of them, and their activations."""
    joins: tuple[Join, ...] = ("NOTHING", "ADD", "ADD_NORMED")
    norms = [norm_kernel(join, "bf16", hidden_size) for join in joins]
    sums = [rows_kernel("add_rows", hidden_size), rows_kernel("add_bias", hidden_size)]
    gates = {gated_kernel(activation, width) for activation in activations for width in widths}
    return [*norms, norm_kernel("NOTHING", "f32", hidden_size), *sums, *sorted(gates, key=lambda kernel: kernel.name)]


def rms_norm(stream: Stream, x: Array, weight: Array, out: Array, epsilon: float, at: Array | None = None) -> None:
    """out = x / sqrt(mean(x^2) + epsilon) * weight. x (T, D) f32, weight (D,), out (T, D) bf16 or f32.

    at (S,) i32: out (S, D) has the norms of these rows of x instead."""
    launch_norm(stream, "NOTHING", x, out, out.shape[0], epsilon, weight=weight, at=at)


def add_rms_norm(
    stream: Stream, x: Array, branch: Array, weight: Array, out: Array, epsilon: float, bias: Array | None = None
) -> None:
    """x += branch + bias; out = the norm of x. x (T, D) f32, branch and out (T, D) bf16, weight and bias (D,)."""
    launch_norm(stream, "ADD", x, out, x.shape[0], epsilon, branch=branch, bias=bias, weight=weight)


def add_normed(
    stream: Stream, x: Array, branch: Array, branch_weight: Array, epsilon: float, bias: Array | None = None,
    weight: Array | None = None, out: Array | None = None,
) -> None:  # fmt: skip
    """x += the norm of branch + bias; then out = the norm of x by `weight`, if these two are given. x (T, D) f32, branch
    and out (T, D) bf16, the weights and bias (D,)."""
    assert (weight is None) == (out is None), "a norm has a weight and a place"
    launch_norm(
        stream, "ADD_NORMED", x, out, x.shape[0], epsilon, branch=branch, bias=bias, branch_weight=branch_weight,
        weight=weight,
    )  # fmt: skip


def add(stream: Stream, x: Array, branch: Array) -> None:
    """x (T, D) f32 += branch (T, D) bf16."""
    assert x.shape == branch.shape, (x.shape, branch.shape)
    grid, threads = rows_geometry(x.shape[0], x.shape[1], 4)
    stream.launch(rows_kernel("add_rows", x.shape[1]), grid, threads, 0, x, branch, np.int32(x.shape[1]))


def add_bias(stream: Stream, rows: Array, bias: Array) -> None:
    """rows (T, D) bf16 += bias (D,) f32."""
    assert rows.shape[1:] == bias.shape, (rows.shape, bias.shape)
    grid, threads = rows_geometry(rows.shape[0], rows.shape[1], 4)
    stream.launch(rows_kernel("add_bias", rows.shape[1]), grid, threads, 0, rows, bias, np.int32(rows.shape[1]))


def gated(stream: Stream, gate_up: Array, activation: Activation, out: Array) -> None:
    """out (T, F) = activation(gate) * up; gate_up (T, 2 F): a row's gates, then its ups. Both bf16."""
    tokens, columns = out.shape
    assert gate_up.shape == (tokens, 2 * columns), (gate_up.shape, out.shape)
    grid, threads = rows_geometry(tokens, columns, 8)
    stream.launch(gated_kernel(activation, columns), grid, threads, 0, gate_up, out, np.int32(columns))


# ---- kernels and their geometry -----------------------------------------------------------------------------------------


def norm_kernel(join: Join, item: str, columns: int) -> Kernel:
    return Kernel("norm.cu", f"norm_rows<{join}, {NUMBERS[item]}, {vector(columns, 4)}>")


def rows_kernel(name: str, columns: int) -> Kernel:
    return Kernel("rows.cu", f"{name}<{vector(columns, 4)}>")


def gated_kernel(activation: Activation, columns: int) -> Kernel:
    return Kernel("gated.cu", f"gated<{activation.upper()}, {vector(columns, 8)}>")


def vector(columns: int, most: int) -> int:
    """Columns that a thread takes at once."""
    return most if columns % most == 0 else 1


def rows_geometry(rows: int, columns: int, most: int) -> tuple[tuple[int, int, int], int]:
    """Grid and threads where a block has some columns of a row."""
    groups = columns // vector(columns, most)
    threads = min(THREADS, -(-groups // WARP) * WARP)
    return (rows, -(-groups // threads), 1), threads


def norm_threads(columns: int) -> int:
    """By the columns alone, so that a row's norm has the same bits in every step. A thread has two groups: a step of one
    token needs many threads to have enough loads under way."""
    groups = columns // vector(columns, 4)
    return min(NORM_THREADS, -(-groups // (2 * WARP)) * WARP)


def launch_norm(
    stream: Stream, join: Join, x: Array, out: Array | None, rows: int, epsilon: float, *, at: Array | None = None,
    branch: Array | None = None, bias: Array | None = None, branch_weight: Array | None = None, weight: Array | None = None,
) -> None:  # fmt: skip
    columns = x.shape[1]
    assert out is None or out.shape == (rows, columns), (out, rows, columns)
    assert rows == (x.shape[0] if at is None else at.shape[0]), (x, at, rows)
    assert branch is None or branch.shape == x.shape, (branch, x)
    vectors = bias, branch_weight, weight
    assert all(each is None or each.shape == (columns,) for each in vectors), (vectors, columns)
    stream.launch(
        norm_kernel(join, "bf16" if out is None else out.item, columns), (rows, 1, 1), norm_threads(columns), NORM_SHARED,
        x, at or ABSENT, branch or ABSENT, bias or ABSENT, branch_weight or ABSENT, weight or ABSENT, out or ABSENT,
        np.int32(columns), np.float32(epsilon),
    )  # fmt: skip
