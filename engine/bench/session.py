"""SES: a conversation of ten turns. How much sooner the first token of the last turn comes than that of a cold prompt."""

import time
from collections.abc import Iterator

import anyio

from engine.api import Engine
from engine.bench.figures import Figure
from engine.config import EngineConfig
from engine.errors import StepFailed

__all__ = ["session_figures"]

TURNS, QUESTION, ANSWER = 10, 30, 100
SETTINGS = f"{TURNS} turns of {QUESTION} + {ANSWER} tokens"


def session_figures(config: EngineConfig) -> Iterator[Figure]:
    cold, cached, tokens, expected = anyio.run(_talk, config)
    yield Figure("SES cold", cold * 1e3, "ms", f"first token of a prompt as long as turn {TURNS}'s, nothing cached")
    yield Figure("SES cached", cached * 1e3, "ms", f"first token of turn {TURNS}: {SETTINGS}")
    yield Figure("SES gain", cold / cached, "x", "cold over cached", ">= 10")
    if tokens != expected:
        raise StepFailed(f"cached_tokens is {tokens}, the whole pages before the new question have {expected}")
    yield Figure("SES cached tokens", tokens, "tokens", "as reported; equal to the whole pages of the history")


async def _talk(config: EngineConfig) -> tuple[float, float, int, int]:
    async with Engine(config) as engine:
        await _ask(engine, _question(99, QUESTION), ANSWER)                        # the first request of a process is slow
        history: list[int] = []
        cached, counted = 0.0, 0
        for turn in range(TURNS):
            known = max(0, len(history) - 1)                                       # the last token drawn has no keys yet
            history += _question(turn, QUESTION)
            cached, answer, counted = await _ask(engine, history, ANSWER)
            history += answer
        page = engine.statistics().page_tokens
        expected = known // page * page
        cold = min([(await _ask(engine, _question(50 + i, len(history) - ANSWER), 1))[0] for i in range(2)])
    return cold, cached, counted, expected


def _question(number: int, length: int) -> list[int]:
    return [100 + (number * 977 + i * 31 + i * i % 97) % 19_000 for i in range(length)]


async def _ask(engine: Engine, prompt: list[int], tokens: int) -> tuple[float, list[int], int]:
    """(seconds to the first token, the answer, cached tokens)"""
    began, first, answer = time.perf_counter(), 0.0, list[int]()
    stream = await engine.stream(list(prompt), max_tokens=tokens, temperature=0, ignore_eos=True)
    async with stream:
        async for delta in stream:
            first = first or time.perf_counter()
            answer += delta.token_ids
    return first - began, answer, stream.usage.cached_tokens
