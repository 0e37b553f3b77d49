"""MlxBackend: engine.backend.Backend on Apple silicon, and with the same graph on MLX's CPU build, for tests.

The core calls it through engine.backend.Backend, from one thread, which owns everything of MLX. Importing this module must
cost nothing, and creating a backend must touch no stream: MLX's belong to the thread that uses them first.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from engine.backend import BackendInfo, LoadOptions, MemoryStatistics, Progress, Ticket
from engine.errors import BackendError, DeviceUnavailable, OutOfDeviceMemory, StepFailed, UnsupportedModel
from engine.model.spec import ModelSpec
from engine.step import StepInput, StepOutput
from engine.weights.tensors import TensorSource

if TYPE_CHECKING:
    from backends.mlx.collective import Collective
    from backends.mlx.session import Session

__all__ = ["MlxBackend"]

PAGE_TOKENS = 32
MAX_BATCH_TOKENS, MAX_BATCH_TOKENS_WITHOUT_METAL = 1024, 64      # a second of a small model: what a cancelled prompt may cost
MAX_PLACES = 1024
# MLX ends a command buffer after arrays of so many megabytes, and counts each pool of pages whole whenever a kernel has it:
# at its default of 40 every attention would begin a buffer of its own. It is read once, before the first stream is made.
BUFFER_MEGABYTES = 1000
MAX_NUM_SEQS = 32
SUPPORTS = frozenset({"logprobs", "hidden", "grammar", "penalties", "bias", "sliding_window", "soft_cap", "copies"})


class MlxBackend:
    """engine.backend.Backend on MLX."""

    def __init__(
        self, *, make_kernel: Any = None, max_batch_tokens: int | None = None, collective: "Collective | None" = None
    ) -> None:
        """make_kernel: stands for mx.fast.metal_kernel in tests. collective: the other ranks, if this is one of several.

        Raises DeviceUnavailable where MLX is not installed.
        """
        if sys.platform == "darwin":
            os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", str(BUFFER_MEGABYTES))
        try:
            import mlx.core as mx
        except ImportError as error:
            package = "mlx" if sys.platform == "darwin" else '"mlx[cpu]"'
            raise DeviceUnavailable(f"the mlx backend needs MLX, which is not there: pip install {package}") from error
        self.metal = metal = mx.metal.is_available()
        if metal and not mx.device_count(mx.gpu):                # a Mac's MLX says yes where a virtual machine has no device
            raise DeviceUnavailable("no Metal device answers on this Mac: take --backend cpu")
        self.make_kernel = make_kernel
        self.collective = collective
        self.info = BackendInfo(
            name="mlx",
            device="Metal" if metal else "cpu (MLX without Metal)",
            page_tokens=PAGE_TOKENS,
            max_batch_tokens=max_batch_tokens or (MAX_BATCH_TOKENS if metal else MAX_BATCH_TOKENS_WITHOUT_METAL),
            max_places=MAX_PLACES,
            max_num_seqs=MAX_NUM_SEQS,
            supports=SUPPORTS | {"fp8_kvcache"} if metal or make_kernel is not None else SUPPORTS,
            native=metal,
        )
        self.options = LoadOptions()
        self.session: Session | None = None
        self.closed = False

    def load(self, spec: ModelSpec, tensors: TensorSource, options: LoadOptions, progress: Progress) -> None:
        """Take the weights. Raises UnsupportedModel, BadModelFile, ConfigError, OutOfDeviceMemory."""
        if options.device_ids != (0,):
            raise UnsupportedModel(f"the mlx backend is one device, not {options.device_ids}: leave --d out")
        if options.fp8_kvcache and "fp8_kvcache" not in self.info.supports:
            raise UnsupportedModel("the mlx backend has an fp8 KV cache on Metal only: leave --fp8-kvcache out")
        from backends.mlx.collective import ALONE
        from backends.mlx.session import Session

        self.options = options
        with named_errors("loading"):
            self.session = Session(
                spec, tensors, options, progress, most_tokens=self.info.max_batch_tokens, make_kernel=self.make_kernel,
                collective=self.collective or ALONE,
            )  # fmt: skip

    def allocate_cache(self, budget_bytes: int | None) -> int:
        from backends.mlx.memory import MOST_UNASKED_BYTES, available_bytes

        session = self._session()
        free = available_bytes(session.spec, session.most_tokens, session.collective.ranks)
        if budget_bytes is None:
            most = session.useful_pages(self.options.max_num_seqs or MAX_NUM_SEQS, self.options.context_length)
            budget = int(free * self.options.kv_fraction)
            budget = budget if self.metal else min(budget, MOST_UNASKED_BYTES)
            pages = min(most, budget // session.page_bytes)
        else:
            budget, pages = budget_bytes, budget_bytes // session.page_bytes
        if pages < 1:
            cure = "raise --kv-bytes" if budget_bytes is not None else "free some memory, or raise --kv-fraction"
            raise OutOfDeviceMemory(
                f"the KV cache gets {budget / 1e6:,.0f} MB, one page of {PAGE_TOKENS} tokens takes "
                f"{session.page_bytes / 1e6:,.1f} MB: {cure}"
            )
        if pages * session.page_bytes > free:                    # Metal would end the process
            raise OutOfDeviceMemory(
                f"{budget / 1e9:,.1f} GB of KV cache are wanted, {free / 1e9:,.1f} GB are left beside the weights: "
                "lower --kv-bytes"
            )
        with named_errors("allocating the KV cache"):
            session.allocate(pages)
        return pages

    def submit(self, step: StepInput) -> Ticket:
        """Queue a step. Its arrays are copied."""
        session = self._session()
        with named_errors(f"step {session.number + 1}"):
            return session.submit(step)

    def wait(self, ticket: Any) -> StepOutput:
        self._session()
        output: StepOutput
        with named_errors(f"step {ticket.number}"):
            output = ticket.read()
        return output

    def memory(self) -> MemoryStatistics:
        return MemoryStatistics(0, 0, 0) if self.session is None else self.session.memory()

    def close(self) -> None:
        """Finish what is queued and free everything, on the device thread."""
        self.closed = True
        if self.session is not None:
            import mlx.core as mx

            mx.synchronize()
            self.session = None
            mx.clear_cache()

    def _session(self) -> "Session":
        if self.session is None:
            why = "is closed" if self.closed else "has no model: call load first"
            raise BackendError(f"the mlx backend {why}")
        return self.session


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    """MLX's own errors, which have one type, as ours."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "alloc" in str(error).lower():
            raise OutOfDeviceMemory(
                f"{what}: memory ran out ({str(error)[:160]}): lower --kv-fraction or --max-num-seqs, or take a smaller model"
            ) from error
        raise StepFailed(f"{what} failed on the device: {error}") from error
