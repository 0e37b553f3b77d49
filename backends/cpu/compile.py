"""A second process that compiles attention and rope on a first start, while this one compiles the rest.

session.py starts it when Numba's cache does not have them; `python -m backends.cpu.compile` is what it runs. Numba compiles
under one lock, so that a thread would not help. Without a second core, or if the process fails, this one compiles all.
"""

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backends.cpu.host import usable_cores
from backends.cpu.kernels.attention import attend
from backends.cpu.kernels.sampling import sample
from backends.cpu.model import make_cache, step_shape
from backends.cpu.ops import Ops
from backends.cpu.rope import Rotation
from backends.cpu.warm_up import no_weights, tiny_spec, warm_up_step

__all__ = ["compiling_aside", "is_compiled"]

log = logging.getLogger(__name__)
PATIENCE_S = 120


@contextmanager
def compiling_aside() -> Iterator[None]:
    """Run the helper process while the block runs, if it is of use, and wait for it at the block's end."""
    if usable_cores() < 2 or not sys.executable or getattr(sys, "frozen", False) or is_compiled():
        yield
        return
    command = [sys.executable, "-P", "-m", "backends.cpu.compile"]     # -P: nothing from the current folder
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


def is_compiled() -> bool:
    """Whether an earlier start has left the costliest kernels in Numba's cache."""
    return cached(attend) and cached(sample)


def cached(kernel: object) -> bool:
    """Whether Numba's cache has an index of the kernel; a stale one costs time, no more."""
    function, folder = kernel.py_func, kernel.stats.cache_path  # type: ignore[attr-defined]
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}-"
    return folder is not None and any(Path(folder).glob(f"{name}*.nbi"))


def main() -> None:
    """Call both kernels as a step does, so that their signatures are a step's."""
    spec, step = tiny_spec(), warm_up_step(2)
    ops, layer = Ops(1, spec.norm_epsilon), spec.layers[0].attention
    qkv = ops.rows("qkv", 2, (layer.heads + 2 * layer.kv_heads) * layer.head_size)
    cache, shape = make_cache(spec, 1), step_shape(spec, step, Rotation.of(layer.rope))
    ops.attend(qkv, 0, layer, cache, shape)
    ops.rotate(qkv, 0, layer, no_weights(), cache, shape)


if __name__ == "__main__":
    main()
