"""StepInput's sampling fields and logits -> tokens and logprobs, all of it lazy. session.py calls `draw`.

The order is engine/step.py's: penalties, bias, grammar mask, temperature, top-k, top-p, min-p, draw. Logits are made for some
places at a time, so that a thousand places of a large vocabulary never need a thousand rows of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from backends.mlx.choosing import LeastKept, Settings, choose, largest, log_sum
from backends.mlx.philox import uniforms
from engine.step import FloatArray, IntArray, StepInput, StepOutput

__all__ = ["HEAD_ROWS", "Drawn", "Logits", "draw", "resolve"]

HEAD_ROWS = 128           # places whose logits exist at a time

Logits = Callable[[IntArray], mx.array]
"""Indices into the step's tokens, at most HEAD_ROWS -> their logits (n, V) float32."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Of the raw model: logprobs of the wanted tokens (n,); the K most probable ids, ascending, and their logprobs (n, K)."""

    logprobs: mx.array
    top_ids: mx.array
    top_logprobs: mx.array


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew, on the device. scores is None where no place wants any."""

    tokens: mx.array                  # (S,) int32
    scores: Scores | None
    top_count: IntArray

    @property
    def arrays(self) -> list[mx.array]:
        scores = self.scores
        return [self.tokens] + ([] if scores is None else [scores.logprobs, scores.top_ids, scores.top_logprobs])

    def output(self, hidden: FloatArray) -> StepOutput:
        """On the host, alternatives best first. It waits for the device."""
        tokens = np.array(self.tokens)
        if self.scores is None:
            none = np.zeros((len(tokens), 0), np.int32)
            return StepOutput(tokens, np.full(len(tokens), np.nan, np.float32), none, none.astype(np.float32), hidden)
        wanted = np.where(tokens >= 0, self.top_count, -1)
        logprobs = np.where(wanted >= 0, np.array(self.scores.logprobs), np.float32(np.nan))
        ids, values = np.array(self.scores.top_ids), np.array(self.scores.top_logprobs)
        order = np.argsort(-values, axis=1, kind="stable")                    # ties stay as they are: lowest id first
        shown = np.arange(ids.shape[1]) < wanted[:, None]
        top_ids = np.where(shown, np.take_along_axis(ids, order, axis=1), -1)
        top_logprobs = np.where(shown, np.take_along_axis(values, order, axis=1), np.float32(-np.inf))
        room = max(0, int(self.top_count.max())) - ids.shape[1]               # more are wanted than the vocabulary has
        return StepOutput(
            tokens, logprobs, np.pad(top_ids, ((0, 0), (0, room)), constant_values=-1),
            np.pad(top_logprobs, ((0, 0), (0, room)), constant_values=-np.inf), hidden,
        )  # fmt: skip


def draw(step: StepInput, newest: mx.array, logits: Logits, kernel: LeastKept | None = None) -> Drawn:
    """newest: the tokens of the ticket before, which history may refer to. kernel: where there is one for wide cuts."""
    if step.place_count == 0:
        return Drawn(mx.zeros(0, mx.int32), None, step.top_count)
    most = int(step.top_count.max())
    tokens: list[mx.array] = []
    scores: list[Scores] = []
    for first in range(0, step.place_count, HEAD_ROWS):
        places = Places(step, first, min(first + HEAD_ROWS, step.place_count), kernel)
        at = step.sample_at[first : places.stop]
        if (at[1:] > at[:-1]).all():                                          # as in every step without forks
            raw = logits(at)
        else:
            distinct, row_of = np.unique(at, return_inverse=True)
            raw = logits(distinct)[mx.array(row_of)]
        tokens.append(places.sample(raw, newest))
        if most >= 0:
            scores.append(places.score(raw, tokens[-1], min(most, raw.shape[1])))
        if places.stop < step.place_count:                                    # these logits leave before others come
            mx.eval(tokens, [[each.logprobs, each.top_ids, each.top_logprobs] for each in scores])
    return Drawn(joined(tokens), together(scores), step.top_count)


def joined(parts: Sequence[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts))


def together(scores: Sequence[Scores]) -> Scores | None:
    if not scores:
        return None
    return Scores(
        joined([each.logprobs for each in scores]),
        joined([each.top_ids for each in scores]),
        joined([each.top_logprobs for each in scores]),
    )


def resolve(tokens: IntArray, newest: mx.array) -> mx.array:
    """Tokens on the device, every reference -1 - s replaced by what was drawn at place s of the ticket before; 0 if nothing
    was."""
    literal = mx.array(np.maximum(tokens, 0))
    if not (tokens < 0).any():
        return literal
    places = mx.array(np.maximum(-1 - tokens, 0))
    return mx.where(mx.array(tokens < 0), mx.maximum(newest[places], 0), literal)


def entries_of(starts: IntArray, first: int, stop: int) -> tuple[slice, NDArray[np.int64]]:
    """Where the entries of places first : stop lie, and the place of each, counted from the first."""
    counts = np.diff(starts[first : stop + 1])
    return slice(int(starts[first]), int(starts[stop])), np.repeat(np.arange(stop - first), counts)


class Places:
    """Some neighbouring places of a step."""

    def __init__(self, step: StepInput, first: int, stop: int, kernel: LeastKept | None) -> None:
        self.step, self.first, self.stop, self.kernel = step, first, stop, kernel
        self.mine = slice(first, stop)

    def sample(self, raw: mx.array, newest: mx.array) -> mx.array:
        """The tokens that are drawn, (n,) int32; -1 where a logit is not finite or the grammar allows nothing."""
        step, x = self.step, raw
        possible = mx.isfinite(raw.sum(axis=1))                               # one pass: no sum hides an infinity or a NaN
        if step.history is not None:
            x = self.penalized(x, newest)
        if step.bias is not None:
            entries, place = entries_of(step.bias.starts, self.first, self.stop)
            if len(place):
                values = mx.array(step.bias.values[entries])
                x = x.at[mx.array(place), mx.array(step.bias.tokens[entries])].add(values)
        masked = np.flatnonzero((step.mask_at >= self.first) & (step.mask_at < self.stop))
        if len(masked):
            allowed = self.allowed(masked, x.shape[1])
            x = mx.where(allowed, x, -mx.inf)
            possible = possible & allowed.any(axis=1)
        return mx.where(possible, self.picked(x), -1)

    def picked(self, x: mx.array) -> mx.array:
        """The largest logit where the temperature is 0, ties to the lowest id; a draw elsewhere."""
        step, warm = self.step, np.flatnonzero(self.step.temperature[self.mine] > 0)
        if not len(warm):
            return mx.argmax(x, axis=1).astype(mx.int32)
        at = warm + self.first
        settings = Settings(
            step.temperature[at], step.top_k[at], step.top_p[at], step.min_p[at],
            uniforms(step.seed[at], step.draw_position[at], step.choice[at]),
        )  # fmt: skip
        if len(warm) == len(x):
            return choose(x, settings, self.kernel)
        rows = mx.array(warm)
        tokens = mx.argmax(x, axis=1).astype(mx.int32)
        tokens[rows] = choose(x[rows], settings, self.kernel)
        return tokens

    def penalized(self, x: mx.array, newest: mx.array) -> mx.array:
        """Repetition for what is in prompt or output, frequency and presence for what is in the output."""
        step, history = self.step, self.step.history
        assert history is not None
        entries, place = entries_of(history.starts, self.first, self.stop)
        if not len(place):
            return x
        # Twice the count and whether it is in the prompt, over the vocabulary: a reference that is another entry's token
        # meets it there by itself.
        codes = (2 * history.counts[entries] + history.in_prompt[entries]).astype(np.int32)
        tokens = resolve(history.tokens[entries], newest)
        code = mx.zeros(x.shape, mx.int32).at[mx.array(place), tokens].add(mx.array(codes))
        count = (code >> 1).astype(mx.float32)
        repetition, frequency, presence = (
            mx.array(values[self.mine])[:, None] for values in (step.repetition, step.frequency, step.presence)
        )
        x = mx.where(code > 0, mx.where(x > 0, x / repetition, x * repetition), x)
        return mx.where(count > 0, x - (frequency * count + presence), x)

    def allowed(self, masked: NDArray[np.int64], vocabulary: int) -> mx.array:
        """By the places' grammars; all where there is none: (n, V)."""
        words = mx.array(self.step.grammar_masks[masked])                                         # (G, V / 32)
        bits = (words[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
        bits = bits.reshape(len(masked), -1)[:, :vocabulary] != 0                                 # (G, V)
        if len(masked) == self.stop - self.first:
            rows = np.argsort(self.step.mask_at[masked])
            return bits if (rows[1:] > rows[:-1]).all() else bits[mx.array(rows)]
        row_of = np.full(self.stop - self.first, len(masked))
        row_of[self.step.mask_at[masked] - self.first] = np.arange(len(masked))
        return mx.concatenate([bits, mx.ones((1, vocabulary), mx.bool_)])[mx.array(row_of)]

    def score(self, raw: mx.array, drawn: mx.array, most: int) -> Scores:
        """Logprobs of the raw model; `most` alternatives beside them."""
        whole = log_sum(raw)
        asked = mx.array(self.step.score[self.mine])
        wanted = mx.where(asked >= 0, asked, mx.maximum(drawn, 0))[:, None]
        logprobs = (mx.take_along_axis(raw, wanted, axis=1) - whole).squeeze(1)
        if most == 0:
            none = mx.zeros((len(raw), 0))
            return Scores(logprobs, none.astype(mx.int32), none)
        least = largest(raw, most).min(axis=1, keepdims=True)
        equal = raw == least
        ties = most - (raw > least).sum(axis=1, keepdims=True)
        best = (raw > least) | (equal & (mx.cumsum(equal.astype(mx.int32), axis=1) <= ties))
        # Negative ids in float32, which has every integer up to 2^24: the largest of them are the lowest ids.
        numbers = mx.where(best, -mx.arange(raw.shape[1], dtype=mx.float32), -raw.shape[1])
        ids = mx.sort(-largest(numbers, most), axis=1).astype(mx.int32)
        ids = mx.minimum(ids, raw.shape[1] - 1)                                # logits that are no numbers have no best
        return Scores(logprobs, ids, mx.take_along_axis(raw, ids, axis=1) - whole)
