"""y = x W^T for the grid types: the file's own blocks, decoded where they are multiplied. ops.py calls it.

Rows are lanes and every output is summed over its columns in one fixed order: weights 0 .. 3 of every eight in one sum,
4 .. 7 in another, the two added at the end. Weights pass through a tile of 32 columns, which several tokens share.
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.arithmetic import dot4
from backends.cpu.kernels.grid_blocks import Kind, decode
from backends.cpu.kernels.jit import LANES, helper, inner, kernel, signed
from backends.cpu.kernels.linear import ONE, TILE, store

__all__ = ["grids"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Words = NDArray[np.uint32]

SHARING = 32              # tokens that share a tile: their totals, their x and the tile stay in the L1 cache
PARTS, CODES = 8, 4       # of a block of 256 weights: 8 parts of 32, each with 4 codes of 8

U = np.uint32
BYTE, SIGN = U(0x007F8000), U(0x80000000)


@inner
def weight(code: np.uint32, signs: np.uint32, scale: np.float32, offset: np.float32) -> np.float32:
    """code: a byte at the head of the mantissa; signs: one at the head of the word. The sum is fused: rounded once."""
    value = U(U(code & BYTE) | ONE).view(np.float32) * scale + offset
    return U(np.float32(value).view(np.uint32) ^ U(signs & SIGN)).view(np.float32)


@helper
def four(u: np.uint32, s: np.uint32, a: np.float32, m: np.float32) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """The weights of a word's bytes; s: their signs, the first one in bit 28."""
    return (
        weight(U(u << U(15)), U(s << U(3)), a, m), weight(U(u << U(7)), U(s << U(2)), a, m),
        weight(U(u >> U(1)), U(s << U(1)), a, m), weight(U(u >> U(9)), s, a, m),
    )  # fmt: skip


@inner
def fill_tile(kind: Kind, blocks: Bytes, b: int, at: int, g: int, codes: Words, scales: Floats, tile: Floats) -> None:
    """The 32 columns of part g of a block: weight 8 w + j in tile[j, w]."""
    for w in range(CODES):
        decode(kind, blocks, b, at, g, w, codes, scales)
        for e in range(2):
            for r in range(codes.shape[1]):      # a length that LLVM does not know: it would unroll the loop instead
                codes[e, r] = kind.table[codes[e, r]]
        for r in range(LANES):
            s, a, m = codes[2, r], scales[0, r], scales[1, r]
            tile[0, w, r], tile[1, w, r], tile[2, w, r], tile[3, w, r] = four(codes[0, r], U(s << U(28)), a, m)
            tile[4, w, r], tile[5, w, r], tile[6, w, r], tile[7, w, r] = four(codes[1, r], U(s << U(24)), a, m)


@helper
def one_token(x: Floats, k: int, tile: Floats, w: int, total: Floats) -> None:
    """four_tokens() twice for a token without company: the same sums in the same order."""
    a0, a1, a2, a3 = x[0, k], x[0, k + 1], x[0, k + 2], x[0, k + 3]
    a4, a5, a6, a7 = x[0, k + 4], x[0, k + 5], x[0, k + 6], x[0, k + 7]
    for r in range(LANES):
        v0, v1, v2, v3 = tile[0, w, r], tile[1, w, r], tile[2, w, r], tile[3, w, r]
        v4, v5, v6, v7 = tile[4, w, r], tile[5, w, r], tile[6, w, r], tile[7, w, r]
        total[0, 0, r] = dot4(total[0, 0, r], v0, v1, v2, v3, a0, a1, a2, a3)
        total[TILE, 0, r] = dot4(total[TILE, 0, r], v4, v5, v6, v7, a4, a5, a6, a7)


@helper
def four_tokens(x: Floats, t: int, k: int, tile: Floats, j: int, w: int, total: Floats, i: int) -> None:
    """Add columns k .. k + 3 of tokens t .. t + 3, whose weights are tile[j .. j + 3, w], to total[j .. j + 3, i]."""
    a0, a1, a2, a3 = x[t, k], x[t, k + 1], x[t, k + 2], x[t, k + 3]
    b0, b1, b2, b3 = x[t + 1, k], x[t + 1, k + 1], x[t + 1, k + 2], x[t + 1, k + 3]
    c0, c1, c2, c3 = x[t + 2, k], x[t + 2, k + 1], x[t + 2, k + 2], x[t + 2, k + 3]
    d0, d1, d2, d3 = x[t + 3, k], x[t + 3, k + 1], x[t + 3, k + 2], x[t + 3, k + 3]
    for r in range(LANES):
        v0, v1, v2, v3 = tile[j, w, r], tile[j + 1, w, r], tile[j + 2, w, r], tile[j + 3, w, r]
        total[j, i, r] = dot4(total[j, i, r], v0, v1, v2, v3, a0, a1, a2, a3)
        total[j + 1, i, r] = dot4(total[j + 1, i, r], v0, v1, v2, v3, b0, b1, b2, b3)
        total[j + 2, i, r] = dot4(total[j + 2, i, r], v0, v1, v2, v3, c0, c1, c2, c3)
        total[j + 3, i, r] = dot4(total[j + 3, i, r], v0, v1, v2, v3, d0, d1, d2, d3)


@inner
def grid_rows(
    x: Floats, kind: Kind, blocks: Bytes, size: int, b: int, rows: int, out: Floats, first: int, add: bool, tokens: int
) -> None:
    total = np.empty((2 * TILE, SHARING // TILE, LANES), np.float32)
    tile = np.empty((8, CODES, LANES), np.float32)
    codes, scales = np.empty((3, LANES), np.uint32), np.empty((2, LANES), np.float32)
    for start in range(0, tokens, SHARING):
        some = min(SHARING, tokens - start)
        total[:] = 0
        for part in range(blocks.shape[1] // size * PARTS):
            fill_tile(kind, blocks, b, part // PARTS * size, part % PARTS, codes, scales, tile)
            for w in range(CODES):
                k = (part * CODES + w) * 8
                if tokens == 1:
                    one_token(x, k, tile, w, total)
                else:
                    for i in range(0, some, TILE):
                        four_tokens(x, start + i, k, tile, 0, w, total, i // TILE)
                        four_tokens(x, start + i, k + 4, tile, TILE, w, total, i // TILE)
        for i in range(some):
            for r in range(LANES):
                total[i % TILE, i // TILE, r] += total[TILE + i % TILE, i // TILE, r]
            store(total[i % TILE], i // TILE, b, rows, out, start + i, first, add)


@kernel
def grids(
    x: Floats, kind: Kind, blocks: Bytes, size: int, rows: int, out: Floats, first: int, add: bool, tokens: int
) -> None:
    """out[:tokens, first : first + rows] = (or +=, if add) x W^T. size: bytes of a block of 256 weights."""
    for block in prange(blocks.shape[0]):
        grid_rows(x, kind, blocks, size, signed(block), rows, out, first, add, tokens)
