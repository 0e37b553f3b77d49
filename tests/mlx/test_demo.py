"""The demo model on the MLX backend: whole for one prompt, cut to two layers for all that the scheduler does."""

from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

from backends.cpu.runner import CpuBackend
from backends.mlx.runner import MlxBackend
from engine import Engine, EngineConfig, Message, Result
from engine.backend import Backend
from tests.mlx.backends import NATIVE, metal_kernel
from tests.support.demo_cut import demo_engine

pytestmark = pytest.mark.anyio
TEXTS = (
    "How are you?", "Name three colours.", "Why is the sky blue? Answer in one sentence, for a child of five.", "2 + 2 =",
    "Write a poem.", "Translate 'good morning' into French, German and Italian.", "Hi", "List the planets in order.",
)  # fmt: skip


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_the_demo_model_says_what_it_says_on_the_cpu(demo_path: Path) -> None:
    found = []
    for name in ("mlx", "cpu"):
        config = EngineConfig(weight_file=str(demo_path), backend=name, dtype="f32", max_num_seqs=1, kv_bytes=32 << 20)
        async with Engine(config) as engine:
            result = await engine.generate([Message("user", TEXTS[0])], max_tokens=16, temperature=0, ignore_eos=True)
            found.append(result.token_ids)
    assert len(found[0]) == 16
    assert found[0] == found[1]


async def of_eight(backend: Backend, pages: int, page_bytes: int) -> tuple[list[Result], Result, int]:
    """Eight prompts of different lengths at once, in fewer pages than they need, then one of them again, in three choices."""
    engine = demo_engine(backend, 2, max_num_seqs=8, max_model_len=256, kv_bytes=pages * page_bytes, dtype="f32")
    results: dict[int, Result] = {}
    wishes = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    async with engine:

        async def ask(number: int) -> None:
            results[number] = await engine.generate([Message("user", TEXTS[number])], **wishes)

        async with anyio.create_task_group() as group:
            for number in range(len(TEXTS)):
                group.start_soon(ask, number)
        preempted = engine.metrics.num_preemptions
        await engine.generate([Message("user", TEXTS[2])], max_tokens=1)          # brings its page back
        again = await engine.generate(
            [Message("user", TEXTS[2])], n=3, max_tokens=12, temperature=0.7, seed=5, ignore_eos=True
        )
        assert engine.metrics.audit_failures == 0
    return [results[number] for number in range(len(TEXTS))], again, preempted


def portable() -> Backend:
    return MlxBackend()


def on_kernels() -> Backend:
    return MlxBackend(make_kernel=metal_kernel(), max_batch_tokens=48)


@pytest.mark.parametrize("make", [portable, pytest.param(on_kernels, marks=pytest.mark.full)])
async def test_a_batch_of_eight_with_preemption_forks_and_prefixes_says_what_the_cpu_says(
    make: Callable[[], Backend], demo_path: Path
) -> None:
    page_bytes = 2 * 2 * 3 * 64 * 32 * (2 if NATIVE else 4)                  # layers, K and V, heads, head size, tokens
    results, again, preempted = await of_eight(make(), 11, page_bytes)
    expected, expected_again, _ = await of_eight(CpuBackend(), 64, 2 * 2 * 3 * 64 * 32 * 4)
    assert preempted > 0
    assert again.usage.cached_tokens >= 32
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    assert len({tuple(choice.token_ids) for choice in again.choices}) == 3
    assert [choice.token_ids for choice in again.choices] == [choice.token_ids for choice in expected_again.choices]
