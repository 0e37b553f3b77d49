"""Steps of sampling fields, and what the CPU backend draws: tests of other backends' samplers compare with it."""

import numpy as np

from backends.cpu.sampler import Sampler
from engine.step import Bias, History, StepInput

__all__ = ["NOTHING", "make_step", "normal", "on_cpu", "random_step"]

NOTHING = np.zeros(0, np.int32)


def make_step(places, **fields):
    """A step of which only the sampling fields matter: every place draws from its own token, greedily."""
    def full(value, dtype=np.float32):
        return np.full(places, value, dtype)

    defaults = {
        "copies": np.zeros((0, 2), np.int32), "page_tables": np.zeros((0, 0), np.int32),
        "tokens": NOTHING, "positions": NOTHING, "slots": NOTHING, "row_starts": NOTHING, "kv_lengths": NOTHING,
        "sample_at": np.arange(places, dtype=np.int32), "temperature": full(0), "top_k": full(0, np.int32), "top_p": full(1),
        "min_p": full(0), "repetition": full(1), "frequency": full(0), "presence": full(0),
        "seed": np.zeros((places, 2), np.uint32), "draw_position": np.arange(places, dtype=np.int32),
        "choice": full(0, np.int32), "score": full(-1, np.int32), "top_count": full(-1, np.int32),
    }  # fmt: skip
    return StepInput(**(defaults | {name: np.asarray(value, defaults[name].dtype) if name in defaults else value
                                    for name, value in fields.items()}))  # fmt: skip


def on_cpu(logits, step, previous=NOTHING):
    return Sampler(logits.shape[1], 1).draw(step, previous, lambda at: np.ascontiguousarray(logits[at]))


def normal(rng, places, vocabulary, spread=3.0):
    return (spread * rng.standard_normal((places, vocabulary))).astype(np.float32)


def random_step(rng, places, vocabulary, *, previous=0, scored=False, forks=False):
    """Every setting at random, each of them off at half of the places."""
    def some(values, off):
        return np.where(rng.random(places) < 0.5, off, values)

    fields = {
        "temperature": np.where(rng.random(places) < 0.15, 0, rng.choice([0.05, 0.3, 0.7, 1, 1.3, 3, 50], places)),
        "top_k": some(rng.choice([1, 2, 5, 40, 200, vocabulary - 1, vocabulary, vocabulary + 9], places), 0),
        "top_p": some(rng.choice([1e-6, 0.05, 0.5, 0.9, 0.95, 0.999, 0.99999, 1 - 2**-24], places), 1),
        "min_p": some(rng.choice([1e-4, 0.02, 0.1, 1], places), 0),
        "repetition": some(rng.uniform(0.5, 2, places), 1),
        "frequency": some(rng.uniform(-2, 2, places), 0),
        "presence": some(rng.uniform(-2, 2, places), 0),
        "seed": rng.integers(0, 2**32, (places, 2), dtype=np.uint32),
        "draw_position": rng.integers(0, 2**31 - 1, places),
        "choice": rng.integers(0, 128, places),
    }
    if scored:
        fields["top_count"] = rng.choice([-1, 0, 1, 5, 20, min(128, vocabulary)], places)
        fields["score"] = np.where(rng.random(places) < 0.5, -1, rng.integers(0, vocabulary, places))
    if forks:
        fields["sample_at"] = rng.integers(0, places, places)
    sizes = np.where(rng.random(places) < 0.5, 0, rng.integers(1, min(vocabulary, 300) + 1, places))
    tokens = [rng.choice(vocabulary, size, replace=False) for size in sizes]
    counts = [rng.integers(0, 4, size) for size in sizes]
    if previous:
        for mine, count in zip(tokens, counts, strict=True):
            if len(mine) and rng.random() < 0.5:
                at = rng.integers(len(mine))
                mine[at], count[at] = -1 - rng.integers(previous), 1
    total = int(sizes.sum())
    flat = np.concatenate(tokens).astype(np.int32)
    history = History(
        starts=np.cumsum([0, *sizes]).astype(np.int32), tokens=flat, counts=np.concatenate(counts).astype(np.int32),
        in_prompt=(rng.random(total) < 0.5) & (flat >= 0),
    )  # fmt: skip
    sizes = np.where(rng.random(places) < 0.8, 0, rng.integers(1, min(vocabulary, 50) + 1, places))
    bias = Bias(
        np.cumsum([0, *sizes]).astype(np.int32),
        np.concatenate([rng.choice(vocabulary, size, replace=False) for size in sizes]).astype(np.int32),
        rng.uniform(-20, 20, int(sizes.sum())).astype(np.float32),
    )
    at = np.flatnonzero(rng.random(places) < 0.2).astype(np.int32)
    rng.shuffle(at)
    masks = rng.integers(0, 2**32, (len(at), -(-vocabulary // 32)), dtype=np.uint32)
    for _ in range(2):                                   # a grammar mostly allows little
        masks[::2] &= rng.integers(0, 2**32, masks[::2].shape, dtype=np.uint32)
    masks[:, 0] |= 1
    return make_step(places, **fields, history=history, bias=bias, mask_at=at, grammar_masks=masks)
