"""y = x W^T for weights that rest as lanes: 4 or 8 bits with groups, or dense (float32, bfloat16, float16).

Rows are lanes: word (b, k, r) of a matrix belongs to output row 32 b + r, so that the innermost loop runs over 32 rows
with unit stride and nothing is ever summed across lanes. Every output is summed over its columns in ascending order,
the same for any number of tokens: a token's result has the same bits alone and among 500. ops.py calls these kernels.

A quantized q is placed under the exponent of 1.0, which makes it the float 1 + q / 2^bits without a conversion. The sum
over a group is mended by the group's sum of x: 2^bits scale (part - center sum(x)) [+ minimum sum(x)], where center is 1.5
for symmetric types (no minima) and 1 for the others.

Over 250 lines, because the unrolled bodies are one idea and are read side by side.
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.arithmetic import dot4, widen
from backends.cpu.kernels.jit import LANES, helper, inner, kernel, signed

__all__ = ["TILE", "dense", "lanes"]

Floats = NDArray[np.float32]
Words = NDArray[np.uint32]
Halves = NDArray[np.int16]     # the bits of float16
Dense = NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.int16]

TILE = 4      # tokens that share one decoding of a weight; arrays of rows have room for a multiple of it

U = np.uint32
ONE, MASK4, MASK8 = U(0x3F800000), U(0x00780000), U(0x007F8000)
ZERO, ONE_F, CENTER = np.float32(0), np.float32(1), np.float32(1.5)
TWO_4, TWO_8 = np.float32(2**4), np.float32(2**8)


@inner
def unit4(bits: np.uint32) -> np.float32:
    return U((bits & MASK4) | ONE).view(np.float32)


@inner
def unit8(bits: np.uint32) -> np.float32:
    return U((bits & MASK8) | ONE).view(np.float32)


@helper
def clear(total: Floats) -> None:
    for i in range(total.shape[0]):
        for r in range(LANES):
            total[i, r] = ZERO


@inner
def read_scales(scale: Halves, minimum: Halves, factor: np.float32, b: int, g: int, scales: Floats) -> None:
    """Scales of a group in the first row, minima in the second one, which stays zero where there are none."""
    for r in range(LANES):
        scales[0, r] = widen(scale[b, g, r]) * factor
    if minimum.shape[0] > 0:
        for r in range(LANES):
            scales[1, r] = widen(minimum[b, g, r])


@helper
def close_group(
    total: Floats, part: Floats, sums: Floats, scales: Floats, center: np.float32, t: int, i: int, g: int, entries: int
) -> None:
    """Add group g's part to the total; each statement has one product, so that it is fused the same way everywhere."""
    x_sum = sums[t, g * entries]
    for e in range(1, entries):
        x_sum += sums[t, g * entries + e]
    centered = center * x_sum
    for r in range(LANES):
        z = total[i, r]
        z += scales[0, r] * (part[i, r] - centered)
        z += scales[1, r] * x_sum
        total[i, r] = z


@inner
def store(total: Floats, i: int, b: int, rows: int, out: Floats, t: int, first: int, add: bool) -> None:
    start = first + b * LANES
    width = min(LANES, rows - b * LANES)
    if add:
        for r in range(width):
            out[t, start + r] += total[i, r]
    else:
        for r in range(width):
            out[t, start + r] = total[i, r]


@inner
def lanes4_one(
    x: Floats, sums: Floats, words: Words, scale: Halves, minimum: Halves, b: int, rows: int, out: Floats, first: int,
    add: bool,
) -> None:
    groups = scale.shape[1]
    words_per_group, entries = words.shape[1] // groups, sums.shape[1] // groups
    center = ONE_F if minimum.shape[0] > 0 else CENTER
    scales = np.zeros((2, LANES), np.float32)
    total = np.empty((1, LANES), np.float32)
    part = np.empty((1, LANES), np.float32)
    clear(total)
    for g in range(groups):
        clear(part)
        for w in range(g * words_per_group, (g + 1) * words_per_group):
            k = w * 8
            a0, a1, a2, a3 = x[0, k], x[0, k + 1], x[0, k + 2], x[0, k + 3]
            a4, a5, a6, a7 = x[0, k + 4], x[0, k + 5], x[0, k + 6], x[0, k + 7]
            for r in range(LANES):
                u = words[b, w, r]
                v0, v1, v2, v3 = unit4(u << U(19)), unit4(u << U(11)), unit4(u << U(3)), unit4(u >> U(5))
                v4, v5, v6, v7 = unit4(u << U(15)), unit4(u << U(7)), unit4(u >> U(1)), unit4(u >> U(9))
                p = dot4(part[0, r], v0, v1, v2, v3, a0, a1, a2, a3)
                part[0, r] = dot4(p, v4, v5, v6, v7, a4, a5, a6, a7)
        read_scales(scale, minimum, TWO_4, b, g, scales)
        close_group(total, part, sums, scales, center, 0, 0, g, entries)
    store(total, 0, b, rows, out, 0, first, add)



@inner
def lanes4_many(
    x: Floats, sums: Floats, words: Words, scale: Halves, minimum: Halves, b: int, rows: int, out: Floats, first: int,
    add: bool, tokens: int,
) -> None:
    groups = scale.shape[1]
    words_per_group, entries = words.shape[1] // groups, sums.shape[1] // groups
    center = ONE_F if minimum.shape[0] > 0 else CENTER
    scales = np.zeros((2, LANES), np.float32)
    total = np.empty((TILE, LANES), np.float32)
    part = np.empty((TILE, LANES), np.float32)
    for t in range(0, tokens, TILE):
        clear(total)
        for g in range(groups):
            clear(part)
            for w in range(g * words_per_group, (g + 1) * words_per_group):
                for h in range(2):
                    k = w * 8 + h * 4
                    shift = U(4 * h)
                    a0, a1, a2, a3 = x[t, k], x[t, k + 1], x[t, k + 2], x[t, k + 3]
                    b0, b1, b2, b3 = x[t + 1, k], x[t + 1, k + 1], x[t + 1, k + 2], x[t + 1, k + 3]
                    c0, c1, c2, c3 = x[t + 2, k], x[t + 2, k + 1], x[t + 2, k + 2], x[t + 2, k + 3]
                    d0, d1, d2, d3 = x[t + 3, k], x[t + 3, k + 1], x[t + 3, k + 2], x[t + 3, k + 3]
                    for r in range(LANES):
                        u = U(words[b, w, r] >> shift)
                        v0, v1, v2, v3 = unit4(u << U(19)), unit4(u << U(11)), unit4(u << U(3)), unit4(u >> U(5))
                        part[0, r] = dot4(part[0, r], v0, v1, v2, v3, a0, a1, a2, a3)
                        part[1, r] = dot4(part[1, r], v0, v1, v2, v3, b0, b1, b2, b3)
                        part[2, r] = dot4(part[2, r], v0, v1, v2, v3, c0, c1, c2, c3)
                        part[3, r] = dot4(part[3, r], v0, v1, v2, v3, d0, d1, d2, d3)
            read_scales(scale, minimum, TWO_4, b, g, scales)
            for i in range(TILE):
                close_group(total, part, sums, scales, center, t + i, i, g, entries)
        for i in range(min(TILE, tokens - t)):
            store(total, i, b, rows, out, t + i, first, add)



@inner
def lanes8_one(
    x: Floats, sums: Floats, words: Words, scale: Halves, minimum: Halves, b: int, rows: int, out: Floats, first: int,
    add: bool,
) -> None:
    groups = scale.shape[1]
    words_per_group, entries = words.shape[1] // groups, sums.shape[1] // groups
    center = ONE_F if minimum.shape[0] > 0 else CENTER
    scales = np.zeros((2, LANES), np.float32)
    total = np.empty((1, LANES), np.float32)
    part = np.empty((1, LANES), np.float32)
    clear(total)
    for g in range(groups):
        clear(part)
        for w in range(g * words_per_group, (g + 1) * words_per_group):
            k = w * 4
            a0, a1, a2, a3 = x[0, k], x[0, k + 1], x[0, k + 2], x[0, k + 3]
            for r in range(LANES):
                u = words[b, w, r]
                v0, v1, v2, v3 = unit8(u << U(15)), unit8(u << U(7)), unit8(u >> U(1)), unit8(u >> U(9))
                part[0, r] = dot4(part[0, r], v0, v1, v2, v3, a0, a1, a2, a3)
        read_scales(scale, minimum, TWO_8, b, g, scales)
        close_group(total, part, sums, scales, center, 0, 0, g, entries)
    store(total, 0, b, rows, out, 0, first, add)



@inner
def lanes8_many(
    x: Floats, sums: Floats, words: Words, scale: Halves, minimum: Halves, b: int, rows: int, out: Floats, first: int,
    add: bool, tokens: int,
) -> None:
    groups = scale.shape[1]
    words_per_group, entries = words.shape[1] // groups, sums.shape[1] // groups
    center = ONE_F if minimum.shape[0] > 0 else CENTER
    scales = np.zeros((2, LANES), np.float32)
    total = np.empty((TILE, LANES), np.float32)
    part = np.empty((TILE, LANES), np.float32)
    for t in range(0, tokens, TILE):
        clear(total)
        for g in range(groups):
            clear(part)
            for w in range(g * words_per_group, (g + 1) * words_per_group):
                k = w * 4
                a0, a1, a2, a3 = x[t, k], x[t, k + 1], x[t, k + 2], x[t, k + 3]
                b0, b1, b2, b3 = x[t + 1, k], x[t + 1, k + 1], x[t + 1, k + 2], x[t + 1, k + 3]
                c0, c1, c2, c3 = x[t + 2, k], x[t + 2, k + 1], x[t + 2, k + 2], x[t + 2, k + 3]
                d0, d1, d2, d3 = x[t + 3, k], x[t + 3, k + 1], x[t + 3, k + 2], x[t + 3, k + 3]
                for r in range(LANES):
                    u = words[b, w, r]
                    v0, v1, v2, v3 = unit8(u << U(15)), unit8(u << U(7)), unit8(u >> U(1)), unit8(u >> U(9))
                    part[0, r] = dot4(part[0, r], v0, v1, v2, v3, a0, a1, a2, a3)
                    part[1, r] = dot4(part[1, r], v0, v1, v2, v3, b0, b1, b2, b3)
                    part[2, r] = dot4(part[2, r], v0, v1, v2, v3, c0, c1, c2, c3)
                    part[3, r] = dot4(part[3, r], v0, v1, v2, v3, d0, d1, d2, d3)
            read_scales(scale, minimum, TWO_8, b, g, scales)
            for i in range(TILE):
                close_group(total, part, sums, scales, center, t + i, i, g, entries)
        for i in range(min(TILE, tokens - t)):
            store(total, i, b, rows, out, t + i, first, add)



@inner
def dense_one(x: Floats, weight: Dense, b: int, rows: int, out: Floats, first: int, add: bool) -> None:
    total = np.empty((1, LANES), np.float32)
    clear(total)
    whole = weight.shape[1] // 4 * 4
    for k in range(0, whole, 4):
        a0, a1, a2, a3 = x[0, k], x[0, k + 1], x[0, k + 2], x[0, k + 3]
        for r in range(LANES):
            v0, v1 = widen(weight[b, k, r]), widen(weight[b, k + 1, r])
            v2, v3 = widen(weight[b, k + 2, r]), widen(weight[b, k + 3, r])
            total[0, r] = dot4(total[0, r], v0, v1, v2, v3, a0, a1, a2, a3)
    for k in range(whole, weight.shape[1]):
        for r in range(LANES):
            total[0, r] += widen(weight[b, k, r]) * x[0, k]
    store(total, 0, b, rows, out, 0, first, add)


@inner
def dense_many(
    x: Floats, weight: Dense, b: int, rows: int, out: Floats, first: int, add: bool, tokens: int
) -> None:
    total = np.empty((TILE, LANES), np.float32)
    whole = weight.shape[1] // 4 * 4
    for t in range(0, tokens, TILE):
        clear(total)
        for k in range(0, whole, 4):
            a0, a1, a2, a3 = x[t, k], x[t, k + 1], x[t, k + 2], x[t, k + 3]
            b0, b1, b2, b3 = x[t + 1, k], x[t + 1, k + 1], x[t + 1, k + 2], x[t + 1, k + 3]
            c0, c1, c2, c3 = x[t + 2, k], x[t + 2, k + 1], x[t + 2, k + 2], x[t + 2, k + 3]
            d0, d1, d2, d3 = x[t + 3, k], x[t + 3, k + 1], x[t + 3, k + 2], x[t + 3, k + 3]
            for r in range(LANES):
                v0, v1 = widen(weight[b, k, r]), widen(weight[b, k + 1, r])
                v2, v3 = widen(weight[b, k + 2, r]), widen(weight[b, k + 3, r])
                total[0, r] = dot4(total[0, r], v0, v1, v2, v3, a0, a1, a2, a3)
                total[1, r] = dot4(total[1, r], v0, v1, v2, v3, b0, b1, b2, b3)
                total[2, r] = dot4(total[2, r], v0, v1, v2, v3, c0, c1, c2, c3)
                total[3, r] = dot4(total[3, r], v0, v1, v2, v3, d0, d1, d2, d3)
        for k in range(whole, weight.shape[1]):
            for i in range(TILE):
                for r in range(LANES):
                    total[i, r] += widen(weight[b, k, r]) * x[t + i, k]
        for i in range(min(TILE, tokens - t)):
            store(total, i, b, rows, out, t + i, first, add)


@kernel
def dense(x: Floats, weight: Dense, rows: int, out: Floats, first: int, add: bool, tokens: int) -> None:
    """out[:tokens, first : first + rows] = (or +=, if add) x W^T"""
    for block in prange(weight.shape[0]):
        b = signed(block)
        if tokens == 1:
            dense_one(x, weight, b, rows, out, first, add)
        else:
            dense_many(x, weight, b, rows, out, first, add, tokens)


@kernel
def lanes(
    x: Floats, sums: Floats, words: Words, scale: Halves, minimum: Halves, rows: int, out: Floats, first: int, add: bool,
    tokens: int,
) -> None:
    """The same for a matrix in 4 or 8 bits."""
    bits = 32 * words.shape[1] // x.shape[1]
    for block in prange(words.shape[0]):
        b = signed(block)
        if tokens == 1:
            if bits == 4:
                lanes4_one(x, sums, words, scale, minimum, b, rows, out, first, add)
            else:
                lanes8_one(x, sums, words, scale, minimum, b, rows, out, first, add)
        elif bits == 4:
            lanes4_many(x, sums, words, scale, minimum, b, rows, out, first, add, tokens)
        else:
            lanes8_many(x, sums, words, scale, minimum, b, rows, out, first, add, tokens)
