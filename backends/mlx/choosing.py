"""What is kept of a distribution, and the draw: top-k, top-p, min-p and the inverse of the cumulated mass, for many places.

sampler.py calls `choose`, on a Mac with a kernel that finds the cut of wide sets (metal_sampling.py). All parameters are per
place and nothing loops over places. Ties go to the lowest id, as on every backend. Sums of many masses are made by spans of
512, because a float32 that grows through a whole vocabulary loses its tail.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.step import FloatArray, IntArray

__all__ = ["LeastKept", "Settings", "choose", "largest", "least_kept", "log_sum"]

SPAN = 512
PARTIAL = 8               # a partial sort serves up to an eighth of the vocabulary
PART, MOST_PARTIAL = 2048, 64
MOST = np.float32(3e38)

LeastKept = Callable[[mx.array, mx.array, mx.array, NDArray[np.int64], FloatArray], tuple[mx.array, mx.array]]
"""What does least_kept's work for a width of the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the places that draw, on the host, (n,) each; temperature > 0."""

    temperature: FloatArray
    top_k: IntArray
    top_p: FloatArray
    min_p: FloatArray
    uniform: FloatArray


def choose(x: mx.array, settings: Settings, kernel: LeastKept | None = None) -> mx.array:
    """Draw from softmax(x / temperature) of what is kept: logits (n, V) float32 -> token ids (n,) int32."""
    with np.errstate(divide="ignore", over="ignore"):
        cold = mx.array(np.minimum(np.float32(1) / settings.temperature, MOST))[:, None]
    top = x.max(axis=1, keepdims=True)
    mass = mx.exp((x - top) * cold)
    cut = cut_of(x, top, cold, settings, kernel)
    if cut is not None:
        least, ties = cut
        equal = x == least
        kept = (x > least) | (equal & (mx.cumsum(equal.astype(mx.int32), axis=1) <= ties))
        mass = mx.where(kept, mass, 0)
    if (settings.min_p > 0).any():
        mass = mx.where(mass >= mx.array(settings.min_p)[:, None], mass, 0)
    return draw(mass, mx.array(settings.uniform)[:, None])


def cut_of(
    x: mx.array, top: mx.array, cold: mx.array, settings: Settings, kernel: LeastKept | None
) -> tuple[mx.array, mx.array] | None:
    """The least logit that is kept by top-k and top-p, and how many of that one, (n, 1) each; None if all is kept."""
    vocabulary, k = x.shape[1], settings.top_k
    limited = (k > 0) & (k < vocabulary)
    partial = limited & (k <= (vocabulary // PARTIAL if kernel is None else min(vocabulary // PARTIAL, MOST_PARTIAL)))
    whole = ~partial & (limited | (settings.top_p < 1))
    if not (partial | whole).any():
        return None
    rows, least, ties = [], [], []
    for chosen, width in ((partial, int(k[partial].max(initial=0))), (whole, vocabulary)):
        if chosen.any():
            at = np.flatnonzero(chosen)
            some = mx.array(at)
            count = np.where(limited[at], k[at], vocabulary)
            asked = x[some], top[some], cold[some], count, settings.top_p[at]
            found = least_kept(*asked, width) if kernel is None or chosen is partial else kernel(*asked)
            rows.append(at)
            least.append(found[0])
            ties.append(found[1])
    if len(free := np.flatnonzero(~partial & ~whole)):
        rows.append(free)
        least.append(mx.full((len(free), 1), -mx.inf))
        ties.append(mx.full((len(free), 1), vocabulary, mx.int32))
    back = mx.array(np.argsort(np.concatenate(rows)))
    return mx.concatenate(least)[back], mx.concatenate(ties)[back]


def least_kept(
    x: mx.array, top: mx.array, cold: mx.array, count: NDArray[np.int64], top_p: FloatArray, width: int
) -> tuple[mx.array, mx.array]:
    """By the `width` largest logits of each place, of which the first `count` are looked at."""
    ordered = -mx.sort(-largest(x, width), axis=1)                                                # (n, width)
    looked_at = mx.array(count.astype(np.int32))[:, None]
    mass = mx.where(mx.arange(width) < looked_at, mx.exp((ordered - top) * cold), 0)
    passed = cumulated(mass)
    p = mx.array(top_p)[:, None]
    before = ((passed < p * passed[:, -1:]) & (mass > 0)).sum(axis=1, keepdims=True).astype(mx.int32)
    kept = mx.where(p < 1, mx.minimum(before + 1, looked_at), looked_at)
    least = mx.take_along_axis(ordered, kept - 1, axis=1)
    return least, kept - (ordered > least).sum(axis=1, keepdims=True).astype(mx.int32)


def largest(x: mx.array, width: int) -> mx.array:
    """The `width` largest numbers of each row in any order, (n, width).

    On Metal a top-k of many numbers is a whole merge sort; of few it is one pass, so the best of parts are the candidates.
    """
    rows, count = x.shape
    if width >= count:
        return x
    if width > MOST_PARTIAL or count <= 2 * PART:
        return mx.topk(x, width, axis=1)
    parts = mx.pad(x, [(0, 0), (0, -count % PART)], constant_values=-mx.inf).reshape(rows, -1, PART)
    return mx.topk(mx.topk(parts, width, axis=2).reshape(rows, -1), width, axis=1)


def log_sum(x: mx.array) -> mx.array:
    """log of the sum of e^x, (n, 1): x (n, V). MLX's own over a whole vocabulary is 2e-4 off on a CPU."""
    return mx.logsumexp(mx.logsumexp(spans_of(x, -mx.inf), axis=2), axis=1, keepdims=True)


def spans_of(values: mx.array, behind: float = 0) -> mx.array:
    """(n, V) -> (n, spans, 512), `behind` after the last."""
    missing = -values.shape[1] % SPAN
    return mx.pad(values, [(0, 0), (0, missing)], constant_values=behind).reshape(len(values), -1, SPAN)


def cumulated(mass: mx.array) -> mx.array:
    """The cumulated mass, (n, V)."""
    spans = spans_of(mass)
    sums = spans.sum(axis=2)
    before = mx.cumsum(sums, axis=1) - sums
    return (before[:, :, None] + mx.cumsum(spans, axis=2)).reshape(len(mass), -1)[:, : mass.shape[1]]


def draw(mass: mx.array, uniform: mx.array) -> mx.array:
    """The first id at which the cumulated mass passes `uniform` of the whole, (n,) int32: mass (n, V), uniform (n, 1)."""
    spans = spans_of(mass)                                                                        # (n, spans, 512)
    sums = spans.sum(axis=2)
    passed = mx.cumsum(sums, axis=1)
    target = uniform * passed[:, -1:]
    some = sums > 0                                   # a parallel scan may rise by rounding where there is no mass
    span = first_of((passed > target) & some, some)                                               # (n, 1)
    inside = mx.take_along_axis(spans, span[:, :, None], axis=1).squeeze(1)                       # (n, 512)
    before = mx.where(span > 0, mx.take_along_axis(passed, mx.maximum(span - 1, 0), axis=1), 0)
    at = first_of((before + mx.cumsum(inside, axis=1) > target) & (inside > 0), inside > 0)
    return (span * SPAN + at).squeeze(1)


def first_of(hit: mx.array, possible: mx.array) -> mx.array:
    """The first hit of each row; where rounding left none, the last that is possible: (n, m) -> (n, 1) int32."""
    numbers = mx.arange(hit.shape[1], dtype=mx.int32)
    first = mx.where(hit, numbers, hit.shape[1]).min(axis=1, keepdims=True)
    last = mx.where(possible, numbers, 0).max(axis=1, keepdims=True)
    return mx.where(first < hit.shape[1], first, last)
