"""The Backend protocol and the registry. A backend is one device, or one tensor-parallel group, that runs steps.

The core calls a backend from one device thread only. Backends are found by entry points of the group `rillet.backends`
and imported when asked for, so that importing engine never imports a device library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, cast

from engine.errors import DeviceUnavailable
from engine.model.spec import ModelSpec
from engine.step import StepInput, StepOutput
from engine.weights.tensors import TensorSource

__all__ = [
    "Backend",
    "BackendInfo",
    "CallingTicket",
    "LoadOptions",
    "MemoryStatistics",
    "Progress",
    "Ticket",
    "available_backends",
    "create_backend",
]

GROUP = "rillet.backends"
PREFERENCE = ("cuda", "mlx", "cpu")

Progress = Callable[[str, int, int], None]
"""(what is going on, done, of how many): called often while loading, from the device thread."""


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """Facts of a backend, fixed from its creation.

    supports: words such as "batch_invariant", "logprobs", "hidden", "grammar", "fp8_kvcache"; what is not there is
    refused at load or admission.
    """

    name: str
    device: str
    page_tokens: int
    max_batch_tokens: int
    max_places: int
    max_num_seqs: int                    # the default of --max-num-seqs here
    supports: frozenset[str]
    native: bool = True                  # False: without the device that it is for, which "auto" passes by
    calls_back: bool = False             # True: submit only queues, and tickets are CallingTickets


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load: dtype of what is not quantized ("auto": the backend's best), threads (0: all that the process may
    use), devices, the share of free memory for the KV cache, and the context length that will be served."""

    dtype: str = "auto"
    threads: int = 0
    device_ids: tuple[int, ...] = (0,)
    kv_fraction: float = 0.5
    fp8_kvcache: bool = False
    context_length: int = 0
    max_num_seqs: int = 0
    checkpoint: str | None = None        # what open_checkpoint takes, for a process that opens the same tensors again


@dataclass(frozen=True, slots=True)
class MemoryStatistics:
    """Bytes held on the device."""

    weights_bytes: int
    cache_bytes: int
    scratch_bytes: int


class Ticket(Protocol):
    """A step that was submitted and not yet waited for."""

    @property
    def number(self) -> int: ...


class CallingTicket(Ticket, Protocol):
    """One of a backend whose info says calls_back."""

    def when_done(self, function: Callable[[], object]) -> None:
        """Call the function, on any thread, as soon as wait() would return at once."""
        ...


class Backend(Protocol):
    """One device, or one tensor-parallel group, that runs steps. Every call comes from one device thread; of a backend that
    calls back submit and wait may come from the event loop's too, never two calls at a time."""

    @property
    def info(self) -> BackendInfo: ...

    def load(self, spec: ModelSpec, tensors: TensorSource, options: LoadOptions, progress: Progress) -> None:
        """Take the weights. Raises UnsupportedModel, BadModelFile, OutOfDeviceMemory."""
        ...

    def allocate_cache(self, budget_bytes: int | None) -> int:
        """Make the one fixed page pool and return its count of pages; None: as many as options.kv_fraction allows."""
        ...

    def submit(self, step: StepInput) -> Ticket:
        """Queue a step and return at once; at most two tickets are open. The core never changes the arrays again."""
        ...

    def wait(self, ticket: Any) -> StepOutput:
        """The output of a step that this backend's submit took; tickets are waited for in the order of submission."""
        ...

    def memory(self) -> MemoryStatistics: ...

    def close(self) -> None:
        """Free everything; idempotent."""
        ...


def available_backends() -> tuple[str, ...]:
    """Names of the installed backends, best first."""
    names = {point.name for point in entry_points(group=GROUP)}
    return tuple(sorted(names, key=lambda name: (PREFERENCE.index(name) if name in PREFERENCE else 99, name)))


def create_backend(name: str = "auto") -> Backend:
    """Import and create a backend; "auto" takes the first of PREFERENCE whose device is there. DeviceUnavailable if none."""
    installed = available_backends()
    wanted = tuple(known for known in installed if known in PREFERENCE) if name == "auto" else (name,)
    refusals = []
    for candidate in wanted:
        points = entry_points(group=GROUP, name=candidate)
        if not points:
            known = ", ".join(each for each in installed if each != "null") or "none"     # null is for the bench
            raise DeviceUnavailable(f"no backend named {candidate!r} is installed: choose one of {known}")
        try:
            factory = cast(Callable[[], Backend], next(iter(points)).load())
            backend = factory()
            if backend.info.native or name != "auto":
                return backend
            refusals.append(f"{candidate}: {backend.info.device}")
        except (ImportError, DeviceUnavailable) as error:
            refusals.append(f"{candidate}: {error}")
    raise DeviceUnavailable(
        "no backend can run here (" + ("; ".join(refusals) or "none installed: pip install rillet") + ")"
    )
