"""The blocks of the grid types (IQ1, IQ2, IQ3): where indices, signs and scales stand in them. grids.py multiplies them.

Byte (b, k, r) is byte k of row 32 b + r of the file. The class of `kind` tells the type, so that Numba compiles only those
that a model has. Layouts: ggml-common.h of llama.cpp, as gguf.quants reads them; the tables are gguf's own.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from gguf import quants
from numba.extending import overload
from numpy.typing import NDArray

from backends.cpu.kernels.arithmetic import half
from backends.cpu.kernels.jit import inner

__all__ = ["KINDS", "Kind", "decode", "grid_kind"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Words = NDArray[np.uint32]

U, F = np.uint32, np.float32


class Iq1S(NamedTuple):
    table: Words           # entry n: its values as the bytes of words, see grid_kind


class Iq1M(NamedTuple):
    table: Words


class Iq2Xxs(NamedTuple):
    table: Words


class Iq2Xs(NamedTuple):
    table: Words


class Iq2S(NamedTuple):
    table: Words


class Iq3Xxs(NamedTuple):
    table: Words


class Iq3S(NamedTuple):
    table: Words


Kind = Iq1S | Iq1M | Iq2Xxs | Iq2Xs | Iq2S | Iq3Xxs | Iq3S
KINDS: dict[str, type[Kind]] = {
    "IQ1_S": Iq1S, "IQ1_M": Iq1M, "IQ2_XXS": Iq2Xxs, "IQ2_XS": Iq2Xs, "IQ2_S": Iq2S, "IQ3_XXS": Iq3Xxs, "IQ3_S": Iq3S,
}  # fmt: skip


@cache
def grid_kind(storage: str) -> Kind:
    """The type with gguf's table of it: a byte per value; those of IQ1 (-1, 0, 1) as (value + 1) 64."""
    reference = getattr(quants, storage)
    reference.init_grid()
    values = np.asarray(reference.grid, np.float32).reshape(reference.grid_shape)
    if storage.startswith("IQ1"):
        values = (values + 1) * 64
    return KINDS[storage](np.ascontiguousarray(values.astype(np.uint8)).view(np.uint32).reshape(-1))


@inner
def byte(blocks: Bytes, b: int, at: int, r: int) -> np.uint32:
    return U(blocks[b, at, r])


@inner
def short(blocks: Bytes, b: int, at: int, r: int) -> np.uint32:
    return U(U(blocks[b, at, r]) | U(U(blocks[b, at + 1, r]) << U(8)))


@inner
def word(blocks: Bytes, b: int, at: int, r: int) -> np.uint32:
    return U(short(blocks, b, at, r) | U(short(blocks, b, at + 2, r) << U(16)))


@inner
def bits(u: np.uint32, start: int, count: int) -> np.uint32:
    return U(U(u >> U(start)) & U(U(U(1) << U(count)) - U(1)))


@inner
def even_signs(u: np.uint32) -> np.uint32:
    """Eight signs of seven: an even number of them is set."""
    p = U(u ^ U(u >> U(4)))
    p = U(p ^ U(p >> U(2)))
    return U(u | U(U(U(p ^ U(p >> U(1))) & U(1)) << U(7)))


def decode(kind: Kind, blocks: Bytes, b: int, at: int, g: int, w: int, codes: Words, scales: Floats) -> None:
    """The eight weights 32 g + 8 w .. of the block at byte `at` of 32 rows: (1 + byte / 256) scale + offset, with signs.

    codes: two indices of the table for the eight bytes, and the signs as bits; scales: scale and offset, which stay as
    they are where the weights before had the same. To be called for w = 0, 1, 2, 3.
    """
    raise NotImplementedError("only compiled code calls this")


@overload(decode)
def _decode(
    kind: Kind, blocks: Bytes, b: int, at: int, g: int, w: int, codes: Words, scales: Floats
) -> Callable[..., None]:    # Numba gives types, and wants the signature of what it compiles to the letter
    functions: dict[type[Kind], Callable[..., None]] = {
        Iq1S: iq1_s, Iq1M: iq1_m, Iq2Xxs: iq2_xxs, Iq2Xs: iq2_xs, Iq2S: iq2_s, Iq3Xxs: iq3_xxs, Iq3S: iq3_s,
    }  # fmt: skip
    return functions[kind.instance_class]  # type: ignore[union-attr]


# Loops of one store each, of a length that LLVM does not know: only those does it turn into vector code.


def iq1_s(kind: Kind, blocks: Bytes, b: int, at: int, g: int, w: int, codes: Words, scales: Floats) -> None:
    lanes, high = codes.shape[1], at + 34 + 2 * g
    for r in range(lanes):
        n = byte(blocks, b, at + 2 + 4 * g + w, r) | U(bits(short(blocks, b, high, r), 3 * w, 3) << U(8))
        codes[0, r] = U(2) * n
    twin(codes)
    if w == 0:
        for r in range(lanes):
            codes[2, r] = U(0)
        for r in range(lanes):
            scales[0, r] = half(short(blocks, b, at, r)) * odd(bits(short(blocks, b, high, r), 12, 3)) * F(4)
        for r in range(lanes):
            scales[1, r] = scales[0, r] * iq1_offset(bits(short(blocks, b, high, r), 15, 1))


def iq1_m(kind: Kind, blocks: Bytes, b: int, at: int, g: int, w: int, codes: Words, scales: Floats) -> None:
    lanes, high, shift = codes.shape[1], at + 32 + 2 * g + w // 2, 4 * (w % 2)
    for r in range(lanes):
        n = byte(blocks, b, at + 4 * g + w, r) | U(bits(byte(blocks, b, high, r), shift, 3) << U(8))
        codes[0, r] = U(2) * n
    twin(codes)
    if w == 0:
        for r in range(lanes):
            codes[2, r] = U(0)
    if w % 2 == 0:
        at_fine, fine_shift = at + 48 + g // 2 * 2, 6 * (g % 2) + w // 2 * 3
        for r in range(lanes):
            first, second = bits(byte(blocks, b, at + 49, r), 4, 4), bits(byte(blocks, b, at + 51, r), 4, 4)
            third, fourth = bits(byte(blocks, b, at + 53, r), 4, 4), bits(byte(blocks, b, at + 55, r), 4, 4)
            scales[0, r] = half(U(U(first | U(second << U(4))) | U(U(third << U(8)) | U(fourth << U(12)))))
        for r in range(lanes):
            scales[0, r] *= odd(bits(short(blocks, b, at_fine, r), fine_shift, 3)) * F(4)
    for r in range(lanes):
        scales[1, r] = scales[0, r] * iq1_offset(bits(byte(blocks, b, high, r), shift + 3, 1))


@inner
def twin(codes: Words) -> None:
    """The second index: an entry of the table is two words."""
    for r in range(codes.shape[1]):
        codes[1, r] = codes[0, r] + U(1)


@inner
def odd(u: np.uint32) -> np.float32:
    return F(np.int32(u)) * F(2) + F(1)


@inner
def iq1_offset(negative: np.uint32) -> np.float32:
    """In quarters of the scale, what stands beside 1 + (value + 1) / 4 to make value / 4 + 1/32, or - 1/32 if negative."""
    return F(-1.21875) - F(np.int32(negative)) * F(0.0625)


@inner
def scale_and_centre(blocks: Bytes, b: int, at: int, fine: int, shift: int, factor: np.float32, scales: Floats) -> None:
    """(scale of the block) (4 bits of byte `fine` + 1/2) factor, and minus that."""
    for r in range(scales.shape[1]):
        n = F(np.int32(bits(byte(blocks, b, fine, r), shift, 4)))
        scales[0, r] = half(short(blocks, b, at, r)) * (n + F(0.5)) * factor
    for r in range(scales.shape[1]):
        scales[1, r] = -scales[0, r]


def iq2_xxs(kind: Kind, blocks: Bytes, b: int, at: int, g: int, w: int, codes: Words, scales: Floats) -> None:
    for r in range(codes.shape[1]):
        codes[0, r] = U(2) * byte(blocks, b, at + 2 + 8 * g + w, r)
    twin(codes)
    for r in range(codes.shape[1]):
        codes[2, r] = even_signs(bits(word(blocks, b, at + 6 + 8 * g, r), 7 * w, 7))
    if w == 0:
        scale_and_centre(blocks, b, at, at + 9 + 8 * g, 4, F(64), scales)


def iq2_xs(kind: Kind, blocks: Bytes, b: int, at: int, g: int, w: int, codes: Words, scales: Floats) -> None:
    for r in range(codes.shape[1]):
        codes[0, r] = U(2) * bits(short(blocks, b, at + 2 + 8 * g + 2 * w, r), 0, 9)
    twin(codes)
    for r in range(codes.shape[1]):
        codes[2, r] = even_signs(bits(byte(blocks, b, at + 3 + 8 * g + 2 * w, r), 1, 7))
    if w % 2 == 0:
        scale_and_centre(blocks, b, at, at + 66 + g, w // 2 * 4, F(64), scales)


def iq2_s(kind: Kind, blocks: Bytes, b: int, at: int, g: int, w: int, codes: Words, scales: Floats) -> None:
    for r in range(codes.shape[1]):
        n = byte(blocks, b, at + 2 + 4 * g + w, r) | U(bits(byte(blocks, b, at + 66 + g, r), 2 * w, 2) << U(8))
        codes[0, r] = U(2) * n
    twin(codes)
    for r in range(codes.shape[1]):
        codes[2, r] = byte(blocks, b, at + 34 + 4 * g + w, r)
    if w % 2 == 0:
        scale_and_centre(blocks, b, at, at + 74 + g, w // 2 * 4, F(64), scales)


def iq3_xxs(kind: Kind, blocks: Bytes, b: int, at: int, g: int, w: int, codes: Words, scales: Floats) -> None:
    for r in range(codes.shape[1]):
        codes[0, r] = byte(blocks, b, at + 2 + 8 * g + 2 * w, r)
    for r in range(codes.shape[1]):
        codes[1, r] = byte(blocks, b, at + 3 + 8 * g + 2 * w, r)
    for r in range(codes.shape[1]):
        codes[2, r] = even_signs(bits(word(blocks, b, at + 66 + 4 * g, r), 7 * w, 7))
    if w == 0:
        scale_and_centre(blocks, b, at, at + 69 + 4 * g, 4, F(128), scales)


def iq3_s(kind: Kind, blocks: Bytes, b: int, at: int, g: int, w: int, codes: Words, scales: Floats) -> None:
    at_first, high = at + 2 + 8 * g + 2 * w, at + 66 + g
    for r in range(codes.shape[1]):
        codes[0, r] = byte(blocks, b, at_first, r) | U(bits(byte(blocks, b, high, r), 2 * w, 1) << U(8))
    for r in range(codes.shape[1]):
        codes[1, r] = byte(blocks, b, at_first + 1, r) | U(bits(byte(blocks, b, high, r), 2 * w + 1, 1) << U(8))
    for r in range(codes.shape[1]):
        codes[2, r] = byte(blocks, b, at + 74 + 4 * g + w, r)
    if w == 0:      # 2 (n + 1/2) is the odd number that the format has
        scale_and_centre(blocks, b, at, at + 106 + g // 2, 4 * (g % 2), F(512), scales)
