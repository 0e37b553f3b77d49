"""Rows -> lanes: GGML's 4-bit and 8-bit blocks at once, everything else one array after another, exactly.

packing.py calls these. `raw` is (rows, row bytes) or (rows, columns); row i of it becomes row first + i of the lanes. Block
layouts: ggml-common.h of llama.cpp, as gguf.quants reads them.
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.jit import LANES, inner, kernel, signed

__all__ = ["dense_rows", "plane_rows", "q4_0", "q4_1", "q8_0"]

Bytes = NDArray[np.uint8]
Halves = NDArray[np.int16]     # the bits of float16
Words = NDArray[np.uint32]
Array = NDArray[np.float32] | NDArray[np.uint32] | NDArray[np.uint16] | NDArray[np.int16] | NDArray[np.uint8]

U = np.uint32


@inner
def half_at(raw: Bytes, i: int, at: int) -> np.int16:
    """The bits of a float16."""
    return np.int16(np.uint16(raw[i, at]) | np.uint16(np.uint16(raw[i, at + 1]) << np.uint16(8)))


@inner
def nibbles(raw: Bytes, i: int, at: int, shift: int) -> np.uint32:
    """A word of eight 4-bit weights, from the low (shift 0) or high (4) halves of eight bytes; its layout: planes.py."""
    word = U(0)
    for j in range(8):
        word |= U(((U(raw[i, at + j]) >> U(shift)) & U(15)) << U(8 * (j % 4) + 4 * (j // 4)))
    return word


@kernel
def q4_0(raw: Bytes, words: Words, scale: Halves, minimum: Halves, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for g in range(scale.shape[1]):
            at = 18 * g
            scale[b, g, r] = half_at(raw, i, at)
            for w in range(4):
                words[b, 4 * g + w, r] = nibbles(raw, i, at + 2 + 8 * (w % 2), 4 * (w // 2))


@kernel
def q4_1(raw: Bytes, words: Words, scale: Halves, minimum: Halves, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for g in range(scale.shape[1]):
            at = 20 * g
            scale[b, g, r] = half_at(raw, i, at)
            minimum[b, g, r] = half_at(raw, i, at + 2)
            for w in range(4):
                words[b, 4 * g + w, r] = nibbles(raw, i, at + 4 + 8 * (w % 2), 4 * (w // 2))


@kernel
def q8_0(raw: Bytes, words: Words, scale: Halves, minimum: Halves, first: int) -> None:
    for row in prange(raw.shape[0]):
        i = signed(row)
        b, r = (first + i) // LANES, (first + i) % LANES
        for g in range(scale.shape[1]):
            at = 34 * g
            scale[b, g, r] = half_at(raw, i, at)
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
