"""Run a workload on an open Engine. llama_cpp_side.py does the same work for llama.cpp."""

import time

import anyio

from engine.api import Engine
from engine.bench.workloads import Rates, Workload

__all__ = ["run_here"]


async def run_here(engine: Engine, work: Workload) -> Rates:
    """One run, from the first request to the last token."""
    first: list[float] = []
    late: list[int] = [0] * len(work.prompts)         # tokens of a stream at the moment of the last first token
    counts: list[int] = [0] * len(work.prompts)

    async def one(number: int) -> None:
        stream = await engine.stream(
            list(work.prompts[number]), max_tokens=work.answers[number], temperature=0, ignore_eos=True
        )
        async with stream:
            async for delta in stream:
                if not counts[number]:
                    first.append(time.perf_counter())
                counts[number] += len(delta.token_ids)
                if len(first) == len(counts) and not any(late):
                    late[:] = counts

    began = time.perf_counter()
    async with anyio.create_task_group() as group:
        for number in range(len(work.prompts)):
            group.start_soon(one, number)
    ended = time.perf_counter()
    last_first = max(first)
    return Rates(
        prompt=sum(map(len, work.prompts)) / (last_first - began),
        decode=(sum(counts) - sum(late)) / max(ended - last_first, 1e-9),
        output=sum(counts) / (ended - began),
    )
