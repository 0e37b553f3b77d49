"""A second process that compiles a part of the kernels on a first start, while this one compiles the rest.

session.py starts it when Numba's cache does not have them; `python -m backends.cpu.compile PART` is what it runs. Numba
compiles under one lock, so that a thread would not help. Without a second core, or if it fails, this process compiles all.
"""

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from backends.cpu.host import usable_cores
from backends.cpu.kernels.attention import attend
from backends.cpu.kernels.forward import attention_function, forward
from backends.cpu.kernels.sampling import sample
from backends.cpu.kernels.vectors import has_byte_products
from backends.cpu.model import make_cache, step_shape
from backends.cpu.ops import Ops
from backends.cpu.rope import Rotation
from backends.cpu.sampler import Sampler
from backends.cpu.warm_up import VOCABULARY, no_weights, tiny_spec, warm_up_step
from engine.model.spec import Dense, ModelSpec
from engine.weights.tensors import TensorSource

__all__ = ["ATTENTION", "SAMPLING", "aside_of", "compiling_aside", "is_compiled"]

log = logging.getLogger(__name__)
PATIENCE_S = 120
ATTENTION, SAMPLING = "attention", "sampling"
COSTLY = {ATTENTION: (attend, sample), SAMPLING: (forward, sample)}      # what a start compiles that has the part done aside


def aside_of(spec: ModelSpec, tensors: TensorSource) -> str:
    """What the helper compiles: sampling (and attention by address) where all layers are one call, about what fused.py
    serves; else attention as a kernel."""
    first = spec.layers[0]
    quantized = tensors.tensor("layers.0.query").storage.quantized
    return SAMPLING if has_byte_products() and quantized and isinstance(first.feed_forward, Dense) else ATTENTION


@contextmanager
def compiling_aside(part: str) -> Iterator[None]:
    """Run the helper process while the block runs, if it is of use, and wait for it at the block's end."""
    if usable_cores() < 2 or not sys.executable or getattr(sys, "frozen", False) or is_compiled(part):
        yield
        return
    command = [sys.executable, "-P", "-m", "backends.cpu.compile", part]     # -P: nothing from the current folder
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as helper:  # noqa: S603
        try:
            yield
            helper.wait(PATIENCE_S)
        except BaseException as error:
            helper.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    if helper.returncode:
        log.info("the process that compiles kernels ended with %d: compiling them here", helper.returncode)


def is_compiled(part: str) -> bool:
    """Whether an earlier start has left the costliest kernels in Numba's cache."""
    return all(cached(kernel) for kernel in COSTLY[part])


def cached(kernel: object) -> bool:
    """Whether Numba's cache has an index of the kernel; a stale one costs time, no more."""
    function, folder = kernel.py_func, kernel.stats.cache_path  # type: ignore[attr-defined]
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}-"
    return folder is not None and any(Path(folder).glob(f"{name}*.nbi"))


def main() -> None:
    """Call the part's kernels as a step does, so that their signatures are a step's."""
    spec, step = tiny_spec(), warm_up_step(2)
    if sys.argv[1:] == [SAMPLING]:
        logits = np.zeros((2, VOCABULARY), np.float32)
        attention_function()
        Sampler(VOCABULARY, 1).draw(step, np.zeros(0, np.int32), lambda at: logits[: len(at)])
        return
    ops, layer = Ops(1, spec.norm_epsilon), spec.layers[0].attention
    qkv = ops.rows("qkv", 2, (layer.heads + 2 * layer.kv_heads) * layer.head_size)
    cache, shape = make_cache(spec, 1), step_shape(spec, step, Rotation.of(layer.rope))
    ops.attend(qkv, 0, layer, cache, shape)
    ops.rotate(qkv, 0, layer, no_weights(), cache, shape)


if __name__ == "__main__":
    main()
