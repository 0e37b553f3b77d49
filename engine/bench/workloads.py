"""Workloads: prompts and answer lengths by name, the same for every engine that runs them. Token ids, no text.

A run of one is measured as three rates, see Rates; which of them a workload is about stands in its `about`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

__all__ = ["WORKLOADS", "Rates", "Workload", "workload"]

FIRST_ID, LAST_ID = 100, 20_000          # ordinary tokens in every vocabulary


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second of one run.

    prompt: all prompt tokens over the time to the last first token. decode: answer tokens after the last first token over
    the time from there to the end. output: all answer tokens over the whole time.
    """

    prompt: float
    decode: float
    output: float


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompt i is answered with exactly answers[i] tokens, greedily, end tokens ignored; all are there at the start."""

    name: str
    about: Literal["prompt", "decode", "output"]
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...]
    settings: str

    def with_seed(self, seed: int) -> "Workload":
        """The same shape with other tokens, so that no prefix cache helps a second run, or another workload's."""
        draw = Random(f"{self.name} {seed}")  # noqa: S311 (no secret)
        return Workload(
            self.name, self.about, tuple(_ids(draw, len(prompt)) for prompt in self.prompts), self.answers, self.settings
        )


def _ids(draw: Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randint(FIRST_ID, LAST_ID) for _ in range(count))


def _equal(name: str, about: Literal["prompt", "decode", "output"], streams: int, prompt: int, answer: int) -> Workload:
    draw = Random(0)  # noqa: S311
    prompts = tuple(_ids(draw, prompt) for _ in range(streams))
    many = f"{streams} streams x " if streams > 1 else ""
    return Workload(name, about, prompts, (answer,) * streams, f"{many}prompt {prompt:,}, {answer:,} tokens")


def _nano(sequences: int, scale: float) -> Workload:
    """nano-vllm's: random prompts of 100 to 1,024 ids, answers of 100 to 1,024 tokens, seed 0."""
    draw = Random(0)  # noqa: S311
    low, high = max(1, round(100 * scale)), max(2, round(1024 * scale))
    prompts = tuple(_ids(draw, draw.randint(low, high)) for _ in range(sequences))
    answers = tuple(draw.randint(low, high) for _ in range(sequences))
    settings = f"{sequences} prompts of {low:,}-{high:,}, answers of {low:,}-{high:,}"
    return Workload("NV256", "output", prompts, answers, settings)


def _seed(sequences: int, scale: float) -> Workload:
    """vllm.rs's: so many times the same prompt of 16 tokens, 1,024 tokens each."""
    prompt, answer = _ids(Random(0), 16), max(1, round(1024 * scale))  # noqa: S311
    settings = f"{sequences} x the same prompt of 16, {answer:,} tokens"
    return Workload("VR256", "output", (prompt,) * sequences, (answer,) * sequences, settings)


WORKLOADS: dict[str, Callable[[int, float], Workload]] = {
    "B1": lambda sequences, scale: _equal("B1", "decode", 1, 50, 128),
    "B16": lambda sequences, scale: _equal("B16", "decode", 16, 50, 64),
    "PRE": lambda sequences, scale: _equal("PRE", "prompt", 1, 512, 1),
    "NV256": _nano,
    "VR256": _seed,
}
"""Name -> the workload for so many sequences and a factor on their lengths; B1, B16 and PRE are the same at any scale."""


def workload(name: str, sequences: int, scale: float) -> Workload:
    return WORKLOADS[name](sequences, scale)
