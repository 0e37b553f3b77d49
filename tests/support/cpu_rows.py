"""Rows for the cpu backend's operations, prepared for products of floats or of integers."""

import numpy as np
import pytest

from backends.cpu.kernels.groups import make_groups, prepare_rows
from backends.cpu.kernels.vectors import has_byte_products
from backends.cpu.ops import Rows

__all__ = ["ARITHMETIC", "rows_of"]

# `integer`: which of the two kinds of products; a machine without byte products has only the floats
ARITHMETIC = pytest.mark.parametrize(
    "integer",
    [
        pytest.param(False, id="floats"),
        pytest.param(
            True, id="integers", marks=pytest.mark.skipif(not has_byte_products(), reason="no AVX-512 with VNNI here")
        ),
    ],
)


def rows_of(values: np.ndarray, *, integer: bool, padding: float = 0) -> Rows:
    """The values, with room for a whole tile that is full of `padding`, and what is prepared of both."""
    room = np.full((-(-len(values) // 8) * 8, values.shape[1]), padding, np.float32)
    room[: len(values)] = values
    groups = make_groups(len(room), room.shape[1], integer=integer)
    prepare_rows(room, groups, len(room))
    return Rows(room, groups, len(values))
