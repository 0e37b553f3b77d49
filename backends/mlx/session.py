"""A loaded model with its pages and the newest tokens: what runner.py submits steps to, on the device thread only.

A step is a lazy graph: references resolved, pages copied, layers, logits of the places, draws. It is queued at once and read
when it is waited for. What a step drew stays on the device for the references of the next one.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from backends.mlx.cache import Cache, page_bytes
from backends.mlx.collective import ALONE, Collective
from backends.mlx.memory import scratch_bytes, set_limits
from backends.mlx.metal import MetalKernels
from backends.mlx.metal_cache import PagedKernels, make_cache
from backends.mlx.metal_library import MakeKernel
from backends.mlx.metal_norms import NormKernels
from backends.mlx.metal_products import ProductKernels
from backends.mlx.metal_sampling import SamplingKernels
from backends.mlx.model import Model
from backends.mlx.ops import Ops
from backends.mlx.sampler import Drawn, draw, resolve
from backends.mlx.steps import PAGE_TOKENS, PaddedStep, rounded_up
from backends.mlx.trial import attention_works, norms_work, sampling_works
from backends.mlx.warm_up import warm_up_steps
from backends.mlx.weights import load_weights
from engine.backend import LoadOptions, MemoryStatistics, Progress
from engine.errors import StepFailed
from engine.model.spec import ModelSpec
from engine.step import FloatArray, IntArray, StepInput, StepOutput
from engine.weights.tensors import TensorSource

__all__ = ["MlxTicket", "Session"]

NO_STATES: FloatArray = np.zeros((0, 0), np.float32)


@dataclass(frozen=True, slots=True)
class MlxTicket:
    """A step that is queued: its results, which may not be there yet."""

    number: int
    drawn: Drawn
    hidden: mx.array | None

    def read(self) -> StepOutput:
        """Waits for the device."""
        return self.drawn.output(NO_STATES if self.hidden is None else np.array(self.hidden))


class Session:
    """Weights, pages and the newest tokens."""

    def __init__(
        self, spec: ModelSpec, tensors: TensorSource, options: LoadOptions, progress: Progress, *, most_tokens: int,
        make_kernel: MakeKernel | None, collective: Collective = ALONE,
    ) -> None:  # fmt: skip
        """spec: of this rank's part, where collective has others. make_kernel: stands for mx.fast.metal_kernel in tests."""
        self.spec, self.fp8, self.most_tokens = spec, options.fp8_kvcache, most_tokens
        self.collective = collective
        set_limits(spec, most_tokens, collective.ranks)
        metal = make_kernel is not None or mx.metal.is_available()
        products = ProductKernels(make_kernel) if metal else None
        self.weights = load_weights(spec, tensors, options.dtype, progress, products, ranks=collective.ranks)
        progress("checking the device", 0, 1)
        norms = NormKernels(make_kernel) if metal and spec.hidden_size >= 8 else None
        paged, dtype = None if norms is None else PagedKernels(MetalKernels(make_kernel), norms), self.weights.dtype
        self.kernels = paged if paged is not None and attention_works(paged, spec, dtype, fp8=self.fp8) else None
        self.ops = Ops(spec.norm_epsilon, norms if norms is not None and norms_work(norms, spec, dtype) else None)
        sampling = SamplingKernels(make_kernel) if metal and collective.rank == 0 else None
        self.least_kept = sampling.least_kept if sampling and sampling_works(sampling, spec.vocabulary_size) else None
        self.model = Model(spec, self.weights, self.ops, collective)
        self.cache: Cache | None = None
        self.newest = mx.zeros(0, mx.int32)
        self.number = 0
        progress("checking the device", 1, 1)

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.spec, 1 if self.fp8 else self.weights.dtype.size)

    def useful_pages(self, sequences: int, context_length: int) -> int:
        """Pages that so many sequences of the longest context can fill."""
        return sequences * -(-(context_length or self.spec.context_length) // PAGE_TOKENS)

    def allocate(self, pages: int) -> None:
        self.cache = None                                        # before the new one: both may be large
        self.cache = make_cache(self.spec, self.ops, pages, self.weights.dtype, self.kernels, fp8=self.fp8)
        if mx.metal.is_available():
            self.warm_up()

    def warm_up(self) -> None:
        """Run a step of each kind, so that no kernel is compiled while somebody waits."""
        assert self.cache is not None
        for step in warm_up_steps(self.spec, self.cache.pages):
            pages = self.cache.open(step, np.zeros((0, 2), np.int32))
            states = self.model.forward(mx.array(step.tokens), pages)
            mx.eval(states, *pages.written)
            if self.collective.rank == 0:
                mx.eval(self.logits(states, np.arange(len(step.row_starts) - 1, dtype=np.int32)))

    def logits(self, states: mx.array, at: IntArray) -> mx.array:
        """Of some of the states, (n, V) float32: computed for as many as a kernel is there for."""
        padded = np.pad(at, (0, rounded_up(len(at)) - len(at)))
        found = self.model.logits(states[mx.array(padded)])
        return found if len(padded) == len(at) else found[: len(at)]

    def memory(self) -> MemoryStatistics:
        cache_bytes = 0 if self.cache is None else self.cache.nbytes
        return MemoryStatistics(self.weights.nbytes, cache_bytes, scratch_bytes(self.spec, self.most_tokens))

    def submit(self, step: StepInput) -> MlxTicket:
        """Queue a step. Raises StepFailed for what no scheduler makes."""
        assert self.cache is not None, "allocate comes first"
        check(step, self.spec.vocabulary_size, self.cache.pages, len(self.newest))
        self.number += 1
        padded = PaddedStep.of(step, self.cache.pages)
        pages = self.cache.open(padded, step.copies)
        if step.token_count == 0:                                # copies alone
            self.newest = mx.zeros(0, mx.int32)
            return MlxTicket(self.number, Drawn(self.newest, None, step.top_count), None)
        states = self.model.forward(resolve(padded.tokens, self.newest), pages)                   # (T, D)

        def logits(at: IntArray) -> mx.array:
            return self.logits(states, at)

        if self.collective.rank == 0:
            drawn = draw(step, self.newest, logits, self.least_kept)
        else:
            drawn = Drawn(mx.zeros(step.place_count, mx.int32), None, step.top_count)
        drawn = replace(drawn, tokens=self.collective.tokens_of_first(drawn.tokens, states))
        hidden = states[mx.array(step.hidden_at)].astype(mx.float32) if len(step.hidden_at) else None
        wanted = [*drawn.arrays, *([] if hidden is None else [hidden]), *pages.written]
        if self.collective.ranks > 1:
            wanted.insert(0, states)                             # so that all ranks evaluate the same sums
        mx.async_eval(*wanted)  # type: ignore[no-untyped-call]
        self.newest = drawn.tokens
        return MlxTicket(self.number, drawn, hidden)


def check(step: StepInput, vocabulary: int, pages: int, drawn: int) -> None:
    """Refuse indices outside of the arrays: the device does not look."""
    references = [step.tokens] if step.history is None else [step.tokens, step.history.tokens]
    for what, values, least, bound in (
        *(("token", tokens, -drawn, vocabulary) for tokens in references),
        ("slot", step.slots, 0, pages * PAGE_TOKENS),
        ("page", step.page_tables, 0, pages),
        ("page to copy", step.copies, 0, pages),
        ("index in sample_at", step.sample_at, 0, step.token_count),
        ("index in hidden_at", step.hidden_at, 0, step.token_count),
    ):
        if values.size and (values.min() < least or values.max() >= bound):
            worst = values.min() if values.min() < least else values.max()
            raise StepFailed(f"{what} {worst} of a step is not in {least} .. {bound - 1}: this is a bug in the scheduler")
