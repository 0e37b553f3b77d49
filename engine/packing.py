"""From chosen rows to the arrays of a StepInput. The scheduler decides who runs; here it is written down, fast.

What does not change from step to step rests in tables with one row per running sequence (its lane), so that packing 256
decoding sequences is a short loop and a few gathers.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.masks import Masks
from engine.sequence import Sequence
from engine.step import Bias, FloatArray, History, IntArray, StepInput, UintArray

__all__ = ["Draft", "Lanes", "Plan", "Row"]

Wishes = tuple[FloatArray, IntArray, UintArray, IntArray]  # see Lanes; the last one: the tokens to be scored
LEAST = 1e-6                                              # a colder draw is greedy: float32 could not divide by it


@dataclass(slots=True)
class Row:
    """`count` tokens of `sequence` from position `start`."""

    sequence: Sequence
    start: int
    count: int


@dataclass(slots=True)
class Plan:
    """A packed step, and who is to be told what comes out. Place i < len(draws) belongs to draws[i], then come scores."""

    number: int
    step: StepInput
    masks: Masks                                          # of the step, to be filled just before it is submitted
    draws: list[Sequence]
    prefills: list[Row]
    scores: list[tuple[Sequence, int]]                    # (sequence, position of the scored prompt token)
    states: list[tuple[Sequence, int]]                    # (sequence, how many rows of hidden)


@dataclass(slots=True)
class Draft:
    """A step in the making. references: by lane, the place of the ticket just before that holds the lane's unknown token."""

    number: int
    rows: list[Row]
    references: dict[int, int] | None
    tokens: list[int] = field(default_factory=list)
    draws: list[Sequence] = field(default_factory=list)
    draw_at: list[int] = field(default_factory=list)
    scores: list[tuple[Sequence, int]] = field(default_factory=list)
    score_at: list[int] = field(default_factory=list)
    states: list[tuple[Sequence, int]] = field(default_factory=list)
    hidden_at: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, number: int, rows: list[Row]) -> "Draft":
        if all(row.sequence.history is None for row in rows):
            return cls(number, rows, None)
        pending = (row.sequence for row in rows if row.sequence.history is not None and row.sequence.pending_in)
        return cls(number, rows, {sequence.lane: sequence.place for sequence in pending})

    def write_decoding(self, rows: list[Row]) -> None:
        """Rows of one token that draw at once; they come first, and are most of a busy engine's work."""
        number, tokens, draws = self.number, self.tokens, self.draws
        for place, row in enumerate(rows):
            sequence = row.sequence
            tokens.append(-1 - sequence.place if sequence.pending_in else sequence.tokens[-1])
            draws.append(sequence)
            sequence.place, sequence.computed = place, sequence.length
            sequence.pending_in = sequence.last_ticket = number
            sequence.length += 1
        self.draw_at += range(len(rows))

    def write(self, row: Row) -> None:
        """The row's tokens, and places for what is wanted of its prompt."""
        sequence, end = row.sequence, row.start + row.count
        first = len(self.tokens)
        self.tokens += sequence.tokens[row.start : end]
        if sequence.pending_in and end == sequence.length:
            self.tokens.append(-1 - sequence.place)
        if sequence.prompt_wanted:
            self._write_wishes(row, first)

    def draw(self, sequence: Sequence) -> None:
        """A place for `sequence` at the token that was written last."""
        sequence.place, sequence.pending_in, sequence.last_ticket = len(self.draws), self.number, self.number
        self.draws.append(sequence)
        self.draw_at.append(len(self.tokens) - 1)

    def _write_wishes(self, row: Row, first: int) -> None:
        """Prompt logprobs and states of this chunk, without those kept before a preemption."""
        sequence, request = row.sequence, row.sequence.request
        end = min(row.start + row.count, sequence.prompt_length)
        begin = max(row.start, sequence.recorded)
        if request.params.prompt_logprobs is not None:
            for position in range(begin + 1, min(end + 1, sequence.prompt_length)):
                self.scores.append((sequence, position))
                self.score_at.append(first + position - 1 - row.start)
        if request.pooling == "last":
            begin = max(begin, sequence.prompt_length - 1)
        if request.pooling is not None and begin < end:
            self.states.append((sequence, end - begin))
            self.hidden_at += range(first + begin - row.start, first + end - row.start)
        sequence.recorded = max(sequence.recorded, end)


class Lanes:
    """`count` lanes with page tables of up to `width` pages. A lane's unused table entries are 0."""

    def __init__(self, count: int, width: int, page_tokens: int) -> None:
        self.free = list(range(count - 1, -1, -1))
        self._page_tokens = page_tokens
        self._tables = np.zeros((count, width), np.int32)
        self._numbers = np.zeros((6, count), np.float32)    # temperature top_p min_p repetition frequency presence
        self._wholes = np.zeros((3, count), np.int32)       # top_k choice top_count
        self._seeds = np.zeros((count, 2), np.uint32)
        self._wished: tuple[list[int], Wishes] | None = None

    def enter(self, sequence: Sequence) -> None:
        """Give the sequence a lane and write down its pages and wishes."""
        params, seed = sequence.request.params, sequence.request.seed
        self._wished = None
        lane = sequence.lane = self.free.pop()
        temperature, top_p = params.temperature or 0.0, params.top_p or 1.0
        self._numbers[:, lane] = (
            temperature if temperature >= LEAST else 0.0, max(top_p, LEAST), params.min_p,
            params.repetition_penalty, params.frequency_penalty, params.presence_penalty,
        )  # fmt: skip
        wanted = -1 if params.logprobs is None else params.logprobs
        self._wholes[:, lane] = max(0, params.top_k or 0), sequence.choice, wanted
        self._seeds[lane] = seed & 0xFFFFFFFF, seed >> 32
        self._tables[lane, : len(sequence.pages)] = sequence.pages
        sequence.capacity = len(sequence.pages) * self._page_tokens

    def leave(self, sequence: Sequence) -> None:
        self._tables[sequence.lane] = 0
        self.free.append(sequence.lane)
        sequence.lane = -1

    def set_page(self, sequence: Sequence, index: int, page: int) -> None:
        """Page `index` of the sequence; one past the last makes it longer."""
        sequence.pages[index : index + 1] = [page]
        self._tables[sequence.lane, index] = page
        sequence.capacity = len(sequence.pages) * self._page_tokens

    def pack(self, draft: Draft, copies: Items[tuple[int, int]], masks: Masks) -> StepInput:
        """The arrays of a step; copies are (source, target)."""
        rows, draws, page_tokens = draft.rows, draft.draws, self._page_tokens
        lanes = np.fromiter((row.sequence.lane for row in rows), np.intp, len(rows))
        starts = np.fromiter((row.start for row in rows), np.int32, len(rows))
        counts = np.fromiter((row.count for row in rows), np.int32, len(rows))
        row_starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(counts, out=row_starts[1:])
        kv_lengths = starts + counts
        row_of = lanes                                        # of each token
        positions = starts
        if len(draft.tokens) > len(rows):
            row_of = np.repeat(lanes, counts)
            positions = np.arange(len(draft.tokens), dtype=np.int32)
            positions += np.repeat(starts - row_starts[:-1], counts)
        tables = self._tables[lanes, : -(-int(kv_lengths.max()) // page_tokens)]
        slots = self._tables[row_of, positions // page_tokens] * page_tokens + positions % page_tokens
        numbers, wholes, seeds, score = self._wishes(draws)
        if draft.scores:
            numbers, wholes, seeds, score = _with_scores(numbers, wholes, seeds, score, draft.scores)
        sample_at = np.array(draft.draw_at + draft.score_at, np.int32)
        return StepInput(
            copies=np.array(copies, np.int32).reshape(-1, 2),
            tokens=np.array(draft.tokens, np.int32),
            positions=positions,
            slots=slots,
            row_starts=row_starts,
            kv_lengths=kv_lengths,
            page_tables=tables,
            sample_at=sample_at,
            temperature=numbers[0],
            top_k=wholes[0],
            top_p=numbers[1],
            min_p=numbers[2],
            repetition=numbers[3],
            frequency=numbers[4],
            presence=numbers[5],
            seed=seeds,
            draw_position=positions[sample_at] + 1,
            choice=wholes[1],
            score=score,
            top_count=wholes[2],
            history=None if draft.references is None else _pack_history(draws, len(sample_at), draft.references),
            bias=_pack_bias(draws, len(sample_at)),
            mask_at=masks.at,
            grammar_masks=masks.bits,
            hidden_at=np.array(draft.hidden_at, np.int32),
        )


    def _wishes(self, draws: list[Sequence]) -> Wishes:
        """The drawing sequences' parameters: those of the step before, while the same ones draw in the same order."""
        lanes = [sequence.lane for sequence in draws]
        if self._wished is None or self._wished[0] != lanes:
            drawing = np.array(lanes, np.intp)
            numbers, wholes, seeds = self._numbers[:, drawing], self._wholes[:, drawing], self._seeds[drawing]
            self._wished = lanes, (numbers, wholes, seeds, np.full(len(draws), -1, np.int32))
        return self._wished[1]


def _with_scores(
    numbers: FloatArray, wholes: IntArray, seeds: UintArray, score: IntArray, scores: list[tuple[Sequence, int]]
) -> Wishes:
    """The drawing places' parameters followed by those of scoring places, where what is drawn does not matter: greedy."""
    n = len(scores)
    off = np.repeat(np.array([[0], [1], [0], [1], [0], [0]], np.float32), n, axis=1)
    whole = np.zeros((3, n), np.int32)
    whole[2] = [sequence.request.params.prompt_logprobs or 0 for sequence, _ in scores]
    targets = np.array([sequence.tokens[position] for sequence, position in scores], np.int32)
    return (
        np.concatenate([numbers, off], axis=1),
        np.concatenate([wholes, whole], axis=1),
        np.concatenate([seeds, np.zeros((n, 2), np.uint32)]),
        np.concatenate([score, targets]),
    )


def _pack_history(draws: list[Sequence], places: int, references: dict[int, int]) -> History:
    sizes = np.zeros(places + 1, np.int32)
    tokens: list[NDArray[np.int32]] = []
    counts: list[NDArray[np.int32]] = []
    in_prompt: list[NDArray[np.bool_]] = []

    def append(place: int, some: IntArray, their_counts: IntArray, prompt: NDArray[np.bool_]) -> None:
        tokens.append(some)
        counts.append(their_counts)
        in_prompt.append(prompt)
        sizes[place + 1] += len(some)

    for place, sequence in enumerate(draws):
        if sequence.history is not None:
            append(place, *sequence.history.entries())
            unknown = references.get(sequence.lane)
            if unknown is not None:
                append(place, np.array([-1 - unknown], np.int32), np.ones(1, np.int32), np.zeros(1, np.bool_))
    starts = np.cumsum(sizes, dtype=np.int32)
    if not tokens:
        return History(starts, np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.bool_))
    return History(starts, np.concatenate(tokens), np.concatenate(counts), np.concatenate(in_prompt))


def _pack_bias(draws: list[Sequence], places: int) -> Bias | None:
    if not any(sequence.request.params.logit_bias for sequence in draws):
        return None
    starts = np.zeros(places + 1, np.int32)
    tokens: list[int] = []
    values: list[float] = []
    for place, sequence in enumerate(draws):
        biases = sequence.request.params.logit_bias or {}
        tokens += biases.keys()
        values += biases.values()
        starts[place + 1] = len(tokens)
    starts[len(draws) + 1 :] = len(tokens)
    return Bias(starts, np.array(tokens, np.int32), np.array(values, np.float32))
