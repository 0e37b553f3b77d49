"""Rows -> lanes: GGML's 4-bit and 8-bit blocks at once, everything else one array after another, exactly.

matrices.py calls these. `raw` is (rows, row bytes) or (rows, columns); row i of it becomes row first + i of the lanes. The
stored scale holds the factor 2^bits (see linear.py). Block layouts: ggml-common.h of llama.cpp, as gguf.quants reads them.
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.arithmetic import half
from backends.cpu.kernels.jit import LANES, inner, kernel, signed

__all__ = ["dense_rows", "plane_rows", "q4_0", "q4_1", "q4_k", "q8_0"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Words = NDArray[np.uint32]
Array = NDArray[np.float32] | NDArray[np.uint32] | NDArray[np.uint16] | NDArray[np.int16] | NDArray[np.uint8]

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
def dense_rows(raw: Array, out: Array, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for k in range(raw.shape[1]):
            out[b, k, r] = raw[i, k]


@kernel
def plane_rows(q: Bytes, words: Words, bits: int, down: int, first: int) -> None:
    """Bits down .. down + bits of integers (rows, columns): one of the planes that planes.py describes."""
    per = 32 // bits
    mask = U(U(U(1) << U(bits)) - U(1))
    for row in prange(q.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for w in range(words.shape[1]):
            word = U(0)
            for j in range(per):
                word |= U(U(U(q[i, w * per + j] >> U(down)) & mask) << U(8 * (j % 4) + bits * (j // 4)))
            words[b, w, r] = word
