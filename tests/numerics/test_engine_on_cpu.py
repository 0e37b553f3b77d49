"""The demo model through the whole engine on the CPU backend: the same tokens whatever the company, the chunks, the cache.

Every run is compared with one request alone, without prefix cache and without lookahead.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import numpy as np
import pytest

from engine import Engine, EngineConfig, Result
from engine.weights.checkpoint import open_checkpoint
from engine.weights.tensors import to_float32

pytestmark = pytest.mark.anyio
PAGE_BYTES = 32 * 30 * 2 * 192 * 4                       # of the demo model: tokens x layers x (K, V) x width x float32
TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Once upon a time, in a land far away, there lived a small dragon who could not fly.",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "Zwei Dinge sind unendlich:",
]
WISHES: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "frequency_penalty": 0.7},
    {"temperature": 0.0, "presence_penalty": 0.9},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "seed": 8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.2, "seed": 9, "repetition_penalty": 1.1, "logit_bias": {0: -100.0, 260: 2.0}},
]
TOKENS = 12


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"                                     # the loops are compared in tests/unit; here the numbers count


@asynccontextmanager
async def opened(path: Path, **config: object) -> AsyncIterator[Engine]:
    settings: dict[str, object] = {"kv_bytes": 400 * PAGE_BYTES, **config}
    async with Engine(EngineConfig(weight_file=str(path), **settings)) as engine:
        yield engine


def request(number: int) -> tuple[str, dict[str, object]]:
    return TEXTS[number % len(TEXTS)], {**WISHES[number % len(WISHES)], "max_tokens": TOKENS, "ignore_eos": True}


async def run(engine: Engine, numbers: Sequence[int]) -> dict[int, list[int]]:
    results: dict[int, list[int]] = {}

    async def ask(number: int) -> None:
        text, wishes = request(number)
        results[number] = (await engine.generate(text, **wishes)).token_ids

    async with anyio.create_task_group() as group:
        for number in numbers:
            group.start_soon(ask, number)
    return results


@pytest.fixture(scope="module")
def alone(demo_path: Path) -> dict[int, list[int]]:
    """Each request by itself."""

    async def one_by_one() -> dict[int, list[int]]:
        async with opened(demo_path, prefix_cache=False, lookahead=False) as engine:
            found: dict[int, list[int]] = {}
            for number in range(17):
                found |= await run(engine, [number])
            return found

    return anyio.run(one_by_one)


async def test_batches_of_1_to_17_give_what_each_gives_alone(demo_path: Path, alone: dict[int, list[int]]) -> None:
    async with opened(demo_path, max_num_seqs=17) as engine:
        for size in (1, 2, 3, 5, 8, 17):
            found = await run(engine, range(size))
            assert found == {number: alone[number] for number in range(size)}, f"in a batch of {size}"
        again = await run(engine, range(17))             # now with prefixes from the cache
        assert again == alone
        assert engine.metrics.prefix_cache_queries > 0
        assert engine.metrics.audit_failures == 0


@pytest.mark.parametrize("chunk", [7, 33])
async def test_chunks_change_nothing(demo_path: Path, alone: dict[int, list[int]], chunk: int) -> None:
    async with opened(demo_path, max_batch_tokens=chunk, max_num_seqs=5) as engine:
        assert await run(engine, range(10)) == {number: alone[number] for number in range(10)}


async def test_preemption_changes_nothing(demo_path: Path, alone: dict[int, list[int]]) -> None:
    """A pool in which the sequences do not fit together."""
    async with opened(demo_path, kv_bytes=5 * PAGE_BYTES, max_num_seqs=6) as engine:
        assert await run(engine, range(12)) == {number: alone[number] for number in range(12)}
        long = {"max_tokens": 90, "temperature": 0.0, "ignore_eos": True}
        single = [(await engine.generate(text, **long)).token_ids for text in TEXTS[:3]]
        together: list[list[int]] = [[], [], []]

        async def ask(number: int) -> None:
            together[number] = (await engine.generate(TEXTS[number], **long)).token_ids

        before = engine.metrics.num_preemptions
        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(ask, number)
        assert engine.metrics.num_preemptions > before
        assert together == single
        assert engine.metrics.audit_failures == 0


async def test_a_long_prompt_from_the_cache_gives_the_same(demo_path: Path) -> None:
    prompt = "A list of animals: " + ", ".join(f"animal number {n}" for n in range(40))
    async with opened(demo_path) as engine:
        cold = await engine.generate(prompt, temperature=0, max_tokens=8, logprobs=3)
        warm = await engine.generate(prompt, temperature=0, max_tokens=8, logprobs=3)
        assert cold.usage.cached_tokens == 0
        assert warm.usage.cached_tokens >= 128
        assert warm.choices[0].logprobs == cold.choices[0].logprobs          # bit for bit


async def test_choices_differ_and_are_those_of_any_company(demo_path: Path) -> None:
    async with opened(demo_path, max_num_seqs=4) as engine:
        def texts(result: Result) -> list[str]:
            return [choice.text for choice in result.choices]

        wishes = {"n": 6, "temperature": 1.0, "seed": 5, "max_tokens": 10}
        alone = texts(await engine.generate(TEXTS[2], **wishes))
        assert len(set(alone)) == 6
        found: list[list[str]] = []

        async def ask() -> None:
            found.append(texts(await engine.generate(TEXTS[2], **wishes)))

        async with anyio.create_task_group() as group:
            group.start_soon(run, engine, range(5))
            group.start_soon(ask)
        assert found == [alone]


async def test_prompt_logprobs_are_those_of_one_position_at_a_time(demo_path: Path) -> None:
    async with opened(demo_path) as engine:
        tokens = await engine.tokenize(TEXTS[0])
        whole = await engine.generate(tokens, max_tokens=0, prompt_logprobs=2)
        assert whole.prompt_logprobs is not None
        for at in range(1, len(tokens)):
            one = await engine.generate(tokens[:at], max_tokens=1, temperature=0, logprobs=2)
            assert one.choices[0].logprobs is not None
            assert one.choices[0].logprobs[0].top == whole.prompt_logprobs[at - 1].top
        assert [found.token_id for found in whole.prompt_logprobs] == tokens[1:]


async def test_the_last_state_times_the_output_matrix_gives_the_greedy_token(demo_path: Path) -> None:
    checkpoint = open_checkpoint(demo_path)
    output = to_float32(checkpoint.tensors.tensor("embedding"))              # tied
    checkpoint.close()
    async with opened(demo_path) as engine:
        for text in TEXTS:
            state = (await engine.embed(text, pooling="last")).vector
            logits = output @ state
            found = await engine.generate(text, max_tokens=1, temperature=0, logprobs=1)
            assert found.token_ids == [int(logits.argmax())]
            assert found.choices[0].logprobs is not None
            expected = logits.max() - np.logaddexp.reduce(logits.astype(np.float64))
            assert found.choices[0].logprobs[0].logprob == pytest.approx(expected, abs=1e-3)


async def test_the_mean_of_states_is_pooled_over_chunks(demo_path: Path) -> None:
    prompt = list(range(1000, 1040))
    async with opened(demo_path) as engine:
        whole = (await engine.embed(prompt)).vector
        states = [(await engine.embed(prompt[:at], pooling="last")).vector for at in range(1, 41)]
    async with opened(demo_path, max_batch_tokens=16) as engine:
        cut = (await engine.embed(prompt)).vector
    np.testing.assert_allclose(whole, np.mean(states, axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cut, whole, rtol=1e-6, atol=1e-6)
