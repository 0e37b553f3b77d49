"""The demo model's first layers: what an emulated device can run in a test or before a visitor."""

import time
from dataclasses import replace

from engine import Engine, EngineConfig, Message
from engine.backend import Backend
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.hub import model_path

__all__ = ["cut_demo", "demo_engine", "show"]

LAYERS, TOKENS = 2, 12
PROMPT = [Message("user", "How are you?")]


def cut_demo(layers: int) -> Checkpoint:
    """The checkpoint with so many layers; its words make no sense, but are as definite as a whole model's."""
    whole = open_checkpoint(model_path(EngineConfig()))
    return replace(whole, spec=replace(whole.spec, layers=whole.spec.layers[:layers]))


def demo_engine(backend: Backend, layers: int, **settings: object) -> Engine:
    return Engine(EngineConfig(**settings), backend=backend, checkpoint=cut_demo(layers))


async def show(backends: dict[str, Backend]) -> int:
    """Print what each backend says to the demo prompt; 0 if all say the same."""
    found = []
    for name, backend in backends.items():
        async with demo_engine(backend, LAYERS, max_num_seqs=1, max_model_len=256, kv_bytes=4 << 20) as engine:
            began = time.perf_counter()
            result = await engine.generate(PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True)
            print(f"{name + ':':<{max(map(len, backends)) + 1}} {result.token_ids}  ({time.perf_counter() - began:.1f} s)")
            found.append(result.token_ids)
    same = all(each == found[0] for each in found)
    print("the same tokens" if same else "NOT the same tokens")
    return 0 if same else 1
