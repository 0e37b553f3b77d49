"""What the MLX backend takes: the pool once and never a copy of it, what it tells, and what it refuses."""

from dataclasses import replace

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

import mlx.core as mx

from backends.mlx import memory
from backends.mlx.runner import MlxBackend
from engine.backend import LoadOptions
from engine.errors import OutOfDeviceMemory
from tests.mlx.backends import metal_kernel, mlx_backend, quiet
from tests.support.random_models import RandomSource, small_model
from tests.support.steps import build_step

LAYERS, ROWS = 8, 4              # a copy of one layer's keys alone would be a sixteenth of the pool


def opened(pages, **options) -> MlxBackend:
    spec, tensors = small_model("k-quants")
    spec = replace(spec, layers=spec.layers[:1] * LAYERS)
    return mlx_backend(spec, RandomSource(spec, tensors.types), pages=pages, **options)


@pytest.mark.parametrize("kernels", [False, True], ids=["mlx", "kernels"])
def test_thirty_two_steps_take_the_pool_and_five_hundredths_of_it_at_most(kernels) -> None:
    count = 127 if kernels else 1023                            # the shim copies every pool for every kernel
    backend = opened(count, make_kernel=metal_kernel() if kernels else None)
    pool = backend.memory().cache_bytes
    assert pool == (count + 1) * backend.session.page_bytes            # one more for padding
    pages = [[4 * row + at for at in range(4)] for row in range(ROWS)]
    tokens = [[7 + row] * (9 + 5 * row) for row in range(ROWS)]
    backend.wait(backend.submit(build_step([(tokens[row], 0, pages[row]) for row in range(ROWS)])))
    lengths = [len(each) for each in tokens]
    mx.synchronize()
    before = mx.get_active_memory() - pool
    mx.reset_peak_memory()
    ticket = None
    for step in range(32):
        references = [5] * ROWS if ticket is None else [-1 - row for row in range(ROWS)]
        newer = backend.submit(build_step([([references[row]], lengths[row] + step, pages[row]) for row in range(ROWS)]))
        if ticket is not None:
            backend.wait(ticket)                                # two are in flight, as under lookahead
        ticket = newer
    backend.wait(ticket)
    assert mx.get_peak_memory() - before < 1.05 * pool
    backend.close()


def test_what_it_tells_is_what_it_holds() -> None:
    mx.clear_cache()
    held = mx.get_active_memory()
    backend = opened(100)
    told = backend.memory()
    assert told.cache_bytes == 101 * backend.session.page_bytes
    assert abs(mx.get_active_memory() - held - told.weights_bytes - told.cache_bytes) < 0.02 * told.cache_bytes
    backend.close()
    mx.clear_cache()
    assert mx.get_active_memory() <= held + (1 << 16)
    assert backend.memory() == type(told)(0, 0, 0)


def test_a_pool_that_does_not_fit_is_refused_before_it_is_allocated(monkeypatch) -> None:
    backend = opened(4)
    monkeypatch.setattr(memory, "memory_limit", lambda: 1 << 30)
    monkeypatch.setattr(memory, "MEMINFO", memory.MEMINFO / "absent")
    free = memory.available_bytes(backend.session.spec, backend.session.most_tokens)
    held = mx.get_active_memory()
    with pytest.raises(OutOfDeviceMemory, match=r"KV cache are wanted.*lower --kv-bytes"):
        backend.allocate_cache(1 << 50)
    with pytest.raises(OutOfDeviceMemory, match="one page of 32 tokens"):
        backend.allocate_cache(backend.session.page_bytes - 1)
    assert mx.get_active_memory() <= held
    assert free > 0
    backend.close()


def test_the_pool_of_nobody_s_choice_is_bounded() -> None:
    """Without --kv-bytes: what sequences of the longest context can fill, and no more than a share of what is free."""
    spec, tensors = small_model("llama")
    backend = MlxBackend()
    backend.load(spec, tensors, LoadOptions(dtype="f32", max_num_seqs=2, context_length=100), quiet)
    assert backend.allocate_cache(None) == 2 * 4
    backend.close()
