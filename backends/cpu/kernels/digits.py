"""Activations as integers of 24 bits, each three signed bytes: what products of bytes (integer.py) are made of.

A group of 32 values of x becomes a record: x = s (65536 high + 256 middle + low), where s is the group's largest magnitude
over 8,355,700. x loses no more than float32 itself does, relative to the largest of its group.
"""

import numpy as np
from numpy.typing import NDArray

from backends.cpu.kernels.jit import careful

__all__ = ["COLUMNS", "HALF_SUM", "HIGH", "HIGH_SCALE", "LOW", "MIDDLE", "RECORD", "SCALE", "SUM", "digits"]

Floats = NDArray[np.float32]
Words = NDArray[np.uint32]

COLUMNS = 32               # of a record: a group of activations
RECORD = 32                # words of a record: 8 each of high, middle and low bytes, and the numbers below
HIGH, MIDDLE, LOW, SCALE, HIGH_SCALE, SUM, HALF_SUM = 0, 8, 16, 24, 25, 26, 29    # sums: of all 32, of each 16
MOST = np.float32(8355700) # a little below 0x7F7F7F, the most that three signed bytes hold: rounding may add one
LEAST = np.float32(1e-30)  # a group of smaller values is zero: the inverse of its scale would leave float32
BIAS, SIGNS = np.uint32(0x808080), np.uint32(0x808080)


@careful
def digits(values: Floats, records: Words, t: int, first: int, stop: int) -> None:
    """Write the records of the columns first .. stop of row t: (T, columns / 32, RECORD). What is not finite stays so."""
    numbers, bytes_ = records.view(np.float32), records.view(np.uint8)
    whole = np.empty(COLUMNS, np.int32)
    for g in range(first // COLUMNS, stop // COLUMNS):
        most = np.float32(0)
        plain = np.float32(0)
        for j in range(COLUMNS):
            v = values[t, g * COLUMNS + j]
            most = max(most, abs(v))
            plain += v * np.float32(0)                   # not a number if one value is not finite
        inverse = MOST / most if most > LEAST else np.float32(0)
        for j in range(COLUMNS):
            whole[j] = np.int32(np.floor(values[t, g * COLUMNS + j] * inverse + np.float32(0.5)))
        left, right = np.int32(0), np.int32(0)
        for j in range(COLUMNS // 2):
            left += whole[j]
            right += whole[j + COLUMNS // 2]
        for j in range(COLUMNS):
            u = np.uint32(np.uint32(np.uint32(whole[j]) + BIAS) ^ SIGNS)
            bytes_[t, g, j] = np.uint8(u >> np.uint32(16))
            bytes_[t, g, 4 * MIDDLE + j] = np.uint8(u >> np.uint32(8))
            bytes_[t, g, 4 * LOW + j] = np.uint8(u)
        scale = most / MOST + plain
        numbers[t, g, SCALE] = scale * np.float32(1 / 256)
        numbers[t, g, HIGH_SCALE] = scale * np.float32(256)
        a, b, c = np.float32(left + right) * scale, np.float32(left) * scale, np.float32(right) * scale
        numbers[t, g, SUM], numbers[t, g, SUM + 1], numbers[t, g, SUM + 2] = a, b, c
        half = np.float32(-0.5)
        numbers[t, g, HALF_SUM], numbers[t, g, HALF_SUM + 1], numbers[t, g, HALF_SUM + 2] = a * half, b * half, c * half
