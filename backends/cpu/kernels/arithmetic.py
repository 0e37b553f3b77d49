"""What several kernels share: an exponential that LLVM turns into vector code, widening of short floats.

Kernels inline them. np.exp is a scalar call in Numba (unless Intel's SVML is there) and would cost more than all of
attention; a polynomial with exponent bits runs over 16 lanes at once.
"""

import numpy as np
from numba import types
from numba.extending import overload

from backends.cpu.kernels.jit import helper, inner

__all__ = ["dot4", "exponential", "half", "tanh", "widen"]

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUNDER = np.float32(12582912.0)      # 1.5 2^23: adding it rounds to an integer that sits in the low bits
LEAST, MOST = np.float32(-87.0), np.float32(88.0)
# minimax polynomial of (e^r - 1 - r) / r^2 on [-ln2/2, ln2/2] (Cephes expf), relative error 2e-7
C0, C1, C2, C3, C4, C5 = (
    np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
)
UNIT, TWO = np.float32(1.0), np.float32(2.0)
TWO_112 = np.float32(2.0**112)        # the difference of the exponent biases of float32 and float16


@inner
def exponential(x: np.float32) -> np.float32:
    """e^x, clamped to x in [-87, 88]; relative error below 3e-7."""
    x = min(max(x, LEAST), MOST)
    shifted = x * LOG2_E + ROUNDER
    n = shifted - ROUNDER
    r = x - n * LN2_HIGH
    r = r - n * LN2_LOW
    p = C0
    p = p * r + C1
    p = p * r + C2
    p = p * r + C3
    p = p * r + C4
    p = p * r + C5
    p = p * (r * r) + r + UNIT
    power = np.uint32(np.uint32(np.float32(shifted).view(np.uint32) + np.uint32(127)) << np.uint32(23))
    return p * np.uint32(power).view(np.float32)


@inner
def tanh(x: np.float32) -> np.float32:
    return UNIT - TWO / (exponential(TWO * x) + UNIT)


@helper
def half(bits: np.uint32) -> np.float32:
    """The float32 of a finite float16, exact for subnormal numbers too."""
    magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(magnitude | sign).view(np.float32) * TWO_112


@inner
def dot4(
    total: np.float32, a0: np.float32, a1: np.float32, a2: np.float32, a3: np.float32,
    b0: np.float32, b1: np.float32, b2: np.float32, b3: np.float32,
) -> np.float32:  # fmt: skip
    """total + a . b, four fused multiply-adds in this order."""
    total += a0 * b0
    total += a1 * b1
    total += a2 * b2
    total += a3 * b3
    return total


def widen(weight: np.float32 | np.uint16 | np.int16) -> np.float32:
    """float32 of a stored dense weight: its dtype tells the kind (float32; uint16: bfloat16; int16: float16)."""
    raise NotImplementedError("only compiled code calls this")


@overload(widen, inline="always")
def _widen(weight):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  (Numba compares the signatures)
    match weight:
        case types.uint16:
            return lambda weight: np.uint32(np.uint32(weight) << np.uint32(16)).view(np.float32)
        case types.int16:
            return lambda weight: half(np.uint32(np.uint16(weight)))
        case types.float32:
            return lambda weight: weight
    return None
