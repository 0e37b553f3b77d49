"""Logprobs of the raw model: of a place's token, and of the most probable alternatives.

sampler.py calls `score` for the places that want them. It is compiled when the first request asks for logprobs, so that a
first start does not wait for it.
"""

from math import log

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.arithmetic import exponential
from backends.cpu.kernels.jit import LANES, inner, kernel, signed
from backends.cpu.kernels.sampling import ONE, RADIX, ZERO, cut, keep, maximum

__all__ = ["score"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int32]


@inner
def log_sum(x: Floats, top: np.float32) -> float:
    """log of the sum of e^(x - top), summed in 32 lanes."""
    part = np.empty(LANES, np.float64)
    for r in range(LANES):
        part[r] = 0.0
    whole = x.shape[0] // LANES * LANES
    for i in range(0, whole, LANES):
        for r in range(LANES):
            part[r] += np.float64(exponential(x[i + r] - top))
    total = 0.0
    for i in range(whole, x.shape[0]):
        total += np.float64(exponential(x[i] - top))
    for r in range(LANES):
        total += part[r]
    return log(total)


@inner
def alternatives(x: Floats, mass: Floats, bins: Doubles, wanted: int, floor: float, ids: Ints, logprobs: Floats) -> None:
    """The `wanted` most probable ids, best first, ties to the lowest id."""
    for i in range(x.shape[0]):
        mass[i] = ONE
    least, ties = cut(x, mass, False, np.float64(wanted), bins)
    keep(x, mass, least, ties)
    found = 0
    for i in range(x.shape[0]):
        if mass[i] > ZERO:
            j = found
            while j > 0 and x[ids[j - 1]] < x[i]:
                ids[j] = ids[j - 1]
                j -= 1
            ids[j] = i
            found += 1
    for j in range(found):
        logprobs[j] = np.float32(np.float64(x[ids[j]]) - floor)


@kernel
def score(
    logits: Floats,             # (rows, V)
    rows: Ints,                 # (n,) place places[n] reads logits[rows[n]]
    places: Ints,               # (n,)
    scored: Ints,               # (S,) the token whose logprob is wanted
    top_count: Ints,            # (S,) alternatives wanted; -1: nothing is
    scratch: Floats,            # (2 workers, V)
    logprobs: Floats,           # (S,) and (S, K): results
    top_ids: Ints,
    top_logprobs: Floats,
) -> None:
    workers = scratch.shape[0] // 2
    for number in prange(workers):
        worker = signed(number)
        bins = np.empty(RADIX, np.float64)
        for n in range(worker, places.shape[0], workers):
            s, x = places[n], logits[rows[n]]
            if top_count[s] >= 0:
                top = maximum(x)
                floor = np.float64(top) + log_sum(x, top)
                logprobs[s] = np.float32(np.float64(x[scored[s]]) - floor)
                if top_count[s] > 0:
                    wanted = min(top_count[s], x.shape[0])
                    alternatives(x, scratch[2 * worker], bins, wanted, floor, top_ids[s], top_logprobs[s])
