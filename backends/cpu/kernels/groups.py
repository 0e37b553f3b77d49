"""What quantized products want to know of a row beside its values: sums of groups of columns, or their digits.

Whoever writes a row calls `prepare`; which of the two it does is seen from the array that it writes to: (T, columns / 16)
float32 sums for the float kernels, (T, columns / 32, RECORD) uint32 records of digits for integer.py.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import prange
from numba.extending import overload
from numpy.typing import NDArray

from backends.cpu.kernels.digits import COLUMNS, RECORD, digits
from backends.cpu.kernels.jit import inner, kernel, signed

__all__ = ["GROUP", "SPAN", "Groups", "make_groups", "prepare", "prepare_rows"]

Floats = NDArray[np.float32]
Groups = NDArray[Any]

GROUP = 16        # columns of one sum; quantized weights have groups of 16 or 32
SPAN = COLUMNS    # columns that must be prepared together


def make_groups(tokens: int, columns: int, *, integer: bool) -> Groups:
    if integer:
        return np.zeros((tokens, columns // COLUMNS, RECORD), np.uint32)
    return np.zeros((tokens, columns // GROUP), np.float32)


@inner
def group_sums(values: Floats, sums: Floats, t: int, first: int, stop: int) -> None:
    for g in range(first // GROUP, stop // GROUP):
        total = np.float32(0)
        for k in range(g * GROUP, (g + 1) * GROUP):
            total += values[t, k]
        sums[t, g] = total


def prepare(values: Floats, groups: Groups, t: int, first: int, stop: int) -> None:
    """Write what belongs to the columns first .. stop of row t; nothing for columns that do not fill a group."""
    raise NotImplementedError("only compiled code calls this")


@overload(prepare, inline="always")
def _prepare(values, groups, t, first, stop) -> Callable[..., None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
    function = digits if groups.ndim == 3 else group_sums
    return lambda values, groups, t, first, stop: function(values, groups, t, first, stop)


@kernel
def prepare_rows(values: Floats, groups: Groups, tokens: int) -> None:
    for token in prange(tokens):
        prepare(values, groups, signed(token), 0, values.shape[1])
