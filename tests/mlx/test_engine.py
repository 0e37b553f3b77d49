"""The scheduler over the MLX backend: preemption, prefix cache, forks, lookahead; on MLX's own operations, and on the Metal
kernels, which the shim executes where there is no Metal."""

import mlx.core as mx
import pytest

from backends.mlx.metal_cache import MetalCache
from backends.mlx.runner import MlxBackend
from engine import EngineClosed, StepFailed
from tests.mlx.backends import NATIVE, metal_kernel
from tests.support.scheduled import Scheduled, prompt_of

pytestmark = pytest.mark.anyio
TOLERANCE = 5e-2 if NATIVE else 2e-4         # on a Mac activations have 16 bits


def on_kernels() -> MlxBackend:
    return MlxBackend(make_kernel=metal_kernel(), max_batch_tokens=48)


PORTABLE = Scheduled("llama", MlxBackend, TOLERANCE, item_bytes=2 if NATIVE else 4)
KERNELS = Scheduled("k-quants", on_kernels, TOLERANCE, item_bytes=2 if NATIVE else 4)
both = pytest.mark.parametrize("small", [pytest.param(PORTABLE, id="mlx"), pytest.param(KERNELS, id="kernels")])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@both
async def test_streams_that_do_not_fit_together_are_preempted_and_right(small: Scheduled) -> None:
    await small.preempt()


@both
async def test_prefixes_come_from_the_cache_and_choices_fork_in_the_middle_of_a_page(small: Scheduled) -> None:
    await small.fork()


@both
async def test_lookahead_draws_the_same_tokens(small: Scheduled) -> None:
    await small.look_ahead()


@both
async def test_states_and_prompt_logprobs(small: Scheduled) -> None:
    await small.embed()


async def test_the_kernels_are_what_runs() -> None:
    engine, backend = KERNELS.opened(20)
    async with engine:
        await engine.generate([1, 2, 3], max_tokens=2)
        assert isinstance(backend.session.cache, MetalCache)


async def test_a_device_that_fails_ends_every_stream_with_its_error() -> None:
    engine, backend = PORTABLE.opened(20)
    async with engine:
        first = await engine.stream(prompt_of(1, 10), max_tokens=100, ignore_eos=True)
        second = await engine.stream(prompt_of(2, 10), max_tokens=100, ignore_eos=True)
        async for _ in first:
            break

        def failing(states: mx.array) -> mx.array:
            raise RuntimeError("[metal] Command buffer execution failed")

        backend.session.model.logits = failing
        for stream in (first, second):
            with pytest.raises(StepFailed, match="Command buffer"):
                async for _ in stream:
                    pass
        with pytest.raises(EngineClosed, match="dead"):
            await engine.stream(prompt_of(3, 4))
