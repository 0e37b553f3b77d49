"""All layers of a dense model in one call: the loop of model.py without Python between the kernels.

A layer of a small model computes for 0.1 ms, and each call from Python costs some microseconds. fused.py makes the arguments
and tells which models this serves; the results have the same bits as those of model.py's own loop.
"""

from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.attention import attend
from backends.cpu.kernels.elementwise import rms_norm, silu_or_gelu
from backends.cpu.kernels.groups import Groups, prepare
from backends.cpu.kernels.integer import TILE, block_totals, products
from backends.cpu.kernels.jit import LANES, driver, inner, kernel, signed
from backends.cpu.kernels.position import rotate_and_write
from backends.cpu.kernels.sharing import new_shares, next_task

__all__ = ["ATTENTION_OUTPUT", "DOWN", "GATE", "QUERY", "SLOTS", "UP", "forward", "gated_products"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]

# a layer's matrices; a slot without one has no blocks. Query, key and value take up to three, unlike types apart
QUERY, ATTENTION_OUTPUT, GATE, UP, DOWN, SLOTS = 0, 3, 4, 5, 6, 7


@inner
def gated_block(
    matrices: NDArray[Any], records: Groups, b: int, is_silu: bool, out: Floats, groups: Groups, tokens: int
) -> None:
    """Gate and up of 32 rows, for all tokens: activation(gate) * up, and its digits."""
    gate, up = np.empty((TILE, LANES), np.float32), np.empty((TILE, LANES), np.float32)
    for t in range(0, tokens, TILE):
        block_totals(matrices, GATE, records, b, t, tokens, gate)
        block_totals(matrices, UP, records, b, t, tokens, up)
        for i in range(min(TILE, tokens - t)):
            for r in range(LANES):
                out[t + i, b * LANES + r] = silu_or_gelu(is_silu, gate[i, r]) * up[i, r]
            prepare(out, groups, t + i, b * LANES, (b + 1) * LANES)


@inner
def share_gated(
    matrices: NDArray[Any], records: Groups, is_silu: bool, out: Floats, groups: Groups, tokens: int,
    shares: NDArray[np.int64], worker: int,
) -> None:
    """What one thread does of the blocks."""
    blocks = matrices[GATE].blocks
    b = next_task(shares, worker, blocks)
    while b >= 0:
        gated_block(matrices, records, b, is_silu, out, groups, tokens)
        b = next_task(shares, worker, blocks)


@kernel
def gated_products(
    matrices: NDArray[Any], records: Groups, is_silu: bool, out: Floats, groups: Groups, tokens: int, workers: int
) -> None:
    shares = new_shares(workers)
    for worker in prange(workers):
        share_gated(matrices, records, is_silu, out, groups, tokens, shares, signed(worker))


@driver
def forward(
    matrices: NDArray[Any],         # (layers, SLOTS) of MATRIX
    norms: Floats,                  # (layers, 2, D): before attention, before the feed-forward
    biases: Floats,                 # (layers, columns of qkv), or (layers, 0)
    head_norms: Floats,             # (layers, 2, head size): of queries and keys; or (layers, 2, 0)
    windows: Longs,                 # (layers,): 0 is all
    epsilon: np.float32,
    is_silu: bool,
    scale: np.float32,
    cap: np.float32,
    interleaved: bool,
    cosine: Floats,
    sine: Floats,
    slots: Longs,
    blocks: Ints,
    tables: Ints,
    keys: Floats,
    values: Floats,
    workers: int,
    tokens: int,
    x: Floats,                      # (T, D), changed in place
    normed: Floats,
    normed_groups: Groups,
    qkv: Floats,
    mixed: Floats,                  # (T, H hs)
    mixed_groups: Groups,
    gated: Floats,                  # (T, F)
    gated_groups: Groups,
    number: Longs,                  # 0, 1, 2, ... SLOTS - 1: Numba would compile a kernel for each literal that it is given
) -> None:
    write, add = number[0] > 0, number[0] == 0
    for layer in range(matrices.shape[0]):
        mine = matrices[layer]
        rms_norm(x, norms[layer, 0], epsilon, normed, normed_groups, tokens)
        first = number[0]
        for slot in range(QUERY, ATTENTION_OUTPUT):
            if mine[slot].blocks > 0:
                products(mine, slot, normed_groups, qkv, first, write, tokens, workers)
                first += mine[slot].rows
        rotate_and_write(
            qkv, biases[layer], head_norms[layer, 0], head_norms[layer, 1], epsilon, cosine, sine, interleaved, slots, keys,
            values, layer,
        )  # fmt: skip
        attend(qkv, keys, values, layer, blocks, tables, scale, windows[layer], cap, workers, mixed, mixed_groups)
        products(mine, number[ATTENTION_OUTPUT], mixed_groups, x, number[0], add, tokens, workers)
        rms_norm(x, norms[layer, 1], epsilon, normed, normed_groups, tokens)
        gated_products(mine, normed_groups, is_silu, gated, gated_groups, tokens, workers)
        products(mine, number[DOWN], gated_groups, x, number[0], add, tokens, workers)
