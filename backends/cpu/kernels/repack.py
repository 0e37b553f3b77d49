"""GGML's quantized blocks -> lanes of 4 or 8 bits: the same integers, scales and minima in another order, exactly.

weights.py calls one of these per storage type. `raw` is (rows, row bytes); row i of it becomes row first + i of the lanes.
Integers narrower than the lanes are shifted up, and the stored scale holds the factor 2^bits (see linear.py), both
exact. Block layouts: ggml-common.h of llama.cpp, as gguf.quants reads them.
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.arithmetic import half
from backends.cpu.kernels.jit import LANES, inner, kernel, signed

__all__ = ["dense_rows", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Words = NDArray[np.uint32]
Dense = NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.int16]

U, F = np.uint32, np.float32


@inner
def half_at(raw: Bytes, i: int, at: int) -> np.float32:
    return half(U(raw[i, at]) | U(U(raw[i, at + 1]) << U(8)))


@inner
def nibbles(raw: Bytes, i: int, at: int, shift: int) -> np.uint32:
    """A word of eight 4-bit weights, from the low (shift 0) or high (4) halves of eight bytes."""
    word = U(0)
    for j in range(8):
        word |= U(((U(raw[i, at + j]) >> U(shift)) & U(15)) << U(4 * j))
    return word


@inner
def high_bits(raw: Bytes, i: int, at: int) -> np.uint32:
    """32 bits, little endian: the fifth bits of a Q5_0 or Q5_1 block."""
    bits = U(0)
    for j in range(4):
        bits |= U(U(raw[i, at + j]) << U(8 * j))
    return bits


@inner
def k_scale(raw: Bytes, i: int, at: int, g: int) -> np.uint32:
    """6-bit scale of group g (0..7) of a Q4_K or Q5_K block, whose 12 packed bytes begin at `at`."""
    if g < 4:
        return U(raw[i, at + g]) & U(63)
    return U((U(raw[i, at + g + 4]) & U(15)) | U((U(raw[i, at + g - 4]) >> U(6)) << U(4)))


@inner
def k_minimum(raw: Bytes, i: int, at: int, g: int) -> np.uint32:
    if g < 4:
        return U(raw[i, at + g + 4]) & U(63)
    return U((U(raw[i, at + g + 4]) >> U(4)) | U((U(raw[i, at + g]) >> U(6)) << U(4)))


@kernel
def q4_0(raw: Bytes, words: Words, scale: Floats, minimum: Floats, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for g in range(scale.shape[1]):
            at = 18 * g
            scale[b, g, r] = half_at(raw, i, at) * F(16)
            for w in range(4):
                words[b, 4 * g + w, r] = nibbles(raw, i, at + 2 + 8 * (w % 2), 4 * (w // 2))


@kernel
def q4_1(raw: Bytes, words: Words, scale: Floats, minimum: Floats, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for g in range(scale.shape[1]):
            at = 20 * g
            scale[b, g, r] = half_at(raw, i, at) * F(16)
            minimum[b, g, r] = half_at(raw, i, at + 2)
            for w in range(4):
                words[b, 4 * g + w, r] = nibbles(raw, i, at + 4 + 8 * (w % 2), 4 * (w // 2))


@kernel
def q4_k(raw: Bytes, words: Words, scale: Floats, minimum: Floats, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for g in range(scale.shape[1]):
            at = 144 * (g // 8)
            scale[b, g, r] = half_at(raw, i, at) * F(k_scale(raw, i, at + 4, g % 8)) * F(16)
            minimum[b, g, r] = -half_at(raw, i, at + 2) * F(k_minimum(raw, i, at + 4, g % 8))
            for w in range(4):
                words[b, 4 * g + w, r] = nibbles(raw, i, at + 16 + 32 * (g % 8 // 2) + 8 * w, 4 * (g % 2))


@kernel
def q5_0(raw: Bytes, words: Words, scale: Floats, minimum: Floats, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for g in range(scale.shape[1]):
            at = 22 * g
            scale[b, g, r] = half_at(raw, i, at) * F(32)
            fifth = high_bits(raw, i, at + 2)
            for w in range(8):
                word = U(0)
                for j in range(4):
                    k = 4 * w + j
                    q = U((U(raw[i, at + 6 + k % 16]) >> U(4 * (k // 16))) & U(15)) | U(((fifth >> U(k)) & U(1)) << U(4))
                    word |= U(U(q << U(3)) << U(8 * j))
                words[b, 8 * g + w, r] = word


@kernel
def q5_1(raw: Bytes, words: Words, scale: Floats, minimum: Floats, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for g in range(scale.shape[1]):
            at = 24 * g
            scale[b, g, r] = half_at(raw, i, at) * F(32)
            minimum[b, g, r] = half_at(raw, i, at + 2)
            fifth = high_bits(raw, i, at + 4)
            for w in range(8):
                word = U(0)
                for j in range(4):
                    k = 4 * w + j
                    q = U((U(raw[i, at + 8 + k % 16]) >> U(4 * (k // 16))) & U(15)) | U(((fifth >> U(k)) & U(1)) << U(4))
                    word |= U(U(q << U(3)) << U(8 * j))
                words[b, 8 * g + w, r] = word


@kernel
def q5_k(raw: Bytes, words: Words, scale: Floats, minimum: Floats, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for g in range(scale.shape[1]):
            at, s = 176 * (g // 8), g % 8
            scale[b, g, r] = half_at(raw, i, at) * F(k_scale(raw, i, at + 4, s)) * F(32)
            minimum[b, g, r] = -half_at(raw, i, at + 2) * F(k_minimum(raw, i, at + 4, s))
            for w in range(8):
                word = U(0)
                for j in range(4):
                    k = 4 * w + j
                    low = U((U(raw[i, at + 48 + 32 * (s // 2) + k]) >> U(4 * (s % 2))) & U(15))
                    high = U((U(raw[i, at + 16 + k]) >> U(s)) & U(1))
                    word |= U(U(U(low | U(high << U(4))) << U(3)) << U(8 * j))
                words[b, 8 * g + w, r] = word


@kernel
def q6_k(raw: Bytes, words: Words, scale: Floats, minimum: Floats, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for g in range(scale.shape[1]):          # groups of 16
            at, s = 210 * (g // 16), g % 16
            scale[b, g, r] = half_at(raw, i, at + 208) * F(np.int8(raw[i, at + 192 + s])) * F(64)
            for w in range(4):
                word = U(0)
                for j in range(4):
                    k = 16 * s + 4 * w + j        # place in the block: two halves of four quarters of 32
                    part, quarter, column = k // 128, k % 128 // 32, k % 32
                    low = U(raw[i, at + 64 * part + 32 * (quarter % 2) + column]) >> U(4 * (quarter // 2))
                    high = U(raw[i, at + 128 + 32 * part + column]) >> U(2 * quarter)
                    q = U((low & U(15)) | U((high & U(3)) << U(4)))
                    word |= U(U(q << U(2)) << U(8 * j))
                words[b, 4 * g + w, r] = word


@kernel
def q8_0(raw: Bytes, words: Words, scale: Floats, minimum: Floats, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for g in range(scale.shape[1]):
            at = 34 * g
            scale[b, g, r] = half_at(raw, i, at) * F(256)
            for w in range(8):
                word = U(0)
                for j in range(4):
                    word |= U(U(U(raw[i, at + 2 + 4 * w + j]) ^ U(128)) << U(8 * j))    # int8 + 128
                words[b, 8 * g + w, r] = word


@kernel
def dense_rows(raw: Dense, out: Dense, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for k in range(raw.shape[1]):
            out[b, k, r] = raw[i, k]
