"""Counters and histograms as plain data. The core counts, the server exports; nothing here knows an exporter or a clock.

Names follow vLLM's, so that dashboards need one replacement.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Histogram", "Metrics", "Statistics"]

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


class Histogram:
    """Counts of values by upper bound, with their sum; the last count is of values above every bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)


def _seconds() -> Histogram:
    return Histogram(SECONDS)


def _tokens() -> Histogram:
    return Histogram(TOKENS)


@dataclass(slots=True)
class Metrics:
    """What the engine has done since its start."""

    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    prefix_cache_queries: int = 0                  # tokens of prompts that could have been found ...
    prefix_cache_hits: int = 0                     # ... and were
    num_preemptions: int = 0
    audit_failures: int = 0
    steps_total: int = 0
    request_success: Counter[str] = field(default_factory=Counter)          # by finish reason
    time_to_first_token_seconds: Histogram = field(default_factory=_seconds)
    inter_token_latency_seconds: Histogram = field(default_factory=_seconds)
    e2e_request_latency_seconds: Histogram = field(default_factory=_seconds)
    request_queue_time_seconds: Histogram = field(default_factory=_seconds)
    request_prompt_tokens: Histogram = field(default_factory=_tokens)
    request_generation_tokens: Histogram = field(default_factory=_tokens)
    iteration_tokens_total: Histogram = field(default_factory=_tokens)


@dataclass(frozen=True, slots=True)
class Statistics:
    """One look at the engine: counts of now, and the metrics since its start."""

    num_requests_running: int                      # sequences
    num_requests_waiting: int
    pages: int
    page_tokens: int
    pages_free: int
    pages_cached: int
    pages_held: int
    cache_sessions: int
    weights_bytes: int
    cache_bytes: int
    scratch_bytes: int
    metrics: Metrics

    @property
    def kv_cache_usage_perc(self) -> float:
        """Share of the pages that sequences hold, 0 to 1."""
        return self.pages_held / self.pages if self.pages else 0.0
