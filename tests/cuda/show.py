"""What a visitor without a GPU can see: the demo prompt through the CUDA kernels on the emulated device, and on the CPU.

    sh ci/show cuda

The model is the demo model's first two layers, so that an emulated step takes a second: its words make no sense, but both
backends must choose the same ones as long as no two are equally likely.
"""

import sys

import anyio

from backends.cpu.runner import CpuBackend
from backends.cuda.runner import CudaBackend
from tests.cuda.emulated_device import EmulatedDevice
from tests.support.demo_cut import show


async def main() -> int:
    device = EmulatedDevice()
    cuda = CudaBackend(device, max_batch_tokens=64, max_num_seqs=1)
    code = await show({f"emulated {device.facts.architecture}": cuda, "cpu": CpuBackend()})
    print(f"({device.launches:,} kernels were launched)")
    return code


if __name__ == "__main__":
    sys.exit(anyio.run(main))
