"""Which product with a quantized type is faster on this device: our kernel on the file's blocks, or MLX's own on its groups.

weights.py asks at the first tensor of each type, on Metal. No chip was at hand when the kernels were written, so that each
one is asked itself. Blocks are fewer bytes, so groups must win clearly.
"""

import logging
import time
from collections.abc import Callable, Mapping

import mlx.core as mx
import numpy as np

from backends.mlx.matrices import Product
from backends.mlx.packing import Packer
from backends.mlx.repack import REPACKS
from engine.weights.tensors import Part, RawTensor

__all__ = ["blocks_are_faster"]

log = logging.getLogger("rillet")
ROWS = 4096                          # of a tensor, at most
TURN = {1: 128, 256: 1}              # tokens of a product -> how many of them: a question of 256 tokens, an answer of 128
AT_ONCE, ROUNDS = 4, 3
CLEARLY = 1.1

Clock = Callable[[], float]


def blocks_are_faster(product: Product, raw: RawTensor, dtype: mx.Dtype, clock: Clock = time.perf_counter) -> bool:
    """By the time that a turn's products with the tensor's first rows take. True for a type that no groups hold exactly."""
    if raw.storage.name not in REPACKS:
        return True
    some = Part(raw.name, 0, min(ROWS, raw.rows)).of(raw, raw.name)
    blocks = mx.array(some.data.reshape(some.rows, some.row_bytes))
    groups = Packer(dtype).matrix([some], lambda tensor: None)
    ways: Mapping[str, Callable[[mx.array], mx.array]] = {"blocks": lambda x: product(x, blocks), "groups": groups}
    taken = dict.fromkeys(ways, 0.0)
    for tokens, times in TURN.items():
        inputs = [mx.array(np.random.default_rng(at).standard_normal((tokens, some.shape[-1]), np.float32)).astype(dtype)
                  for at in range(AT_ONCE)]  # fmt: skip
        mx.eval(inputs)
        for name, way in ways.items():
            taken[name] += times * best_of(way, inputs, clock)
    if taken["blocks"] <= CLEARLY * taken["groups"]:
        return True
    log.info("%s rests in MLX's groups: they are %.2f x as fast here as blocks", raw.storage.name,
             taken["blocks"] / max(taken["groups"], 1e-9))  # fmt: skip
    return False


def best_of(way: Callable[[mx.array], mx.array], inputs: list[mx.array], clock: Clock) -> float:
    """Seconds for one product with each input, the best of some rounds; a round before them compiles."""
    best = float("inf")
    for round_number in range(1 + ROUNDS):
        began = clock()
        mx.eval([way(x) for x in inputs])
        if round_number:
            best = min(best, clock() - began)
    return best
