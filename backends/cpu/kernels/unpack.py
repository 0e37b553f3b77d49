"""GGML's blocks -> integers, scales and minima as NumPy arrays, exactly: what planes.py reads once repack.py placed them.

packing.py unpacks some rows at a time. A weight is (q - 2^bits / 2) scale, or q scale + minimum where there are minima,
or codebook[q] scale; a fine scale multiplies the scale of its group. Scales are the file's float16 where it has them. Block
layouts: ggml-common.h of llama.cpp, as gguf.quants reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import quants
from numpy.typing import NDArray

from backends.cpu.kernels.planes import Codebook

__all__ = ["FORMATS", "Format", "Unpacked"]

Bytes = NDArray[np.uint8]
Integers = NDArray[np.integer]
Scales = NDArray[np.float16] | NDArray[np.float32]

PAIRS = np.arange(0, 8, 2, dtype=np.uint8)[:, None]       # shifts to the four 2-bit fields of a byte
SINGLES = np.arange(8, dtype=np.uint8)[:, None]


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Some rows of blocks, as (rows, blocks, ...)."""

    q: Integers                                      # a block's weights, in any shape
    scale: Scales
    minimum: Scales | None = None
    fine: Integers | None = None                    # -128 .. 127
    fine_minimum: Integers | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """How a storage type rests in planes. group: columns of a group. unpack takes blocks, (rows, blocks, bytes)."""

    low: int                                        # bits of the planes
    high: int
    group: int
    unpack: Callable[[Bytes], Unpacked]
    codebook: str = ""                              # gguf's class with the values that q chooses from
    wide: bool = False                              # scales are float32: they exceed float16

    @property
    def unit(self) -> float:
        """What a scale is of one step of q, see codebook_of()."""
        return 1 / 8 if self.codebook.endswith("FP4") else 1


def halves(blocks: Bytes, at: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)


def nibbles(blocks: Bytes, run: int) -> Integers:
    """The low halves of each `run` bytes, then their high halves."""
    b = blocks.reshape(*blocks.shape[:-1], -1, 1, run)
    return np.concatenate([b & 15, b >> 4], axis=-2)


def fifth_bits(blocks: Bytes) -> Integers:
    return np.unpackbits(blocks, axis=-1, bitorder="little") << 4


def fields(blocks: Bytes) -> Integers:
    """The 2-bit fields of each 32 bytes: all first ones, all second ones, and so on."""
    return (blocks.reshape(*blocks.shape[:-1], -1, 1, 32) >> PAIRS) & 3


def flat(values: Integers, blocks: Bytes) -> Integers:
    return values.reshape(*blocks.shape[:-1], -1)


def six_bits(packed: Bytes) -> tuple[Integers, Integers]:
    """The eight scales and the eight minima in the 12 bytes of a Q4_K or Q5_K block."""
    a, b, rest = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([a & 63, (rest & 15) | (a >> 6 << 4)], axis=-1)
    return scales, np.concatenate([b & 63, (rest >> 4) | (b >> 6 << 4)], axis=-1)


def q5_0(b: Bytes) -> Unpacked:
    return Unpacked(flat(nibbles(b[..., 6:], 16), b) | fifth_bits(b[..., 2:6]), halves(b, 0))


def q5_1(b: Bytes) -> Unpacked:
    return Unpacked(flat(nibbles(b[..., 8:], 16), b) | fifth_bits(b[..., 4:8]), halves(b, 0), halves(b, 2))


def q5_k(b: Bytes) -> Unpacked:
    scales, minima = six_bits(b[..., 4:16])
    fifth = ((b[..., None, 16:48] >> SINGLES) & 1) << 4
    q = nibbles(b[..., 48:], 32).reshape(fifth.shape) | fifth
    return Unpacked(q, halves(b, 0), -halves(b, 2), scales, minima)


def q4_k(b: Bytes) -> Unpacked:
    scales, minima = six_bits(b[..., 4:16])
    return Unpacked(nibbles(b[..., 16:], 32), halves(b, 0), -halves(b, 2), scales, minima)


def q6_k(b: Bytes) -> Unpacked:
    low, high = nibbles(b[..., :128], 64), fields(b[..., 128:192])
    return Unpacked(flat(low, b) | flat(high << 4, b), halves(b, 208), fine=b[..., 192:208].view(np.int8))


def q2_k(b: Bytes) -> Unpacked:
    scales = b[..., :16]
    return Unpacked(fields(b[..., 16:80]), halves(b, 80), -halves(b, 82), scales & 15, scales >> 4)


def q3_k(b: Bytes) -> Unpacked:
    high = (b[..., None, :32] >> SINGLES) & 1
    q = fields(b[..., 32:96]).reshape(high.shape) | (high << 2)
    scales = flat(nibbles(b[..., 96:104], 8), b) | flat(((b[..., None, 104:108] >> PAIRS) & 3) << 4, b)
    return Unpacked(q, halves(b, 108), fine=scales.astype(np.int16) - 32)


def tq1_0(b: Bytes) -> Unpacked:
    """Five (of the last four bytes: four) ternary digits a byte, as a fraction: the next digit is the carry of 3 x."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    runs = (b[..., None, :32] * powers, b[..., None, 32:48] * powers, b[..., None, 48:52] * powers[:4])
    digits = np.concatenate([flat(run, b) for run in runs], axis=-1)
    return Unpacked((digits.astype(np.uint16) * 3 >> 8).astype(np.uint8), halves(b, 52), -halves(b, 52))


def tq2_0(b: Bytes) -> Unpacked:
    return Unpacked(fields(b[..., :64]), halves(b, 64), -halves(b, 64))


def iq4_nl(b: Bytes) -> Unpacked:
    return Unpacked(nibbles(b[..., 2:], 16), halves(b, 0))


def iq4_xs(b: Bytes) -> Unpacked:
    low = np.stack([b[..., 4:8] & 15, b[..., 4:8] >> 4], axis=-1).reshape(*b.shape[:-1], 8)
    high = flat((b[..., 2:4, None] >> PAIRS[:, 0]) & 3, b)
    return Unpacked(nibbles(b[..., 8:], 16), halves(b, 0), fine=(low | high << 4).astype(np.int16) - 32)


def mxfp4(b: Bytes) -> Unpacked:
    """The scale is 2^(e - 128): values are stored doubled. Beyond e = 250, where 32 times it leaves float32, it stays."""
    return Unpacked(nibbles(b[..., 1:], 16), np.ldexp(np.float32(1), np.minimum(b[..., :1], 250).astype(np.int32) - 128))


def nvfp4(b: Bytes) -> Unpacked:
    """Scales of 4 bits of exponent and 3 of mantissa, the largest code is zero; halved, as values are stored doubled."""
    exponent, mantissa = (b[..., :4] >> 3 & 15).astype(np.int32), (b[..., :4] & 7).astype(np.float32)
    scale = np.ldexp(np.where(exponent > 0, mantissa + 8, mantissa), np.maximum(exponent, 1) - 11)
    return Unpacked(nibbles(b[..., 4:], 8), np.where(b[..., :4] == 0x7F, 0, scale).astype(np.float16))


FORMATS = {
    "Q2_K": Format(2, 0, 16, q2_k),
    "Q3_K": Format(2, 1, 16, q3_k),
    "Q4_K": Format(4, 0, 32, q4_k),
    "Q5_0": Format(4, 1, 32, q5_0),
    "Q5_1": Format(4, 1, 32, q5_1),
    "Q5_K": Format(4, 1, 32, q5_k),
    "Q6_K": Format(4, 2, 16, q6_k),
    "TQ1_0": Format(2, 0, 32, tq1_0),
    "TQ2_0": Format(2, 0, 32, tq2_0),
    "IQ4_NL": Format(4, 0, 32, iq4_nl, "IQ4_NL"),
    "IQ4_XS": Format(4, 0, 32, iq4_xs, "IQ4_NL"),
    "MXFP4": Format(4, 0, 32, mxfp4, "MXFP4", wide=True),
    "NVFP4": Format(4, 0, 16, nvfp4, "NVFP4"),
}


def codebook_of(name: str) -> Codebook:
    """gguf's 16 values, plus 128; those of FP4 (-12 .. 12) times 8, to lose less in 1 + byte / 256."""
    if not name:
        return None
    values = np.array(getattr(quants, name).kvalues, np.int16) * (8 if name.endswith("FP4") else 1)
    a, b, c, d = (values + 128).astype(np.uint8).view(np.uint32)
    return a, b, c, d
