"""What a visitor without a GPU can see: the demo prompt through the CUDA kernels on the emulated device, and on the CPU.

    sh ci/show cuda

The model is the demo model's first two layers, so that an emulated step takes a second: its words make no sense, but both
backends must choose the same ones as long as no two are equally likely.
"""

import sys
import time
from dataclasses import replace

import anyio

from backends.cpu.runner import CpuBackend
from backends.cuda.runner import CudaBackend
from engine import Engine, EngineConfig, Message, Result
from engine.backend import Backend
from engine.weights.checkpoint import open_checkpoint
from engine.weights.hub import model_path
from tests.cuda.emulated_device import EmulatedDevice

LAYERS, TOKENS = 2, 12
PROMPT = [Message("user", "How are you?")]


async def answer(backend: Backend) -> tuple[Result, float]:
    whole = open_checkpoint(model_path(EngineConfig()))
    cut = replace(whole, spec=replace(whole.spec, layers=whole.spec.layers[:LAYERS]))
    config = EngineConfig(max_num_seqs=1, max_model_len=256, kv_bytes=4 << 20)
    async with Engine(config, backend=backend, checkpoint=cut) as engine:
        began = time.perf_counter()
        result = await engine.generate(PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True)
        return result, time.perf_counter() - began


async def main() -> int:
    device = EmulatedDevice()
    cuda, cuda_s = await answer(CudaBackend(device, max_batch_tokens=64, max_num_seqs=1))
    cpu, cpu_s = await answer(CpuBackend())
    print(f"emulated {device.facts.architecture}: {cuda.token_ids}  ({cuda_s:.1f} s, {device.launches:,} launches)")
    print(f"cpu:            {cpu.token_ids}  ({cpu_s:.1f} s)")
    same = cuda.token_ids == cpu.token_ids
    print("the same tokens" if same else "NOT the same tokens")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(anyio.run(main))
