"""Which sequences run in the next step: the policy, and the packing of its arrays. Pure: no clock, no device, no awaits.

Decoding sequences come first, one token each; prompts fill what is left, first come first served. When no page is left the
newest sequence gives its pages up and is computed again later, so the oldest always goes on and nothing starves. The core
calls plan() and deliver() in turn; at most one ticket is open when plan() is called.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.pages import PagePool, page_keys
from engine.sequence import FinishReason, Logprob, Request, Sequence, State, TokenLogprobs
from engine.step import Bias, History, StepInput, StepOutput

__all__ = ["Limits", "Plan", "Scheduler"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one step and of the company in it. beside_decoding: tokens of prompts in a step that also decodes."""

    max_num_seqs: int
    max_batch_tokens: int
    max_places: int
    context_length: int
    beside_decoding: int


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
    draws: list[Sequence]
    prefills: list[Row]
    scores: list[tuple[Sequence, int]] = field(default_factory=list)      # (sequence, position of the scored prompt token)
    states: list[tuple[Sequence, int]] = field(default_factory=list)      # (sequence, how many rows of hidden)


def _age(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.number, sequence.choice


class Scheduler:
    """`waiting` and `running` are in order of age. A running sequence has a lane: its row in the tables below, which hold
    everything that does not change from step to step, so that packing is a few gathers."""

    def __init__(self, pool: PagePool, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.submitted = 0                                  # number of the last ticket planned ...
        self.completed = 0                                  # ... and of the last one delivered
        self._copies: dict[int, int] = {}                   # target page -> source page, for the next step
        self._forks: list[Sequence] = []                    # may share the page that they write to
        lanes = limits.max_num_seqs
        self._free_lanes = list(range(lanes - 1, -1, -1))
        width = -(-limits.context_length // pool.page_tokens) + 1
        self._tables = np.zeros((lanes, width), np.int32)
        self._numbers = np.zeros((6, lanes), np.float32)    # temperature top_p min_p repetition frequency presence
        self._counts = np.zeros((3, lanes), np.int32)       # top_k choice top_count
        self._seeds = np.zeros((lanes, 2), np.uint32)

    # ---- coming and going -----------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request; its other choices begin when its prompt is done."""
        self.waiting.append(request.sequences[0])

    def abort(self, request: Request, reason: FinishReason = "abort") -> None:
        """End every sequence of the request that has not ended; harmless if all have."""
        for sequence in request.sequences:
            if sequence.state is not State.FINISHED:
                sequence.finish_reason = reason
                self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        if sequence.state is State.RUNNING:
            session = sequence.request.params.session_id
            if session is not None and sequence.finish_reason != "abort":
                self.pool.pin(_pin_name(sequence.request, session), sequence.pages)
            self._give_back(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED
        sequence.request.mailbox.finished(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Leave the lane and return the pages, the last ones first, so that a prefix outlives its continuation."""
        self.running.remove(sequence)
        if sequence in self._forks:
            self._forks.remove(sequence)
        if self._copies:
            dropped = [self._copies.pop(page) for page in sequence.pages if page in self._copies]
            self.pool.release(dropped, sequence.last_ticket)
        self.pool.release(reversed(sequence.pages), sequence.last_ticket)
        self._tables[sequence.lane] = 0
        self._free_lanes.append(sequence.lane)
        sequence.pages, sequence.capacity, sequence.lane, sequence.registered = [], 0, -1, 0

    def _preempt(self) -> Sequence:
        """The newest sequence waits again; what it drew is kept, its pages stay findable until they are needed."""
        victim = self.running[-1]
        self._give_back(victim)
        victim.state, victim.computed, victim.settled = State.WAITING, 0, 0
        self.waiting.appendleft(victim)
        self.preemptions += 1
        return victim

    def _enter(self, sequence: Sequence) -> None:
        """Take a lane and join the running ones."""
        params = sequence.request.params
        lane = sequence.lane = self._free_lanes.pop()
        self._numbers[:, lane] = (
            params.temperature, params.top_p, params.min_p,
            params.repetition_penalty, params.frequency_penalty, params.presence_penalty,
        )  # fmt: skip
        self._counts[:, lane] = (
            max(0, params.top_k or 0), sequence.choice, -1 if params.logprobs is None else params.logprobs
        )  # fmt: skip
        seed = sequence.request.seed
        self._seeds[lane] = seed & 0xFFFFFFFF, seed >> 32
        self._tables[lane, : len(sequence.pages)] = sequence.pages
        sequence.capacity = len(sequence.pages) * self.pool.page_tokens
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_age)

    def _start(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run if its pages are there: those that the prefix cache knows, and new ones."""
        pool, request = self.pool, sequence.request
        if sequence.last_ticket > self.completed:
            return False                                    # preempted, and a step in flight still names it
        pages = -(-sequence.length // pool.page_tokens)
        known: list[int] = []
        if request.cached and not sequence.prompt_wanted:
            most = (sequence.length - 1) // pool.page_tokens    # the last token always runs
            known = pool.match(page_keys(sequence.tokens, pool.page_tokens, sequence.keys, most, request.salt)[:most])
        cost = pages - len(known) + sum(map(pool.idle, known))
        if cost + len(self.running) > pool.available and (self.running or cost > pool.available):
            return False                                    # each of the running may want a page soon
        for page in known:
            pool.share(page)
        new = [pool.take() for _ in range(pages - len(known))]
        sequence.pages = known + [page for page in new if page is not None]
        sequence.computed = sequence.settled = sequence.registered = len(known) * pool.page_tokens
        if not request.started:
            request.started, request.cached_tokens = True, sequence.computed
        self._enter(sequence)
        return True

    # ---- planning -------------------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """The next step, or None: nothing to do, or the pages that it needs return with the ticket in flight."""
        decoding = [
            s for s in self.running
            if s.computed == s.length - 1 and s.computed >= s.prompt_length and s.length < s.request.limit
        ]  # fmt: skip
        if not self._make_room(decoding):
            return None
        rows = [Row(s, s.computed, 1) for s in decoding if s.state is State.RUNNING]
        budget = self.limits.max_batch_tokens - len(rows)
        if rows:
            budget = min(budget, self.limits.beside_decoding)
        places = self.limits.max_places - len(rows)
        decodes = len(rows)
        for sequence in [*self.running]:
            if sequence.computed < max(sequence.prompt_length, sequence.length - 1):
                budget, places = self._chunk(sequence, rows, budget, places)
        while self.waiting and budget > 0 and places > 0 and self._free_lanes:
            if not self._start(self.waiting[0]):
                break
            budget, places = self._chunk(self.waiting.popleft(), rows, budget, places)
        return self._pack(rows, decodes, places) if rows else None

    def _make_room(self, decoding: list[Sequence]) -> bool:
        """A writable page for the next token of each; False if the planner has to wait for pages in limbo."""
        for sequence in self._forks[:]:
            if sequence.state is State.RUNNING and not self._own_page(sequence):
                return False
        for sequence in decoding:
            while sequence.state is State.RUNNING and sequence.computed >= sequence.capacity:
                page = self._take()
                if page is None:
                    return False
                if page >= 0:
                    self._tables[sequence.lane, len(sequence.pages)] = page
                    sequence.pages.append(page)
                    sequence.capacity += self.pool.page_tokens
        return True

    def _take(self) -> int | None:
        """A page; None: wait for limbo; -1: the newest sequence was preempted, look again."""
        page = self.pool.take()
        if page is not None or self.pool.returning:
            return page
        self._preempt()
        return -1

    def _own_page(self, sequence: Sequence) -> bool:
        """Copy on write: give a fork its own copy of the page that it shares and is about to write to. False: wait."""
        index = sequence.computed // self.pool.page_tokens
        if sequence.length < sequence.request.limit and index < len(sequence.pages):
            source = sequence.pages[index]
            holders = self.pool.references(source) - sum(copied == source for copied in self._copies.values())
            if holders > 1:
                while (page := self._take()) == -1:
                    if sequence.state is not State.RUNNING:
                        return True
                if page is None:
                    return False
                self._copies[page] = source                 # the copy now holds what the sequence held of the source
                sequence.pages[index] = self._tables[sequence.lane, index] = page
        self._forks.remove(sequence)
        return True

    def _chunk(self, sequence: Sequence, rows: list[Row], budget: int, places: int) -> tuple[int, int]:
        """Append as much of the sequence's uncomputed tokens as tokens and places allow; what is left of both."""
        count = min(budget, sequence.length - sequence.computed)
        scored = sequence.prompt_wanted and sequence.request.params.prompt_logprobs is not None
        if scored:
            count = min(count, places)                      # every position may be a place
        if count <= 0 or places <= 0:
            return budget, places
        rows.append(Row(sequence, sequence.computed, count))
        return budget - count, places - (count if scored else 1)

    # ---- packing --------------------------------------------------------------------------------------------------

    def _pack(self, rows: list[Row], decodes: int, spare: int) -> Plan:
        """The arrays of a step; `spare` places are left for choices that fork."""
        number = self.submitted = self.submitted + 1
        draws: list[Sequence] = []
        tokens: list[int] = []
        sample_at: list[int] = []
        scores: list[tuple[Sequence, int]] = []
        states: list[tuple[Sequence, int]] = []
        score_at: list[int] = []
        hidden_at: list[int] = []
        references = self._history(rows) if any(row.sequence.history is not None for row in rows) else None
        for row in rows:
            sequence, end = row.sequence, row.start + row.count
            sequence.last_ticket = number
            first = len(tokens)
            if sequence.pending_in and end == sequence.length:
                tokens += sequence.tokens[row.start :]
                tokens.append(-1 - sequence.place)
            else:
                tokens += sequence.tokens[row.start : end]
            if sequence.prompt_wanted:
                self._prompt_wishes(row, first, scores, score_at, states, hidden_at)
            sequence.computed = end
            if end == sequence.length and end < sequence.request.limit:
                choices = self._choices(sequence, end, spare)
                spare -= len(choices) - 1
                for drawing in choices:
                    drawing.place, drawing.pending_in = len(draws), number
                    drawing.length = end + 1
                    drawing.last_ticket = number
                    draws.append(drawing)
                    sample_at.append(len(tokens) - 1)
        lanes = np.fromiter((row.sequence.lane for row in rows), np.intp, len(rows))
        starts = np.fromiter((row.start for row in rows), np.int32, len(rows))
        counts = np.fromiter((row.count for row in rows), np.int32, len(rows))
        step = self._arrays(lanes, starts, counts, tokens, draws, sample_at, scores, score_at, hidden_at, references)
        return Plan(number, step, draws, rows[decodes:], scores, states)

    def _choices(self, sequence: Sequence, end: int, spare: int) -> list[Sequence]:
        """Who draws at the end of this row: the sequence, and when a prompt is done its other choices, which fork from it.

        Choices for which there is no lane or place wait in the queue; the prefix cache makes their prompt cheap.
        """
        request = sequence.request
        if request.forked or len(request.sequences) == 1:
            return [sequence]
        request.forked = True
        drawing, late = [sequence], []
        for fork in request.sequences[1:]:
            if self._free_lanes and len(drawing) <= spare:
                for page in sequence.pages:
                    self.pool.share(page)
                fork.pages, fork.keys, fork.registered = [*sequence.pages], [*sequence.keys], sequence.registered
                fork.computed = fork.settled = end
                self._enter(fork)
                drawing.append(fork)
            else:
                fork.recorded = fork.prompt_length
                late.append(fork)
        self.waiting.extendleft(reversed(late))
        if end % self.pool.page_tokens and len(drawing) > 1:
            self._forks += drawing
        return drawing

    def _prompt_wishes(
        self, row: Row, first: int, scores: list[tuple[Sequence, int]], score_at: list[int],
        states: list[tuple[Sequence, int]], hidden_at: list[int],
    ) -> None:  # fmt: skip
        """Places for prompt logprobs and rows of states in this chunk, without those kept before a preemption."""
        sequence, request = row.sequence, row.sequence.request
        end = min(row.start + row.count, sequence.prompt_length)
        begin = max(row.start, sequence.recorded)
        if request.params.prompt_logprobs is not None:
            for position in range(begin + 1, min(end + 1, sequence.prompt_length)):
                scores.append((sequence, position))
                score_at.append(first + position - 1 - row.start)
        if request.pooling == "last":
            begin = max(begin, sequence.prompt_length - 1)
        if request.pooling is not None and begin < end:
            states.append((sequence, end - begin))
            hidden_at += range(first + begin - row.start, first + end - row.start)
        sequence.recorded = max(sequence.recorded, end)

    def _history(self, rows: list[Row]) -> dict[int, int]:
        """Place of the ticket just before that holds each penalized sequence's unknown token, by lane."""
        return {row.sequence.lane: row.sequence.place for row in rows if row.sequence.history and row.sequence.pending_in}

    def _arrays(
        self, lanes: NDArray[np.intp], starts: NDArray[np.int32], counts: NDArray[np.int32], tokens: list[int],
        draws: list[Sequence], sample_at: list[int], scores: list[tuple[Sequence, int]], score_at: list[int],
        hidden_at: list[int], references: dict[int, int] | None,
    ) -> StepInput:  # fmt: skip
        page_tokens = self.pool.page_tokens
        row_starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=row_starts[1:])
        kv_lengths = starts + counts
        positions = np.arange(len(tokens), dtype=np.int32)
        positions += np.repeat(starts - row_starts[:-1], counts)
        width = -(-int(kv_lengths.max()) // page_tokens)
        tables = self._tables[lanes, :width]
        slots = self._tables[np.repeat(lanes, counts), positions // page_tokens] * page_tokens + positions % page_tokens
        drawing = np.fromiter((s.lane for s in draws), np.intp, len(draws))
        numbers, wholes, seeds = self._numbers[:, drawing], self._counts[:, drawing], self._seeds[drawing]
        score = np.full(len(draws), -1, np.int32)
        if scores:
            numbers, wholes, seeds, score = _with_scores(numbers, wholes, seeds, score, scores)
        at = np.array(sample_at + score_at, np.int32)
        copies = np.array([(source, target) for target, source in self._copies.items()], np.int32).reshape(-1, 2)
        self.pool.release(self._copies.values(), self.submitted)
        self._copies.clear()
        return StepInput(
            copies=copies,
            tokens=np.array(tokens, np.int32),
            positions=positions,
            slots=slots,
            row_starts=row_starts,
            kv_lengths=kv_lengths,
            page_tables=tables,
            sample_at=at,
            temperature=numbers[0],
            top_k=wholes[0],
            top_p=numbers[1],
            min_p=numbers[2],
            repetition=numbers[3],
            frequency=numbers[4],
            presence=numbers[5],
            seed=seeds,
            draw_position=positions[at] + 1,
            choice=wholes[1],
            score=score,
            top_count=wholes[2],
            history=None if references is None else _pack_history(draws, len(at), references),
            bias=_pack_bias(draws, len(at)),
            hidden_at=np.array(hidden_at, np.int32),
        )

    # ---- delivering -----------------------------------------------------------------------------------------------

    def deliver(self, plan: Plan, output: StepOutput) -> None:
        """Hand out what a step drew, apply the stop rules, make full pages findable, take pages back from finished ones."""
        self.completed = plan.number
        self.pool.complete(plan.number)
        self._record(plan, output)
        for row in plan.prefills:
            sequence = row.sequence
            if sequence.state is State.RUNNING:
                sequence.settled = row.start + row.count
                self._register(sequence)
                if sequence.settled >= sequence.request.limit:          # only the prompt was wanted
                    for each in sequence.request.sequences:
                        each.finish_reason = "length"
                        self._finish(each)
        page_tokens = self.pool.page_tokens
        tops = output.top_ids.shape[1] > 0 or bool(np.any(plan.step.top_count >= 0))
        for place, (sequence, token) in enumerate(zip(plan.draws, output.tokens.tolist(), strict=False)):
            if sequence.pending_in == plan.number:
                sequence.pending_in = 0
            if sequence.state is State.FINISHED:
                continue
            logprobs = _logprobs(output, place, token, sequence.request.params.logprobs) if tops else None
            ended = sequence.accept(token, logprobs)
            if sequence.state is State.RUNNING:
                sequence.settled = len(sequence.tokens) - 1
                if sequence.settled >= sequence.registered + page_tokens:
                    self._register(sequence)
            if ended:
                self._finish(sequence)

    def _record(self, plan: Plan, output: StepOutput) -> None:
        """Keep prompt logprobs and pool states."""
        for place, (sequence, position) in enumerate(plan.scores, start=len(plan.draws)):
            params = sequence.request.params
            found = _logprobs(output, place, sequence.tokens[position], params.prompt_logprobs)
            if found is not None:
                sequence.request.prompt_logprobs.append(found)
        at = 0
        for sequence, count in plan.states:
            total = output.hidden[at : at + count].sum(axis=0, dtype=np.float32)
            at += count
            pooled = sequence.request.pooled
            sequence.request.pooled = total if pooled is None else pooled + total

    def _register(self, sequence: Sequence) -> None:
        page_tokens = self.pool.page_tokens
        first, count = sequence.registered // page_tokens, sequence.settled // page_tokens
        keys = page_keys(sequence.tokens, page_tokens, sequence.keys, count, sequence.request.salt)
        for index in range(first, count):
            self.pool.register(sequence.pages[index], keys[index])
        sequence.registered = count * page_tokens

    def audit(self) -> str | None:
        """What does not add up when nothing runs, or None."""
        if self.has_work:
            return None
        counts = self.pool.counts()
        if counts.free + counts.cached + counts.pinned != self.pool.pages:
            return f"nothing runs, but {counts} do not add up to {self.pool.pages} free and cached pages"
        return self.pool.audit()


def _pin_name(request: Request, session: str) -> str:
    """Sessions of different salts are different sessions."""
    return f"{request.salt.hex()}:{session}"


def _logprobs(output: StepOutput, place: int, token: int, wanted: int | None) -> TokenLogprobs | None:
    if wanted is None:
        return None
    ids, values = output.top_ids[place, :wanted].tolist(), output.top_logprobs[place, :wanted].tolist()
    return TokenLogprobs(token, float(output.logprobs[place]), tuple(map(Logprob, ids, values)))


def _with_scores(
    numbers: NDArray[np.float32], wholes: NDArray[np.int32], seeds: NDArray[np.uint32], score: NDArray[np.int32],
    scores: list[tuple[Sequence, int]],
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.uint32], NDArray[np.int32]]:  # fmt: skip
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
    starts = np.zeros(places + 1, np.int32)
    tokens, counts, in_prompt = [], [], []
    for place, sequence in enumerate(draws):
        size = 0
        if sequence.history is not None:
            known, known_counts, known_prompt = sequence.history.entries()
            tokens.append(known)
            counts.append(known_counts)
            in_prompt.append(known_prompt)
            size = len(known)
            unknown = references.get(sequence.lane)
            if unknown is not None:
                tokens.append(np.array([-1 - unknown], np.int32))
                counts.append(np.ones(1, np.int32))
                in_prompt.append(np.zeros(1, np.bool_))
                size += 1
        starts[place + 1] = starts[place] + size
    starts[len(draws) + 1 :] = starts[len(draws)]
    none = np.zeros(0, np.int32)
    return History(
        starts, np.concatenate([none, *tokens]), np.concatenate([none, *counts]),
        np.concatenate([np.zeros(0, np.bool_), *in_prompt]),
    )  # fmt: skip


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
