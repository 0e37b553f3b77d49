"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") for all places of a step at once.

sampler.py calls `uniforms` when a step is submitted. Key and counter are the host's, so the numbers are made here: two
hundred small operations on the device would take longer than the step of a small model.
"""

import numpy as np
from numpy.typing import NDArray

from engine.step import FloatArray, IntArray, UintArray

__all__ = ["philox", "uniforms"]

Words = NDArray[np.uint64]

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
ROUNDS = 10


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Four random words for each counter and key; every word is held in 64 bits, where a product has room."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(ROUNDS):
        one, two = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (two >> HALF) ^ b ^ k, two & LOW, (one >> HALF) ^ d ^ m, one & LOW
        k, m = (k + WEYL[0]) & LOW, (m + WEYL[1]) & LOW
    return a, b, c, d


def uniforms(seed: UintArray, position: IntArray, choice: IntArray) -> FloatArray:
    """A multiple of 2^-24 in [0, 1) for each token at `position` of choice `choice`: seed (n, 2), the others (n,)."""
    nothing = np.zeros(len(seed), np.uint64)
    counter = (position.astype(np.uint32).astype(np.uint64), choice.astype(np.uint32).astype(np.uint64), nothing, nothing)
    word = philox(counter, (seed[:, 0].astype(np.uint64), seed[:, 1].astype(np.uint64)))[0]
    return ((word >> np.uint64(8)).astype(np.float64) * 2.0**-24).astype(np.float32)
