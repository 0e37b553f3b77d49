"""What a visitor without a Mac can see: the demo prompt through MLX's graph and the Metal kernels, and on the CPU.

    sh ci/show mlx

The graph runs on MLX's CPU build. Attention, the writes of keys and values, norms and products with native blocks are the
Metal sources, which the shim compiles with g++ and runs. The model is the demo model's first two layers, so that this takes
seconds: its words make no sense, but all must choose the same ones as long as no two are equally likely.
"""

import sys

import anyio
import mlx.core as mx

from backends.cpu.runner import CpuBackend
from backends.mlx.runner import MlxBackend
from tests.mlx.shim import ShimMetal
from tests.support.demo_cut import show


async def main() -> int:
    if mx.metal.is_available():
        return await show({"mlx on Metal": MlxBackend(), "cpu": CpuBackend()})
    shim = ShimMetal((0,))
    kernels = MlxBackend(make_kernel=shim.metal_kernel, max_batch_tokens=64)
    code = await show({"mlx, Metal kernels in the shim": kernels, "mlx alone": MlxBackend(), "cpu": CpuBackend()})
    print(f"({shim.launches:,} Metal kernels were run)")
    return code


if __name__ == "__main__":
    sys.exit(anyio.run(main))
