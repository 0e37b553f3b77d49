"""What the tests of the MLX sampler share: its draws from given logits, and how they are compared with the CPU backend's."""

import mlx.core as mx
import numpy as np

from backends.mlx import sampler
from tests.mlx.sampling_referee import Verdict, judge
from tests.support.sampling_steps import NOTHING, on_cpu

__all__ = ["on_mlx", "same"]


def on_mlx(logits, step, previous=NOTHING, draw=sampler.draw):
    made = []

    def rows(at):
        made.append(len(at))
        return mx.array(logits[at])

    drawn = draw(step, mx.array(np.array(previous, np.int32)), rows)
    assert max(made, default=0) <= sampler.HEAD_ROWS
    return drawn.output(np.zeros((0, 0), np.float32))


def same(logits, step, previous=NOTHING, *, borders=0, draw=sampler.draw):
    """The tokens, which are the CPU's: `borders` of them may differ, if the referee finds one of the two on a border."""
    ours = on_mlx(logits, step, previous, draw).tokens
    theirs = on_cpu(logits, step, np.array(previous, np.int32)).tokens
    different = np.flatnonzero(ours != theirs)
    verdicts = judge(logits, step, ours, previous)
    wrong = [(s, ours[s], theirs[s]) for s, each in enumerate(verdicts) if each is Verdict.WRONG]
    assert not wrong, f"(place, token, the CPU's): {wrong}"
    assert len(different) <= borders, (different, ours[different], theirs[different])
    return ours, len(different)
