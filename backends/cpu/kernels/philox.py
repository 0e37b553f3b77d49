"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a draw is a function of its key.

The sampling kernel calls `uniform`. Nothing here has a state.
"""

import numpy as np

from backends.cpu.kernels.jit import inner

__all__ = ["philox", "uniform"]

W = np.uint64
MULTIPLIER_0, MULTIPLIER_1 = W(0xD2511F53), W(0xCD9E8D57)
WEYL_0, WEYL_1 = W(0x9E3779B9), W(0xBB67AE85)
LOW, HALF = W(0xFFFFFFFF), W(32)
ROUNDS = 10


@inner
def philox(c0: int, c1: int, c2: int, c3: int, k0: int, k1: int) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Four random words of a counter and a key; words are held in 64 bits, where a product does not overflow."""
    a, b, c, d, k, m = W(c0), W(c1), W(c2), W(c3), W(k0), W(k1)
    for _ in range(ROUNDS):
        product_0, product_1 = MULTIPLIER_0 * a, MULTIPLIER_1 * c
        a, b, c, d = (product_1 >> HALF) ^ b ^ k, product_1 & LOW, (product_0 >> HALF) ^ d ^ m, product_0 & LOW
        k, m = (k + WEYL_0) & LOW, (m + WEYL_1) & LOW
    return a, b, c, d


@inner
def uniform(position: int, choice: int, k0: int, k1: int) -> float:
    """A multiple of 2^-24 in [0, 1) for the token at `position` of choice `choice`."""
    word = philox(position, choice, 0, 0, k0, k1)[0]
    return float(np.float64(word >> W(8)) * 2.0**-24)
