"""Steps and a spec that mean nothing: they are run once, so that every kernel is compiled before the first request.

session.py and compile.py use them; the dtypes and layouts of their arrays are those of real steps.
"""

import numpy as np

from backends.cpu.weights import DenseWeights, LayerWeights, Stack
from engine.model.spec import Attention, Dense, Layer, ModelSpec, Rope
from engine.step import FloatArray, IntArray, StepInput

__all__ = ["VOCABULARY", "no_weights", "tiny_spec", "warm_up_step"]

VOCABULARY = 32


def tiny_spec() -> ModelSpec:
    attention = Attention(heads=1, kv_heads=1, head_size=16, scale=1.0, rope=Rope(10000.0, 16, interleaved=False))
    return ModelSpec("tiny", VOCABULARY, 16, (Layer(attention, Dense(16)),), 1e-5, tied_output=True, context_length=32)


def no_weights() -> LayerWeights:
    """A layer without anything."""
    nothing, stack = np.zeros(0, np.float32), Stack(0, ())
    return LayerWeights(
        nothing, stack, nothing, nothing, nothing, stack, nothing, nothing, nothing, DenseWeights(stack, stack), nothing
    )


def ints(*values: int) -> IntArray:
    return np.array(values, np.int32)


def floats(*values: float) -> FloatArray:
    return np.array(values, np.float32)


def warm_up_step(tokens: int) -> StepInput:
    """A step of one row that draws once greedily and once at random, so that only logprobs are left to compile."""
    return StepInput(
        copies=np.zeros((0, 2), np.int32),
        tokens=np.zeros(tokens, np.int32),
        positions=np.arange(tokens, dtype=np.int32),
        slots=np.arange(tokens, dtype=np.int32),
        row_starts=ints(0, tokens),
        kv_lengths=ints(tokens),
        page_tables=np.zeros((1, 1), np.int32),
        sample_at=ints(0, tokens - 1),
        temperature=floats(0, 1),
        top_k=ints(0, 10),
        top_p=floats(1, 0.9),
        min_p=floats(0, 0.1),
        repetition=floats(1, 1),
        frequency=floats(0, 0),
        presence=floats(0, 0),
        seed=np.zeros((2, 2), np.uint32),
        draw_position=ints(tokens, tokens),
        choice=ints(0, 1),
        score=ints(-1, -1),
        top_count=ints(-1, -1),
    )
