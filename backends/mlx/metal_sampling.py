"""Where top-k and top-p cut a distribution, as a Metal kernel that sorts nothing; choosing.py calls it on a Mac.

MLX's own way is a sort of the whole vocabulary for each place. Made and used on the device thread only.
"""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from backends.mlx.metal_library import KernelLibrary, MakeKernel
from engine.errors import ConfigError
from engine.step import FloatArray

__all__ = ["SamplingKernels"]

THREADS = 512
MOST = 1 << 24                        # of a vocabulary: float32 counts so far


class SamplingKernels:
    """The sampler's kernels. `make_kernel` is mx.fast.metal_kernel, but for tests."""

    def __init__(self, make_kernel: MakeKernel | None = None) -> None:
        self.library = KernelLibrary(make_kernel)

    def least_kept(
        self, x: mx.array, top: mx.array, cold: mx.array, count: NDArray[np.int64], top_p: FloatArray
    ) -> tuple[mx.array, mx.array]:
        """What choosing.least_kept returns for a width of the whole vocabulary: x (n, V) float32, top and cold (n, 1), of
        which the `count` (n,) largest are looked at -> the least logit that is kept, how many of that one, (n, 1) each."""
        rows, vocabulary = x.shape
        if x.dtype != mx.float32 or not 8 <= vocabulary < MOST:
            raise ConfigError(f"logits {x.shape} {x.dtype}: they must be (n, V) float32, V from 8 to {MOST - 1}")
        told = np.zeros((rows, 6), np.float32)
        told[:, 0], told[:, 1] = top_p, count
        least, ties = self.library.run(
            "least_kept",
            {"x": x, "settings": mx.concatenate([top, cold, mx.array(told)], axis=1)},
            {"least": ((rows, 1), mx.float32), "ties": ((rows, 1), mx.int32)},
            {"COUNT": vocabulary},
            groups=(rows, 1, 1),
            threads=THREADS,
        )
        return least, ties
