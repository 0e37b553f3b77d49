"""StepInput's sampling fields and logits -> tokens and logprobs. session.py calls it, kernels/sampling.py does the sums.

Logits are made for a few distinct tokens at a time, so that 512 places of a large vocabulary never need 512 rows of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from backends.cpu.kernels import sampling, scoring
from engine.errors import StepFailed
from engine.step import FloatArray, History, IntArray, StepInput, UintArray

__all__ = ["HEAD_ROWS", "Drawn", "Sampler", "is_plain", "resolve"]

HEAD_ROWS = 64    # rows of logits that exist at a time

Logits = Callable[[NDArray[np.intp]], FloatArray]
"""Indices into the step's tokens, at most HEAD_ROWS -> their logits."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What StepOutput holds of the places."""

    tokens: IntArray
    logprobs: FloatArray
    top_ids: IntArray
    top_logprobs: FloatArray


class Sampler:
    """Draws for all places of a step."""

    def __init__(self, vocabulary: int, workers: int) -> None:
        self.scratch = np.zeros((2 * workers, vocabulary), np.float32)

    @property
    def nbytes(self) -> int:
        return self.scratch.nbytes

    def draw(self, step: StepInput, previous: IntArray, logits: Logits, *, plain: bool | None = None) -> Drawn:
        """previous: the tokens of the ticket before, which history may refer to. plain: is_plain(step), if it is known."""
        if is_plain(step) if plain is None else plain:
            return largest(step, logits)
        count, most = step.place_count, int(step.top_count.max(initial=-1))
        scored, width = most >= 0, max(0, most)
        drawn = Drawn(
            tokens=np.zeros(count, np.int32),
            logprobs=np.full(count, np.nan, np.float32),
            top_ids=np.full((count, width), -1, np.int32),
            top_logprobs=np.full((count, width), -np.inf, np.float32),
        )
        distinct, row_of = distinct_of(step.sample_at)
        fields = None if is_greedy(step) else self.fields(step, previous)
        for first in range(0, len(distinct), HEAD_ROWS):
            mine = np.flatnonzero((row_of >= first) & (row_of < first + HEAD_ROWS))
            values = logits(distinct[first : first + HEAD_ROWS].astype(np.intp))
            rows = (row_of[mine] - first).astype(np.int32)
            places = mine.astype(np.int32)
            if fields is None:
                drawn.tokens[places] = greedy(values)[rows]
            else:
                sampling.sample(values, rows, places, *fields, self.scratch, drawn.tokens)
            if scored:
                wanted = np.where(step.score >= 0, step.score, drawn.tokens)
                counts = np.where(drawn.tokens >= 0, step.top_count, -1).astype(np.int32)
                scoring.score(
                    values, rows, places, wanted, counts, self.scratch, drawn.logprobs, drawn.top_ids, drawn.top_logprobs
                )
        return drawn

    def fields(self, step: StepInput, previous: IntArray) -> "Fields":
        nothing = np.zeros(step.place_count + 1, np.int32)
        mask_of = np.full(step.place_count, -1, np.int32)
        mask_of[step.mask_at] = np.arange(len(step.mask_at), dtype=np.int32)
        history, bias = step.history, step.bias
        return Fields(
            columns(np.float32, step.temperature, step.top_p, step.min_p, step.repetition, step.frequency, step.presence),
            columns(np.int32, step.top_k, step.draw_position, step.choice, mask_of),
            step.seed,
            NO_HISTORY if history is None else merged(history, previous),
            nothing if history is None else history.starts,
            nothing if bias is None else bias.starts,
            NO_INTS if bias is None else bias.tokens,
            NO_FLOATS if bias is None else bias.values,
            step.grammar_masks,
        )


class Fields(NamedTuple):
    """The step's sampling fields as the kernel takes them, in its order; what no place has is empty."""

    settings: FloatArray
    integers: IntArray
    seed: UintArray
    history: IntArray
    history_starts: IntArray
    bias_starts: IntArray
    bias_tokens: IntArray
    bias_values: FloatArray
    masks: UintArray


NO_TOKENS: IntArray = np.zeros(0, np.int32)
NO_INTS: IntArray = np.zeros(0, np.int32)
NO_FLOATS: FloatArray = np.zeros(0, np.float32)
NO_HISTORY: IntArray = np.zeros((0, 3), np.int32)


def is_greedy(step: StepInput) -> bool:
    """Whether every place takes the largest of the model's own logits."""
    return step.history is None and step.bias is None and not len(step.mask_at) and not (step.temperature > 0).any()


def is_plain(step: StepInput) -> bool:
    """Whether every place takes the largest logit, each of another token, and none wants a logprob."""
    at = step.sample_at
    return len(at) <= HEAD_ROWS and is_greedy(step) and not (step.top_count >= 0).any() and bool((at[1:] > at[:-1]).all())


def largest(step: StepInput, logits: Logits) -> Drawn:
    """Of a plain step."""
    count = step.place_count
    tokens = greedy(logits(step.sample_at.astype(np.intp))) if count else NO_TOKENS
    none = np.zeros((count, 0), np.int32)
    return Drawn(tokens, np.full(count, np.nan, np.float32), none, none.view(np.float32))


def greedy(logits: FloatArray) -> IntArray:
    """The lowest id of each row's largest logit, NOTHING where one is not finite; faster than the kernel is."""
    tokens: IntArray = logits.argmax(axis=1).astype(np.int32)
    tokens[~np.isfinite(logits).all(axis=1)] = sampling.NOTHING
    return tokens


def distinct_of(sample_at: IntArray) -> tuple[IntArray, NDArray[np.intp]]:
    """The tokens that are drawn from, ascending, and which of them each place has."""
    if (sample_at[1:] > sample_at[:-1]).all():            # as in every step without forks
        return sample_at, np.arange(len(sample_at))
    distinct, row_of = np.unique(sample_at, return_inverse=True)
    return distinct, row_of


def columns(dtype: DTypeLike, *values: NDArray[Any]) -> NDArray[Any]:
    """The values as columns: np.column_stack takes five times as long."""
    table = np.empty((len(values[0]), len(values)), dtype)
    for number, column in enumerate(values):
        table[:, number] = column
    return table


def resolve(tokens: IntArray, previous: IntArray) -> IntArray:
    """Tokens with every reference -1 - s replaced by what was drawn at place s of the ticket before; 0 if nothing was."""
    unknown = tokens < 0
    if not unknown.any():
        return tokens
    places = -1 - tokens[unknown]
    if places.max() >= len(previous):
        raise StepFailed(f"a token refers to place {places.max()} of a step that drew {len(previous)} tokens")
    resolved = tokens.copy()
    resolved[unknown] = np.maximum(previous[places], 0)
    return resolved


def merged(history: History, previous: IntArray) -> IntArray:
    """(token, count, in prompt) of every entry; a reference that is another entry's token is added to that one."""
    rows = np.column_stack((resolve(history.tokens, previous), history.counts, history.in_prompt)).astype(np.int32)
    for reference in np.flatnonzero(history.tokens < 0):
        place = np.searchsorted(history.starts, reference, side="right") - 1
        mine = rows[history.starts[place] : history.starts[place + 1]]
        first, *others = np.flatnonzero(mine[:, 0] == rows[reference, 0])
        mine[first, 1] = mine[[first, *others], 1].sum()
        mine[first, 2] = mine[[first, *others], 2].max()
        mine[others, 1:] = 0      # neither in the prompt nor in the output: nothing is done for it
    return rows
