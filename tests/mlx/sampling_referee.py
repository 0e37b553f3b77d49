"""Who judges a drawn token: the distribution in float64, sorted, with nothing of a backend in it.

A backend sums float32 in an order of its own, so next to a border between two tokens (of the cumulated mass, or of what
top-p or min-p keeps) it may take the other one. `judge` tells such a case from a fault: a token is a BORDER case only if the
uniform lies within CLOSE of its stretch of the cumulated mass, for a set that float32 may have kept. Greedy has no borders.
"""

from enum import Enum

import numpy as np

__all__ = ["CLOSE", "Verdict", "judge", "uniform"]

CLOSE = 1e-6              # of the whole mass
Verdict = Enum("Verdict", "RIGHT BORDER WRONG")


def uniform(seed, position, choice):
    """Philox4x32-10 in Python's own integers: 24 bits of its first word."""
    c, k = [int(position), int(choice), 0, 0], [int(seed[0]), int(seed[1])]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return (c[0] >> 8) * 2.0**-24


def judge(logits, step, tokens, previous=()):
    """A Verdict on each place's token: logits of the step's tokens (T, V)."""
    rows = (adjusted(logits[at], step, s, previous) for s, at in enumerate(step.sample_at))
    return [verdict(step, s, x, int(token)) for s, (x, token) in enumerate(zip(rows, tokens, strict=True))]


def adjusted(raw, step, s, previous):
    """After penalties, bias and grammar, in float32 as written in engine/step.py; None where nothing can be drawn."""
    if not np.isfinite(raw).all():
        return None
    x = raw.copy()
    if step.history is not None:
        counts, seen = {}, set()
        for entry in range(step.history.starts[s], step.history.starts[s + 1]):
            token = int(step.history.tokens[entry])
            token = token if token >= 0 else max(0, int(previous[-1 - token]))
            counts[token] = counts.get(token, 0) + int(step.history.counts[entry])
            if counts[token] or step.history.in_prompt[entry]:
                seen.add(token)
        for token in seen:
            x[token] = x[token] / step.repetition[s] if x[token] > 0 else x[token] * step.repetition[s]
            if counts[token]:
                x[token] -= step.frequency[s] * np.float32(counts[token]) + step.presence[s]
    if step.bias is not None:
        for entry in range(step.bias.starts[s], step.bias.starts[s + 1]):
            x[step.bias.tokens[entry]] += step.bias.values[entry]
    for row in np.flatnonzero(step.mask_at == s):
        allowed = np.unpackbits(step.grammar_masks[row].view(np.uint8), bitorder="little")[: len(x)] > 0
        if not allowed.any():
            return None
        x[~allowed] = -np.inf
    return x


def verdict(step, s, x, token):
    if x is None or step.temperature[s] <= 0:
        return Verdict.RIGHT if token == (-1 if x is None else x.argmax()) else Verdict.WRONG
    mass = np.exp((x.astype(np.float64) - x.max()) / np.float64(step.temperature[s]))
    if token < 0 or mass[token] == 0:
        return Verdict.WRONG
    order = np.argsort(-x, kind="stable")                                  # best first, ties to the lowest id
    target = uniform(step.seed[s], step.draw_position[s], step.choice[s])
    exact, fewest, most = (kept(mass[order], step, s, shift) for shift in (0, -CLOSE, CLOSE))
    if token == drawn(mass, order[:exact], target):
        return Verdict.RIGHT
    close = CLOSE
    sizes = range(fewest, most + 1)
    if len(sizes) > 8:                # so many are in reach that each has little: the sets between do not matter
        sizes = (fewest, exact, most)
        close += mass[order[fewest:most]].sum() / mass[order[:fewest]].sum()
    near = any(distance(mass, order[:size], target, token) <= close for size in sizes)
    return Verdict.BORDER if near else Verdict.WRONG


def kept(descending, step, s, shift):
    """How many of the best are kept, if all borders were `shift` of the whole further down."""
    left = descending[: step.top_k[s] or None]
    if step.top_p[s] < 1:
        passed = np.cumsum(left)
        left = left[: max(1, int((passed - left < (np.float64(step.top_p[s]) + shift) * passed[-1]).sum()))]
    return max(1, int((left >= np.float64(step.min_p[s]) * (1 - 4 * shift)).sum()))


def drawn(mass, kept_ids, target):
    ids = np.sort(kept_ids)
    passed = np.cumsum(mass[ids])
    return int(ids[min(np.searchsorted(passed, target * passed[-1], side="right"), len(ids) - 1)])


def distance(mass, kept_ids, target, token):
    """How far the uniform lies from the token's stretch, of the whole mass; infinite if the token is not kept."""
    ids = np.sort(kept_ids)
    at = np.searchsorted(ids, token)
    if at == len(ids) or ids[at] != token:
        return np.inf
    passed = np.cumsum(mass[ids]) / mass[ids].sum()
    return max(0.0, passed[at] - mass[token] / mass[ids].sum() - target, target - passed[at])
