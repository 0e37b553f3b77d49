"""A small model of random weights through the scheduler on some backend: what test_engine.py of cuda and of mlx share.

What the backend does shows in the logprobs: whatever page, chunk or company a token was computed in, its raw logprob must be
what the CPU oracle says of the same sequence in one piece.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import numpy as np

from backends.cpu.runner import CpuBackend
from engine import Engine, EngineConfig, Result
from engine.backend import Backend, LoadOptions
from engine.bench.synthetic import tokenizer_of
from engine.weights.checkpoint import Checkpoint
from tests.support.random_models import RandomSource, small_model
from tests.support.steps import build_step

__all__ = ["Scheduled", "prompt_of"]

PAGE = 32


class Tensors(RandomSource):
    """What a Checkpoint holds."""

    def close(self) -> None:
        """Nothing is open."""


def prompt_of(number: int, length: int) -> list[int]:
    return [(number * 37 + i * 11 + i * i % 7) % 320 for i in range(length)]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Small model `case` on what make_backend makes. tolerance: of a logprob. item_bytes: of a number in the KV cache."""

    case: str
    make_backend: Callable[[], Backend]
    tolerance: float
    item_bytes: int

    def opened(self, pages: int, **settings: object) -> tuple[Engine, Backend]:
        spec, tensors = small_model(self.case)
        backend = self.make_backend()
        a = spec.layers[0].attention
        page_bytes = len(spec.layers) * 2 * a.kv_heads * a.head_size * PAGE * self.item_bytes
        checkpoint = Checkpoint(
            path=Path("small"), name="small", spec=spec, tensors=Tensors(spec, tensors.types),
            tokenizer=tokenizer_of(spec.vocabulary_size), template=None, end_ids=frozenset(), sampling_defaults={},
        )  # fmt: skip
        config = EngineConfig(kv_bytes=pages * page_bytes, max_model_len=256, **settings)
        return Engine(config, backend=backend, checkpoint=checkpoint), backend

    def oracle(self, tokens: list[int]) -> np.ndarray:
        """Logprobs (T, V) of one sequence in one step."""
        spec, tensors = small_model(self.case)
        backend = CpuBackend()
        backend.load(spec, tensors, LoadOptions(dtype="f32"), lambda what, done, of: None)
        backend.allocate_cache(8 << 20)
        step, session = build_step([(tokens, 0, list(range(16)))]), backend.session

        def run() -> np.ndarray:
            states = session.model.forward(step.tokens, session.model.shapes(step), session.cache)
            return session.model.logits(session.model.final_states(states, np.arange(len(tokens)))).copy()

        logits = backend.compute.submit(run).result().astype(np.float64)
        backend.close()
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    def check(self, prompt: list[int], result: Result) -> None:
        for choice in result.choices:
            expected = self.oracle(prompt + choice.token_ids)
            assert choice.logprobs
            for number, found in enumerate(choice.logprobs):
                row = expected[len(prompt) + number - 1]
                assert found.token_id == choice.token_ids[number]
                for each in (found, *found.top):
                    assert abs(each.logprob - row[each.token_id]) < self.tolerance, (number, each, row[each.token_id])

    async def preempt(self, look: Callable[[Backend], None] = lambda backend: None) -> None:
        """Streams that do not fit together are preempted, and right. look: at the backend before it is closed."""
        engine, backend = self.opened(7)
        lengths = (30, 5, 45, 12, 64)
        results: dict[int, Result] = {}
        async with engine:

            async def ask(number: int) -> None:
                drawn = {"temperature": 0.8, "seed": number, "top_k": 40, "top_p": 0.95}
                wishes = {"temperature": 0.0} if number % 2 else drawn
                results[number] = await engine.generate(
                    prompt_of(number, lengths[number]), max_tokens=40, ignore_eos=True, logprobs=2, **wishes
                )

            async with anyio.create_task_group() as group:
                for number in range(len(lengths)):
                    group.start_soon(ask, number)
            assert engine.metrics.num_preemptions > 0
            assert engine.metrics.audit_failures == 0
            look(backend)
        for number, result in results.items():
            assert len(result.token_ids) == 40
            self.check(prompt_of(number, lengths[number]), result)

    async def fork(self) -> None:
        """Prefixes come from the cache, and choices fork in the middle of a page."""
        engine, _ = self.opened(20)
        prompt = prompt_of(9, 75)
        async with engine:
            first = await engine.generate(prompt, max_tokens=4, temperature=0, logprobs=1)
            forked = await engine.generate(
                prompt, max_tokens=24, n=3, temperature=1.0, seed=3, logprobs=1, repetition_penalty=1.2, ignore_eos=True
            )
            assert first.usage.cached_tokens == 0
            assert forked.usage.cached_tokens == 64
            assert len({tuple(choice.token_ids) for choice in forked.choices}) == 3
            assert engine.metrics.audit_failures == 0
        self.check(prompt, first)
        self.check(prompt, forked)

    async def look_ahead(self) -> None:
        """Lookahead draws the same tokens."""
        wishes = {"max_tokens": 20, "temperature": 0.9, "seed": 11, "frequency_penalty": 0.5, "ignore_eos": True}
        found = []
        for lookahead in (True, False):
            engine, _ = self.opened(20, lookahead=lookahead)
            async with engine:
                found.append((await engine.generate(prompt_of(4, 33), **wishes)).token_ids)
        assert found[0] == found[1]

    async def embed(self) -> None:
        """States, and logprobs of a prompt."""
        engine, _ = self.opened(20)
        prompt = prompt_of(2, 70)
        async with engine:
            whole = await engine.generate(prompt, max_tokens=0, prompt_logprobs=1)
            vector = (await engine.embed(prompt, pooling="last")).vector
        expected = self.oracle(prompt)
        assert len(whole.prompt_logprobs) == len(prompt) - 1
        for at, found in enumerate(whole.prompt_logprobs, 1):
            assert abs(found.logprob - expected[at - 1][prompt[at]]) < self.tolerance
        assert np.isfinite(vector).all()
        assert np.linalg.norm(vector) > 1
