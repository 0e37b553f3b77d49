"""The scheduler over the CUDA backend on the emulated device: preemption, prefix cache, forks, lookahead, graphs."""

import pytest

from backends.cuda.runner import CudaBackend
from engine import EngineClosed, StepFailed
from tests.cuda.devices import ON_A_GPU, make_device
from tests.support.scheduled import Scheduled, prompt_of

pytestmark = pytest.mark.anyio
SMALL = Scheduled(
    "llama", lambda: CudaBackend(make_device(seed=5), max_batch_tokens=48, max_num_seqs=4),
    tolerance=0.1, item_bytes=2,             # logits are off by up to 2e-2 of the largest one
)  # fmt: skip


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_streams_that_do_not_fit_together_are_preempted_and_right() -> None:
    captured: list[int] = []
    await SMALL.preempt(lambda backend: captured.append(len(backend.session.graphs.graphs)))
    assert captured[0] >= 2                              # several buckets were captured


async def test_prefixes_come_from_the_cache_and_choices_fork_in_the_middle_of_a_page() -> None:
    await SMALL.fork()


async def test_lookahead_draws_the_same_tokens() -> None:
    await SMALL.look_ahead()


@pytest.mark.skipif(ON_A_GPU, reason="it would fail for every test that follows")
async def test_a_device_that_fails_ends_every_stream_with_its_error() -> None:
    engine, backend = SMALL.opened(20)
    async with engine:
        first = await engine.stream(prompt_of(1, 10), max_tokens=100, ignore_eos=True)
        second = await engine.stream(prompt_of(2, 10), max_tokens=100, ignore_eos=True)
        async for _ in first:
            break
        launch = backend.device.streams[0].launch

        def out_of_bounds(kernel, *arguments: object) -> None:
            if kernel.name.startswith("sample"):
                arguments = (*arguments[:3], 8, *arguments[4:])          # the logits' address becomes 8
            launch(kernel, *arguments)

        backend.device.streams[0].launch = out_of_bounds
        for stream in (first, second):
            with pytest.raises(StepFailed, match="memory"):
                async for _ in stream:
                    pass
        with pytest.raises(EngineClosed, match="dead"):
            await engine.stream(prompt_of(3, 4))


async def test_states_and_prompt_logprobs() -> None:
    await SMALL.embed()
