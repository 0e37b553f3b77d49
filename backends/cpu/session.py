"""A loaded model with its cache and sampler: what the compute thread works on. runner.py queues its methods there.

A session runs one step at a time, start to end; the tokens that a step drew stay for the references of the next one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backends.cpu.compile import ATTENTION, aside_of, compiling_aside, is_compiled
from backends.cpu.model import PAGE_TOKENS, Model, Shapes, make_cache, page_bytes, refuse_unsupported
from backends.cpu.sampler import Sampler, is_plain, resolve
from backends.cpu.warm_up import warm_up_step
from backends.cpu.weights import load_weights
from engine.backend import LoadOptions, MemoryStatistics, Progress
from engine.errors import OutOfDeviceMemory, StepFailed
from engine.model.spec import ModelSpec
from engine.step import FloatArray, IntArray, StepInput, StepOutput
from engine.weights.tensors import TensorSource

__all__ = ["Prepared", "Session"]

NO_TOKENS: IntArray = np.zeros(0, np.int32)
NO_STATES: FloatArray = np.zeros((0, 0), np.float32)
COMPILING, READING = "compiling kernels (first start only)", "reading compiled kernels"


class Session:
    """Weights, pages and the newest tokens."""

    def __init__(self, spec: ModelSpec, model: Model, workers: int) -> None:
        self.spec, self.model = spec, model
        self.sampler = Sampler(spec.vocabulary_size, workers)
        self.cache = make_cache(spec, 1)
        self.newest = NO_TOKENS      # drawn by the step before

    @classmethod
    def load(
        cls, spec: ModelSpec, tensors: TensorSource, options: LoadOptions, workers: int, progress: Progress
    ) -> "Session":
        refuse_unsupported(spec)
        part = aside_of(spec, tensors)
        stage = READING if is_compiled(part) else COMPILING
        with compiling_aside(part):
            try:
                weights = load_weights(spec, tensors, options.dtype, progress)
            except MemoryError as error:
                message = "the weights do not fit into memory: choose a smaller or a quantized model"
                raise OutOfDeviceMemory(message) from error
            session = cls(spec, Model(spec, weights, workers), workers)
            progress(stage, 0, 2)
            session.model.warm_up(warm_up_step(1), session.cache)
            if part == ATTENTION:
                nothing = np.zeros((2, spec.vocabulary_size), np.float32)
                session.sampler.draw(warm_up_step(1), NO_TOKENS, lambda at: nothing[: len(at)])
        progress(stage, 1, 2)
        session.warm_up()
        progress(stage, 2, 2)
        return session

    def warm_up(self) -> None:
        """Run steps of one and of two tokens, so that every kernel is compiled, or read from Numba's cache."""
        for tokens in (1, 2):
            self.run(self.prepare(warm_up_step(tokens)))
        self.newest = NO_TOKENS

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.spec)

    def useful_pages(self, sequences: int, context_length: int) -> int:
        """Pages that so many sequences of the longest context can fill."""
        return sequences * -(-(context_length or self.spec.context_length) // PAGE_TOKENS)

    def allocate(self, pages: int) -> None:
        try:
            self.cache = make_cache(self.spec, pages)
        except MemoryError as error:
            wanted = pages * self.page_bytes / 1e9
            message = f"{wanted:,.1f} GB of KV cache cannot be had: lower --kv-bytes or --kv-fraction"
            raise OutOfDeviceMemory(message) from error

    def memory(self) -> MemoryStatistics:
        scratch = self.model.ops.nbytes + self.sampler.nbytes
        return MemoryStatistics(self.model.weights.nbytes, self.cache.nbytes, scratch)

    def prepare(self, step: StepInput) -> "Prepared":
        """What can be said of a step before the one before it has ended; on any thread. Raises StepFailed."""
        check(step, len(self.cache.keys))
        return Prepared(step, self.model.shapes(step), is_plain(step))

    def run(self, prepared: "Prepared", launching: Callable[[], None] = lambda: None) -> StepOutput:
        """One step, start to end. launching: see Model.forward. Raises StepFailed."""
        step = prepared.step
        tokens = resolve(step.tokens, self.newest)
        refuse_outside("token", tokens, self.spec.vocabulary_size)
        self.cache.copy(step.copies)
        states = self.model.forward(tokens, prepared.shapes, self.cache, launching)

        def logits(at: NDArray[np.intp]) -> FloatArray:
            return self.model.logits(self.model.final_states(states, at))

        drawn = self.sampler.draw(step, self.newest, logits, plain=prepared.plain)
        self.newest = drawn.tokens
        hidden = NO_STATES
        if len(wanted := step.hidden_at.astype(np.intp)):
            hidden = self.model.final_states(states, wanted).values[: len(wanted)].copy()
        return StepOutput(drawn.tokens, drawn.logprobs, drawn.top_ids, drawn.top_logprobs, hidden)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step of which only the tokens are not known. plain: see sampler.is_plain."""

    step: StepInput
    shapes: Shapes
    plain: bool


def check(step: StepInput, pages: int) -> None:
    """Refuse indices that would read or write outside of the arrays: compiled kernels do not look."""
    for what, values, bound in (
        ("slot", step.slots, pages * PAGE_TOKENS),
        ("page", step.page_tables, pages),
        ("page to copy", step.copies, pages),
        ("index in sample_at", step.sample_at, len(step.tokens)),
        ("index in hidden_at", step.hidden_at, len(step.tokens)),
    ):
        refuse_outside(what, values, bound)


def refuse_outside(what: str, values: IntArray, bound: int) -> None:
    if values.size and (values.min() < 0 or values.max() >= bound):
        worst = values.min() if values.min() < 0 else values.max()
        raise StepFailed(f"{what} {worst} of a step is not in 0 .. {bound - 1}: this is a bug in the scheduler")
