"""A backend that computes nothing: every token is the same. It shows what the engine itself costs (engine.bench)."""

from dataclasses import dataclass

import numpy as np

from engine.backend import BackendInfo, LoadOptions, MemoryStatistics, Progress
from engine.model.spec import ModelSpec
from engine.step import StepInput, StepOutput
from engine.weights.tensors import TensorSource

__all__ = ["NullBackend"]


@dataclass(frozen=True, slots=True)
class _Ticket:
    number: int
    places: int


class NullBackend:
    """`pages` pages of `page_tokens` tokens that hold nothing; draws `token` at every place."""

    def __init__(self, *, pages: int = 16384, page_tokens: int = 32, max_num_seqs: int = 256, token: int = 100) -> None:
        self._pages = pages
        self._token = token
        self._count = 0
        self.info = BackendInfo(
            name="null",
            device="nothing",
            page_tokens=page_tokens,
            max_batch_tokens=8192,
            max_places=1024,
            max_num_seqs=max_num_seqs,
            supports=frozenset({"batch_invariant", "penalties", "bias"}),
        )

    def load(self, spec: ModelSpec, tensors: TensorSource, options: LoadOptions, progress: Progress) -> None:
        """Takes no weights."""

    def allocate_cache(self, budget_bytes: int | None) -> int:
        return self._pages

    def submit(self, step: StepInput) -> _Ticket:
        self._count += 1
        return _Ticket(self._count, step.place_count)

    def wait(self, ticket: _Ticket) -> StepOutput:
        places = ticket.places
        return StepOutput(
            tokens=np.full(places, self._token, np.int32),
            logprobs=np.full(places, np.nan, np.float32),
            top_ids=np.zeros((places, 0), np.int32),
            top_logprobs=np.zeros((places, 0), np.float32),
            hidden=np.zeros((0, 0), np.float32),
        )

    def memory(self) -> MemoryStatistics:
        return MemoryStatistics(0, 0, 0)

    def close(self) -> None:
        """Holds nothing."""
