"""Both backends with one model: what test_families.py, test_steps.py and test_memory.py compare."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from backends.cpu.runner import CpuBackend
from backends.mlx.runner import MlxBackend
from engine.backend import LoadOptions
from tests.mlx.shim import ShimMetal

__all__ = ["NATIVE", "loaded", "logits_of_cpu", "logits_of_mlx", "metal_kernel", "mlx_backend", "quiet"]

NATIVE = mx.metal.is_available()


def metal_kernel():
    """What makes Metal kernels in tests: Metal itself (None) or the shim."""
    return None if NATIVE else ShimMetal((0,)).metal_kernel


def quiet(what: str, done: int, of: int) -> None:
    """Progress that nobody watches."""


def mlx_backend(spec, tensors, *, pages=16, make_kernel=None, **options) -> MlxBackend:
    backend = MlxBackend(make_kernel=make_kernel, max_batch_tokens=options.pop("max_batch_tokens", None))
    backend.load(spec, tensors, LoadOptions(**({"dtype": "f32"} | options)), quiet)
    backend.allocate_cache(pages * backend.session.page_bytes)
    return backend


@contextmanager
def loaded(spec, tensors, **options) -> Iterator[tuple[CpuBackend, MlxBackend]]:
    cpu = CpuBackend()
    cpu.load(spec, tensors, LoadOptions(dtype="f32"), quiet)
    cpu.allocate_cache(4 << 20)
    mlx = mlx_backend(spec, tensors, **options)
    yield cpu, mlx
    cpu.close()
    mlx.close()


def logits_of_cpu(backend: CpuBackend, step) -> np.ndarray:
    session = backend.session

    def run() -> np.ndarray:
        states = session.model.forward(step.tokens, session.model.shapes(step), session.cache)
        return session.model.logits(session.model.final_states(states, step.sample_at.astype(np.intp))).copy()

    return backend.compute.submit(run).result()


def logits_of_mlx(backend: MlxBackend, step) -> tuple[np.ndarray, np.ndarray]:
    """(S, V), and what was drawn greedily."""
    model, seen = backend.session.model, []
    backend.session.model.logits = lambda states: seen.append(type(model).logits(model, states)) or seen[-1]
    try:
        drawn = backend.wait(backend.submit(step)).tokens
    finally:
        del backend.session.model.logits
    return np.array(mx.concatenate(seen)), drawn
