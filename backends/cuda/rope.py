"""Rotary position embedding: how fast each pair turns, and the launches of position.cu, which also writes to the cache.

ops.py makes a Rotation for each distinct Rope once, asks for the rotations of a step's positions once, and rotates and
writes once per layer. Frequencies are float64: the angle of position 200,000 needs it. Formulas: transformers'
modeling_rope_utils.py, YaRN (Peng et al. 2023), Llama 3.1's model card.
"""

from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from backends.cuda.cache import CacheItem, CacheLayout
from backends.cuda.device import Array, Kernel, Stream
from engine.errors import UnsupportedModel
from engine.model.spec import (
    Attention,
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)

__all__ = ["Rotation", "position_kernels", "rotate_and_write", "rotations"]

Doubles = NDArray[np.float64]

MAKE_ROTATIONS = Kernel("position.cu", "make_rotations")
THREADS = 256                            # of a block of position.cu
WARPS = THREADS // 32


@dataclass(frozen=True, slots=True)
class Rotation:
    """A Rope made ready: radians per position of each pair, (rotary_size / 2,), and the factor of cosines and sines."""

    frequencies: Doubles
    factor: float

    @classmethod
    def of(cls, rope: Rope) -> "Rotation":
        plain: Doubles = np.exp(-log(rope.theta) * (np.arange(rope.rotary_size // 2) * 2.0 / rope.rotary_size))
        match rope.scaling:
            case None:
                return cls(plain, 1.0)
            case LinearScaling(factor):
                return cls(plain / factor, 1.0)
            case FrequencyFactors(divisors, attention_factor):
                return cls(plain / np.array(divisors), attention_factor)
            case Llama3Scaling() as scaling:
                return cls(mixed(plain, plain / scaling.factor, kept_by_llama3(plain, scaling)), 1.0)
            case YarnScaling(factor=factor, attention_factor=given) as scaling:
                temperature = 0.1 * log(max(factor, 1.0)) + 1.0 if given is None else given
                return cls(mixed(plain, plain / factor, kept_by_yarn(rope, scaling)), temperature)
            case LongRopeScaling():
                raise AssertionError("ModelSpec.at_context chooses between the two sets of divisors")
            case _:
                assert_never(rope.scaling)


def mixed(kept: Doubles, divided: Doubles, share: Doubles) -> Doubles:
    """`share` of the one, the rest of the other."""
    return kept * share + divided * (1 - share)


def kept_by_llama3(plain: Doubles, scaling: Llama3Scaling) -> Doubles:
    """1 for pairs that turn often within the original context, 0 for those that do so rarely, a ramp between them."""
    turns = plain * (scaling.original_context_length / (2 * pi))
    least, enough = scaling.low_frequency_factor, scaling.high_frequency_factor
    share: Doubles = np.clip((turns - least) / (enough - least), 0, 1)
    return share


def kept_by_yarn(rope: Rope, scaling: YarnScaling) -> Doubles:
    """The same by the number of the pair: 1 before the one that turns beta_fast times, 0 from that of beta_slow times on."""

    def pair_of(turns: float) -> float:
        return rope.rotary_size * log(scaling.original_context_length / (2 * pi * turns)) / (2 * log(rope.theta))

    begin, end = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        begin, end = floor(begin), ceil(end)
    begin, end = max(begin, 0), min(end, rope.rotary_size - 1)
    share: Doubles = 1 - np.clip((np.arange(rope.rotary_size // 2) - begin) / max(end - begin, 0.001), 0, 1)
    return share


# ---- launches ------------------------------------------------------------------------------------------------------------


def position_kernels(attention: Attention, item: CacheItem) -> list[Kernel]:
    """What has to be prepared for layers of this kind. Raises UnsupportedModel where there is no kernel."""
    return [MAKE_ROTATIONS, rotate_kernel(attention, item)]


def rotate_kernel(attention: Attention, item: CacheItem) -> Kernel:
    size, rotary = attention.head_size, attention.rope.rotary_size
    if size % 4 or size > 256 or rotary % 4 or not 0 <= rotary <= size:
        raise UnsupportedModel(
            f"rotary size {rotary} of heads of {size}: the cuda backend has kernels for multiples of 4 up to the head size, "
            "which is at most 256: choose another model, or --backend cpu"
        )
    pieces = 1 if size <= 128 else 2
    truths = (str(truth).lower() for truth in (attention.rope.interleaved, item == "fp8"))
    return Kernel("position.cu", f"rotate_and_write<{pieces}, {', '.join(truths)}>")


def rotations(stream: Stream, positions: Array, frequencies: Array, factor: float, out: Array) -> None:
    """out (T, pairs, 2) f32 = factor x (cosine, sine) of positions (T) i32 x frequencies (pairs) f64."""
    tokens, pairs = out.shape[:2]
    if tokens * pairs == 0:
        return
    stream.launch(
        MAKE_ROTATIONS, (-(-tokens * pairs // THREADS), 1, 1), THREADS, 0,
        positions, frequencies, np.float32(factor), out, np.int32(tokens), np.int32(pairs),
    )  # fmt: skip


def rotate_and_write(
    stream: Stream, qkv: Array, bias: Array | None, query_norm: Array | None, key_norm: Array | None, epsilon: float,
    rotations: Array, slots: Array, pool_address: int, layout: CacheLayout, layer: int, attention: Attention,
) -> None:  # fmt: skip
    """Queries of qkv (T, (H + 2 KV) hs) bf16 become normed and rotated in place; keys (too) and values go to slots (T) i32.

    bias ((H + 2 KV) hs,), query_norm and key_norm (hs,): f32. rotations (T, rotary / 2, 2): of the layer's rope. Keys and
    values in qkv stay as they were, which nobody may read afterwards.
    """
    tokens = qkv.shape[0]
    heads = tokens * (attention.heads + 2 * attention.kv_heads)
    stream.launch(
        rotate_kernel(attention, layout.item), (-(-heads // WARPS), 1, 1), THREADS, 0,
        qkv, bias or 0, query_norm or 0, key_norm or 0, np.float32(epsilon), rotations, slots,
        pool_address + layout.keys(layer), np.int64(layout.page_bytes), np.int32(tokens), np.int32(attention.heads),
        np.int32(attention.kv_heads), np.int32(attention.head_size), np.int32(attention.rope.rotary_size),
    )  # fmt: skip
