"""Rotary position embedding: the cosines and sines of a step's positions, for every kind of scaling.

model.py makes a Rotation per distinct Rope and asks it once per step. Angles are float64: at position 100,000 a float32
angle would be wrong in its third decimal. Formulas: transformers' modeling_rope_utils.py, YaRN (Peng et al. 2023).
"""

from dataclasses import dataclass
from math import log, pi
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from engine.model.spec import FrequencyFactors, LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling

__all__ = ["Rotation", "attention_factor", "frequencies"]

Doubles = NDArray[np.float64]


def frequencies(rope: Rope) -> Doubles:
    """Radians per position of each pair, (rotary_size / 2,)."""
    plain: Doubles = rope.theta ** (-np.arange(0, rope.rotary_size, 2, dtype=np.float64) / rope.rotary_size)
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor=factor):
            return plain / factor
        case FrequencyFactors(divisors=divisors):
            return plain / np.asarray(divisors, np.float64)
        case Llama3Scaling():
            return _llama3(plain, rope.scaling)
        case YarnScaling():
            return _yarn(plain, rope, rope.scaling)
        case LongRopeScaling():
            raise AssertionError("ModelSpec.at_context chooses between the two sets of divisors")
        case _:
            assert_never(rope.scaling)


def attention_factor(rope: Rope) -> float:
    """What cosines and sines are multiplied by: YaRN's attention temperature, else 1."""
    match rope.scaling:
        case YarnScaling(factor=factor, attention_factor=None):
            return 0.1 * log(factor) + 1.0 if factor > 1 else 1.0
        case YarnScaling(attention_factor=float(given)) | FrequencyFactors(attention_factor=given):
            return given
        case _:
            return 1.0


def _llama3(plain: Doubles, scaling: Llama3Scaling) -> Doubles:
    """Low frequencies are divided by the factor, high ones stay, those between are blended."""
    turns = scaling.original_context_length * plain / (2 * pi)     # within the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * plain / scaling.factor + keep * plain


def _yarn(plain: Doubles, rope: Rope, scaling: YarnScaling) -> Doubles:
    """Pairs that turn less than beta_slow times within the original context are divided, above beta_fast they stay."""

    def pair_that_turns(times: float) -> float:
        return rope.rotary_size * log(scaling.original_context_length / (times * 2 * pi)) / (2 * log(rope.theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_size - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / max(high - low, 0.001), 0.0, 1.0)
    blended: Doubles = plain / scaling.factor * ramp + plain * (1 - ramp)
    return blended


@dataclass(frozen=True, slots=True)
class Rotation:
    """A Rope made ready: frequencies and the factor of its cosines and sines."""

    frequencies: Doubles
    factor: float

    @classmethod
    def of(cls, rope: Rope) -> "Rotation":
        return cls(frequencies(rope), attention_factor(rope))

    def at(self, positions: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines of the positions, (T, rotary_size / 2) each."""
        angles = np.multiply.outer(positions, self.frequencies)    # (T, rotary_size / 2)
        return (
            (np.cos(angles) * self.factor).astype(np.float32),
            (np.sin(angles) * self.factor).astype(np.float32),
        )
