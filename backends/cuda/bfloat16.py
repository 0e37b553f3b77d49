"""bfloat16 on the host: the upper half of a float32. NumPy has no such type, so that arrays of it are uint16."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["from_bfloat16", "to_bfloat16"]


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To nearest, ties to even, as GPUs round; what is not a number stays so."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded: NDArray[Any] = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)
