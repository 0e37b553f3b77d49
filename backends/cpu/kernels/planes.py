"""y = x W^T for weights of 2 to 6 bits that rest in planes: the low bits in words of their own, the high bits in others.

Rows are lanes and every output is summed in one fixed order, as in linear.py. Four weights become the four bytes of a
word by rotations and masks, so that one compiled kernel serves every width; a byte under the exponent of 1.0 is the float
1 + byte / 256. Numba compiles once more only for what is None:

low         8 / bits fields of four weights: weight 4 m + f of a word stands at bit 8 f + bits m
high        likewise the bits above those, or None
codebook    16 bytes in four words, of which the low bits choose one, or None
scale       float32 or the bits of float16, for one or more groups; minimum the same, or without blocks
factor      what a scale is of 2^bits, or of 256 with a codebook
fine        4 x (int8 + 128) a word, by which a group's scale is multiplied, or without blocks; fine_minimum likewise
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.arithmetic import dot4, widen
from backends.cpu.kernels.groups import GROUP
from backends.cpu.kernels.jit import LANES, helper, inner, kernel, signed
from backends.cpu.kernels.linear import CENTER, ONE, TILE, clear, store

__all__ = ["FINE", "planes"]

Floats = NDArray[np.float32]
Words = NDArray[np.uint32]
Scales = NDArray[np.float32] | NDArray[np.int16]
Codebook = tuple[np.uint32, np.uint32, np.uint32, np.uint32] | None
Plane = tuple[np.uint32, np.uint32, np.uint32, np.uint32]     # bits, log2 of a word's fields, place in a byte, mask
Four = tuple[np.float32, np.float32, np.float32, np.float32]

FINE = 4           # groups of a word of fine scales

U = np.uint32
BYTE = U(0x007F8000)                 # a byte at the head of the mantissa


@inner
def plane_of(bits: int, above: int) -> Plane:
    """How a plane's words are read, whose bits stand below `above` others of a weight."""
    log_fields = 3 - (bits > 1) - (bits > 2)
    up = 8 - above - bits                        # where the bits stand in a byte that is full to the left
    return U(bits), U(log_fields), U(up), U(((1 << bits) - 1 << up) * 0x01010101)


@inner
def place_of(plane: Plane, i: int) -> tuple[np.int64, np.uint32]:
    """Which word has the bits of the weights 4 i .. 4 i + 3, and the rotation to the left that brings them in place."""
    bits, log_fields, up, _ = plane
    m = U(U(i) & U(U(U(1) << log_fields) - U(1)))
    return i >> np.int64(log_fields), U(U(up - U(m * bits)) & U(31))


@inner
def rotated(word: np.uint32, left: np.uint32) -> np.uint32:
    return U(U(word << left) | U(word >> U(U(U(0) - left) & U(31))))


@inner
def four_bytes(
    low: np.uint32, left: np.uint32, low_plane: Plane, high: np.uint32, high_left: np.uint32, high_plane: Plane
) -> np.uint32:
    """The bytes of four weights, full to the left, from the words that hold their bits."""
    return U(U(rotated(low, left) & low_plane[3]) | U(rotated(high, high_left) & high_plane[3]))


@inner
def word_of(high: Words | None, b: int, w: np.int64, r: int) -> np.uint32:
    if high is None:
        return U(0)
    return U(high[b, w, r])


@inner
def coded(q: np.uint32, codebook: tuple[np.uint32, np.uint32, np.uint32, np.uint32]) -> np.float32:
    """1 + byte / 256 for the codebook's byte number q; conditions become blends, where a load would be a slow gather."""
    low = codebook[1] if q & U(4) else codebook[0]
    high = codebook[3] if q & U(4) else codebook[2]
    word = high if q & U(8) else low
    return U(U(U(U(word >> U(U(q & U(3)) << U(3))) & U(255)) << U(15)) | ONE).view(np.float32)


@inner
def unit(bits: np.uint32) -> np.float32:
    return U((bits & BYTE) | ONE).view(np.float32)


@inner
def units(u: np.uint32, codebook: Codebook) -> Four:
    """1 + byte / 256 of the four bytes; with a codebook they are full to the left with a number of it."""
    if codebook is None:
        return unit(u << U(15)), unit(u << U(7)), unit(u >> U(1)), unit(u >> U(9))
    return (
        coded(U(u >> U(4)) & U(15), codebook), coded(U(u >> U(12)) & U(15), codebook),
        coded(U(u >> U(20)) & U(15), codebook), coded(U(u >> U(28)), codebook),
    )  # fmt: skip


@inner
def read_scales(coarse: Scales, fine: Words, factor: np.float32, b: int, g: int, c: int, scales: Floats) -> int:
    """Where in `scales` those of group g are: a coarse one alone, or times fine ones, of which four are read at once."""
    if fine.shape[0] == 0:
        for r in range(scales.shape[1]):
            scales[0, r] = widen(coarse[b, c, r]) * factor
        return 0
    if g % FINE == 0:
        for r in range(LANES):
            u, s = fine[b, g // FINE, r], widen(coarse[b, c, r]) * factor
            scales[0, r], scales[1, r] = times(s, u), times(s, U(u >> U(8)))
            scales[2, r], scales[3, r] = times(s, U(u >> U(16))), times(s, U(u >> U(24)))
    return g % FINE


@inner
def times(scale: np.float32, fine: np.uint32) -> np.float32:
    return scale * np.float32(np.int32(np.int32(fine & U(255)) - np.int32(128)))


@helper
def close(
    total: Floats, part: Floats, i: int, tile: int, sums: Floats, t: int, g: int, entries: int, scales: Floats,
    minima: Floats, at: int, center: np.float32,
) -> None:  # fmt: skip
    """Add group g's part to the total; each statement has one product, so that it is fused the same way everywhere."""
    x_sum = sums[t, g * entries]
    for e in range(1, entries):
        x_sum += sums[t, g * entries + e]
    centered = center * x_sum
    for r in range(LANES):
        z = total[i, r]
        z += scales[at, r] * (part[i, r] + part[i + tile, r] - centered)
        z += minima[at, r] * x_sum
        total[i, r] = z


@inner
def planes_one(
    x: Floats, sums: Floats, low: Words, low_plane: Plane, high: Words | None, high_plane: Plane, codebook: Codebook,
    scale: Scales, minimum: Scales, factor: np.float32, fine: Words, fine_minimum: Words, group: int, columns: int,
    b: int, rows: int, out: Floats, first: int, add: bool,
) -> None:  # fmt: skip
    supers, entries, affine = scale.shape[1], group // GROUP, minimum.shape[0] > 0
    per = columns // (group * supers)      # groups of a coarse scale
    total, part = np.zeros((1, LANES), np.float32), np.empty((2, LANES), np.float32)
    scales, minima = np.empty((FINE, LANES), np.float32), np.zeros((FINE, LANES), np.float32)
    center = np.float32(1) if affine else CENTER
    for c in range(supers):
        for g in range(c * per, (c + 1) * per):
            clear(part)
            for k in range(g * group, (g + 1) * group, 8):
                w, first_left = place_of(low_plane, k // 4)
                h, first_high = place_of(high_plane, k // 4)
                _, second_left = place_of(low_plane, k // 4 + 1)       # in the same words
                _, second_high = place_of(high_plane, k // 4 + 1)
                a0, a1, a2, a3 = x[0, k], x[0, k + 1], x[0, k + 2], x[0, k + 3]
                a4, a5, a6, a7 = x[0, k + 4], x[0, k + 5], x[0, k + 6], x[0, k + 7]
                for r in range(LANES):
                    u, v = low[b, w, r], word_of(high, b, h, r)
                    v0, v1, v2, v3 = units(four_bytes(u, first_left, low_plane, v, first_high, high_plane), codebook)
                    v4, v5, v6, v7 = units(four_bytes(u, second_left, low_plane, v, second_high, high_plane), codebook)
                    part[0, r] = dot4(part[0, r], v0, v1, v2, v3, a0, a1, a2, a3)
                    part[1, r] = dot4(part[1, r], v4, v5, v6, v7, a4, a5, a6, a7)
            at = read_scales(scale, fine, factor, b, g, c, scales)
            if affine:
                read_scales(minimum, fine_minimum, np.float32(1), b, g, c, minima)
            close(total, part, 0, 1, sums, 0, g, entries, scales, minima, at, center)
    store(total, 0, b, rows, out, 0, first, add)


@helper
def four_tokens(
    x: Floats, t: int, k: int, low: Words, low_plane: Plane, high: Words | None, high_plane: Plane, codebook: Codebook,
    b: int, part: Floats, p: int,
) -> None:  # fmt: skip
    """Add columns k .. k + 3 of tokens t .. t + 3 to the rows p .. p + 3 of part."""
    a0, a1, a2, a3 = x[t, k], x[t, k + 1], x[t, k + 2], x[t, k + 3]
    b0, b1, b2, b3 = x[t + 1, k], x[t + 1, k + 1], x[t + 1, k + 2], x[t + 1, k + 3]
    c0, c1, c2, c3 = x[t + 2, k], x[t + 2, k + 1], x[t + 2, k + 2], x[t + 2, k + 3]
    d0, d1, d2, d3 = x[t + 3, k], x[t + 3, k + 1], x[t + 3, k + 2], x[t + 3, k + 3]
    w, left = place_of(low_plane, k // 4)
    h, high_left = place_of(high_plane, k // 4)
    for r in range(LANES):
        u = four_bytes(low[b, w, r], left, low_plane, word_of(high, b, h, r), high_left, high_plane)
        v0, v1, v2, v3 = units(u, codebook)
        part[p, r] = dot4(part[p, r], v0, v1, v2, v3, a0, a1, a2, a3)
        part[p + 1, r] = dot4(part[p + 1, r], v0, v1, v2, v3, b0, b1, b2, b3)
        part[p + 2, r] = dot4(part[p + 2, r], v0, v1, v2, v3, c0, c1, c2, c3)
        part[p + 3, r] = dot4(part[p + 3, r], v0, v1, v2, v3, d0, d1, d2, d3)


@inner
def planes_many(
    x: Floats, sums: Floats, low: Words, low_plane: Plane, high: Words | None, high_plane: Plane, codebook: Codebook,
    scale: Scales, minimum: Scales, factor: np.float32, fine: Words, fine_minimum: Words, group: int, columns: int,
    b: int, rows: int, out: Floats, first: int, add: bool, tokens: int,
) -> None:  # fmt: skip
    supers, entries, affine = scale.shape[1], group // GROUP, minimum.shape[0] > 0
    per = columns // (group * supers)
    total, part = np.empty((TILE, LANES), np.float32), np.empty((2 * TILE, LANES), np.float32)
    scales, minima = np.empty((FINE, LANES), np.float32), np.zeros((FINE, LANES), np.float32)
    center = np.float32(1) if affine else CENTER
    for t in range(0, tokens, TILE):
        clear(total)
        for c in range(supers):
            for g in range(c * per, (c + 1) * per):
                clear(part)
                for k in range(g * group, (g + 1) * group, 8):
                    four_tokens(x, t, k, low, low_plane, high, high_plane, codebook, b, part, 0)
                    four_tokens(x, t, k + 4, low, low_plane, high, high_plane, codebook, b, part, TILE)
                at = read_scales(scale, fine, factor, b, g, c, scales)
                if affine:
                    read_scales(minimum, fine_minimum, np.float32(1), b, g, c, minima)
                for j in range(TILE):
                    close(total, part, j, TILE, sums, t + j, g, entries, scales, minima, at, center)
        for j in range(min(TILE, tokens - t)):
            store(total, j, b, rows, out, t + j, first, add)


@kernel
def planes(
    x: Floats, sums: Floats, low: Words, low_bits: int, high: Words | None, high_bits: int, codebook: Codebook,
    scale: Scales, minimum: Scales, factor: np.float32, fine: Words, fine_minimum: Words, group: int, rows: int,
    out: Floats, first: int, add: bool, tokens: int,
) -> None:  # fmt: skip
    """out[:tokens, first : first + rows] = (or +=, if add) x W^T. group: columns of a group, 16 or 32."""
    columns = 32 // low_bits * low.shape[1]
    for block in prange(low.shape[0]):
        b = signed(block)
        low_plane, high_plane = plane_of(low_bits, high_bits), plane_of(max(high_bits, 1), 0)
        if tokens == 1:
            planes_one(
                x, sums, low, low_plane, high, high_plane, codebook, scale, minimum, factor, fine, fine_minimum, group,
                columns, b, rows, out, first, add,
            )  # fmt: skip
        else:
            planes_many(
                x, sums, low, low_plane, high, high_plane, codebook, scale, minimum, factor, fine, fine_minimum, group,
                columns, b, rows, out, first, add, tokens,
            )  # fmt: skip
