"""Rotary position embedding: how fast each pair turns, and the cosines and sines of a step's positions, made on the host.

cache.py asks once per step and distinct Rope; metal_cache.py gives the frequencies to a kernel. Angles are float64: at
position 200,000 a float32 one is wrong in its second decimal. Formulas: transformers' modeling_rope_utils.py, YaRN (Peng et
al. 2023), Llama 3.1's model card.
"""

from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import assert_never

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.model.spec import FrequencyFactors, LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from engine.step import IntArray

__all__ = ["Rotation"]

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rotation:
    """A Rope made ready: radians per position of each pair, (rotary_size / 2,), and the factor of cosines and sines."""

    frequencies: Doubles
    stretch: float

    @classmethod
    def of(cls, rope: Rope) -> "Rotation":
        pairs = np.arange(rope.rotary_size // 2)
        plain: Doubles = np.power(rope.theta, -2.0 * pairs / rope.rotary_size)
        match rope.scaling:
            case None:
                return cls(plain, 1.0)
            case LinearScaling(factor):
                return cls(plain / factor, 1.0)
            case FrequencyFactors(divisors, attention_factor):
                return cls(plain / np.array(divisors), attention_factor)
            case Llama3Scaling() as scaling:
                return cls(blended(plain, scaling.factor, kept_by_llama3(plain, scaling)), 1.0)
            case YarnScaling(factor=factor, attention_factor=given) as scaling:
                stretch = 0.1 * log(max(factor, 1.0)) + 1.0 if given is None else given
                return cls(blended(plain, factor, kept_by_yarn(rope, scaling)), stretch)
            case LongRopeScaling():
                raise AssertionError("ModelSpec.at_context chooses between the two sets of divisors")
            case _:
                assert_never(rope.scaling)

    def at(self, positions: IntArray) -> tuple[mx.array, mx.array]:
        """Cosines and sines, (T, 1, rotary_size / 2) float32 each."""
        angles = positions[:, None, None] * self.frequencies
        return (
            mx.array((np.cos(angles) * self.stretch).astype(np.float32)),
            mx.array((np.sin(angles) * self.stretch).astype(np.float32)),
        )


def blended(plain: Doubles, factor: float, kept: Doubles) -> Doubles:
    """kept: how much of a frequency stays as it is; the rest is divided."""
    mixed: Doubles = kept * plain + (1.0 - kept) * plain / factor
    return mixed


def kept_by_llama3(plain: Doubles, scaling: Llama3Scaling) -> Doubles:
    """By how often a pair turns within the original context: below the low factor nothing is kept, above the high one all."""
    turns = plain * scaling.original_context_length / (2 * pi)
    span = scaling.high_frequency_factor - scaling.low_frequency_factor
    kept: Doubles = np.clip((turns - scaling.low_frequency_factor) / span, 0.0, 1.0)
    return kept


def kept_by_yarn(rope: Rope, scaling: YarnScaling) -> Doubles:
    """By the pair's number: those before the one that turns beta_fast times are kept, those after beta_slow's are not."""

    def pair_of(turns: float) -> float:
        return rope.rotary_size * log(scaling.original_context_length / (2 * pi * turns)) / (2 * log(rope.theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, rope.rotary_size - 1)
    pairs = np.arange(rope.rotary_size // 2)
    kept: Doubles = 1.0 - np.clip((pairs - first) / max(last - first, 1e-3), 0.0, 1.0)
    return kept
