"""Paged attention: softmax(scale q k) v over the pages of each row, causal, with sliding window and soft cap.

A task is a block of a row's queries for one key/value head: its lines (queries x heads of the group) share every load of
a key and a value. Keys are lanes: 32 scores at a time. The softmax is online, page after page from the row's first one,
so a query's result has the same bits whatever the block, the chunk or the company that it came in. ops.py calls `attend`.
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.arithmetic import dot4, exponential, tanh
from backends.cpu.kernels.groups import SPAN, Groups, prepare
from backends.cpu.kernels.jit import LANES, inner, kernel, signed

__all__ = ["BLOCK_FIELDS", "TILE", "attend"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

BLOCK_FIELDS = 4   # first token, queries, row, keys that the first query sees
TILE = 4           # lines that share the loads of a key or value; a block's lines are padded to it

FAR = np.float32(-1e30)   # instead of -inf, which fastmath does not allow
ZERO, ONE = np.float32(0), np.float32(1)


@inner
def score_page(q: Floats, line: int, keys: Floats, page: int, layer: int, head: int, scores: Floats) -> None:
    """Scores of four lines with a page's 32 keys."""
    for i in range(line, line + TILE):
        for j in range(LANES):
            scores[i, j] = ZERO
    for d in range(0, q.shape[1], 4):
        a0, a1, a2, a3 = q[line, d], q[line, d + 1], q[line, d + 2], q[line, d + 3]
        b0, b1, b2, b3 = q[line + 1, d], q[line + 1, d + 1], q[line + 1, d + 2], q[line + 1, d + 3]
        c0, c1, c2, c3 = q[line + 2, d], q[line + 2, d + 1], q[line + 2, d + 2], q[line + 2, d + 3]
        d0, d1, d2, d3 = q[line + 3, d], q[line + 3, d + 1], q[line + 3, d + 2], q[line + 3, d + 3]
        for j in range(LANES):
            k0, k1 = keys[page, layer, head, d, j], keys[page, layer, head, d + 1, j]
            k2, k3 = keys[page, layer, head, d + 2, j], keys[page, layer, head, d + 3, j]
            scores[line, j] = dot4(scores[line, j], k0, k1, k2, k3, a0, a1, a2, a3)
            scores[line + 1, j] = dot4(scores[line + 1, j], k0, k1, k2, k3, b0, b1, b2, b3)
            scores[line + 2, j] = dot4(scores[line + 2, j], k0, k1, k2, k3, c0, c1, c2, c3)
            scores[line + 3, j] = dot4(scores[line + 3, j], k0, k1, k2, k3, d0, d1, d2, d3)


@inner
def weigh(scores: Floats, line: int, low: int, high: int, cap: np.float32, top: Floats, mass: Floats, out: Floats) -> None:
    """Turn a line's scores of keys low <= j < high into weights, the others into 0, and rescale what it has so far."""
    if cap > ZERO:
        for j in range(LANES):
            scores[line, j] = cap * tanh(scores[line, j] / cap)
    best = top[line]
    for j in range(LANES):
        s = scores[line, j] if low <= j < high else FAR
        scores[line, j] = s
        best = max(best, s)
    if best > top[line]:
        shrink = exponential(top[line] - best)
        top[line] = best
        for j in range(LANES):
            mass[line, j] *= shrink
        for i in range(out.shape[1]):
            out[line, i] *= shrink
    for j in range(LANES):
        s = scores[line, j]
        weight = exponential(s - best) if s > FAR else ZERO
        scores[line, j] = weight
        mass[line, j] += weight


@inner
def gather_values(weights: Floats, line: int, values: Floats, page: int, layer: int, head: int, out: Floats) -> None:
    """out += weights x a page's 32 values, four lines and four keys at a time, in the order of the keys."""
    for j in range(0, LANES, 4):
        a0, a1, a2, a3 = weights[line, j], weights[line, j + 1], weights[line, j + 2], weights[line, j + 3]
        b0, b1, b2, b3 = (
            weights[line + 1, j], weights[line + 1, j + 1], weights[line + 1, j + 2], weights[line + 1, j + 3]
        )
        c0, c1, c2, c3 = (
            weights[line + 2, j], weights[line + 2, j + 1], weights[line + 2, j + 2], weights[line + 2, j + 3]
        )
        d0, d1, d2, d3 = (
            weights[line + 3, j], weights[line + 3, j + 1], weights[line + 3, j + 2], weights[line + 3, j + 3]
        )
        for i in range(out.shape[1]):
            v0, v1 = values[page, layer, head, j, i], values[page, layer, head, j + 1, i]
            v2, v3 = values[page, layer, head, j + 2, i], values[page, layer, head, j + 3, i]
            out[line, i] = dot4(out[line, i], v0, v1, v2, v3, a0, a1, a2, a3)
            out[line + 1, i] = dot4(out[line + 1, i], v0, v1, v2, v3, b0, b1, b2, b3)
            out[line + 2, i] = dot4(out[line + 2, i], v0, v1, v2, v3, c0, c1, c2, c3)
            out[line + 3, i] = dot4(out[line + 3, i], v0, v1, v2, v3, d0, d1, d2, d3)


@inner
def attend_block(
    qkv: Floats, keys: Floats, values: Floats, layer: int, token: int, queries: int, table: Ints, first_limit: int,
    head: int, group: int, scale: np.float32, window: int, cap: np.float32, result: Floats, groups: Groups,
) -> None:
    size = keys.shape[3]
    lines = queries * group
    padded = (lines + TILE - 1) // TILE * TILE
    q, out = np.empty((padded, size), np.float32), np.empty((padded, size), np.float32)
    scores, mass = np.empty((padded, LANES), np.float32), np.empty((padded, LANES), np.float32)
    top = np.empty(padded, np.float32)
    for line in range(padded):     # lines of one query stand together; those of the padding repeat the last one
        there = min(line, lines - 1)
        column = (head * group + there % group) * size
        top[line] = FAR
        for i in range(size):
            q[line, i] = qkv[token + there // group, column + i] * scale
            out[line, i] = ZERO
        for j in range(LANES):
            mass[line, j] = ZERO
    first_page = max(0, first_limit - window) // LANES if window > 0 else 0
    last_page = (first_limit + queries - 2) // LANES
    for number in range(first_page, last_page + 1):
        page = signed(table[number])
        start = number * LANES
        for line in range(0, padded, TILE):
            last_limit = first_limit + min(lines - 1, line + TILE - 1) // group
            if last_limit <= start:
                continue    # no line of this tile sees the page
            score_page(q, line, keys, page, layer, head, scores)
            for i in range(line, line + TILE):
                limit = first_limit + i // group
                low = max(0, limit - window - start) if window > 0 else 0
                high = min(LANES, limit - start)
                if i < lines and low < high:
                    weigh(scores, i, low, high, cap, top, mass, out)
                else:
                    for j in range(LANES):
                        scores[i, j] = ZERO
            gather_values(scores, line, values, page, layer, head, out)
    for line in range(lines):
        total = ZERO
        for j in range(LANES):
            total += mass[line, j]
        share = ONE / total
        column = (head * group + line % group) * size
        for i in range(size):
            out[line, i] *= share
            result[token + line // group, column + i] = out[line, i]
    if group * size % SPAN == 0:
        for query in range(queries):
            prepare(result, groups, token + query, head * group * size, (head + 1) * group * size)


@kernel
def attend(
    qkv: Floats,            # (T, (heads + 2 kv heads) size): queries are rotated, keys and values are in the pages
    keys: Floats,           # (pages, layers, kv heads, size, page tokens)
    values: Floats,         # (pages, layers, kv heads, page tokens, size)
    layer: int,
    blocks: Ints,           # (blocks, 4): first token, queries, row, keys that the first query sees; costly ones first
    tables: Ints,           # (B, W)
    scale: np.float32,
    window: int,            # 0: all
    cap: np.float32,        # 0: none
    workers: int,
    result: Floats,         # (T, heads size)
    groups: Groups,         # of the result; prepared here if the columns of a task divide into spans
) -> None:
    kv_heads = keys.shape[2]
    group = qkv.shape[1] // keys.shape[3] // kv_heads - 2
    tasks = blocks.shape[0] * kv_heads
    for number in prange(workers):
        for task in range(signed(number), tasks, workers):
            block = blocks[task // kv_heads]
            attend_block(
                qkv, keys, values, layer, block[0], block[1], tables[block[2]], block[3], task % kv_heads, group, scale,
                window, cap, result, groups,
            )
