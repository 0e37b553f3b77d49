"""How every kernel is compiled: one set of options, cached on disk, so that only the first start on a machine compiles.

Modules of this folder decorate with `kernel` (launches threads; a thin prange over `inner` functions, because what
stands inside a prange is compiled twice), `inner` and `helper`. Reassociation is never allowed: each output is summed in
one fixed order, which is what makes a result independent of its company.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

__all__ = ["LANES", "careful", "driver", "helper", "inner", "kernel", "signed"]

log = logging.getLogger(__name__)
njit: Any = numba.njit     # its stubs do not know options that are given as a dict
Function = TypeVar("Function", bound=Callable[..., object])

LANES = 32   # rows of a matrix, or keys of a page, that one inner loop runs over: two AVX-512 or four AVX2 vectors

# fastmath without reassoc (order of sums), arcp and afn (a vector and a scalar division would differ in their last bits)
FAST = {"nsz", "contract", "nnan", "ninf"}
INNER = {"nogil": True, "boundscheck": False, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
OPTIONS = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
# of Numba's automatic parallel transformations only prange: the others cost compile time and launch hidden threads
PRANGE_ONLY = {"prange": True} | dict.fromkeys(
    ("comprehension", "numpy", "reduction", "inplace_binop", "setitem", "stencil", "fusion"), False
)


def kernel(function: Function) -> Function:
    """A kernel that launches threads; only the compute thread may call it."""
    options = {"parallel": PRANGE_ONLY, "fastmath": FAST, **OPTIONS}
    try:
        return cast(Function, njit(cache=True, **options)(function))
    except RuntimeError as error:   # numba found no folder that it may write its cache to
        log.warning("kernels are compiled at every start (set NUMBA_CACHE_DIR to a writable folder): %s", error)
        return cast(Function, njit(**options)(function))


def driver(function: Function) -> Function:
    """What calls kernels one after another; only the compute thread may call it."""
    try:
        return cast(Function, njit(cache=True, **OPTIONS)(function))
    except RuntimeError:            # no folder for the cache: kernel() has said it
        return cast(Function, njit(**OPTIONS)(function))


def inner(function: Function) -> Function:
    """What one iteration of a kernel does. Numba's cache looks at the kernel's own file only: keep the two together.

    Only compiled code may call it: it has no way in from Python, which would cost a tenth of the time that it compiles.
    """
    return cast(Function, njit(fastmath=FAST, **INNER)(function))


def careful(function: Function) -> Function:
    """An inner function whose numbers need not be finite."""
    return cast(Function, njit(fastmath=FAST - {"nnan", "ninf"}, **INNER)(function))


def helper(function: Function) -> Function:
    """A scalar function that takes its caller's fastmath options, because Numba inlines it before compiling.

    Whoever changes one that several files share (arithmetic.py) removes the *.nbi files.
    """
    return cast(Function, njit(inline="always", **OPTIONS)(function))


@helper
def signed(index: int) -> int:
    """A prange index is unsigned inside its loop: what it is given to would be compiled once more for that."""
    return np.int64(index)  # type: ignore[return-value]
