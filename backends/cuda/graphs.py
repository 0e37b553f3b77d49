"""Decode steps as CUDA graphs: one per bucket of rows, so that the host launches once where a step has hundreds of kernels.

A graph reads everything that changes (tokens, lengths, tables and their width) from the step buffer, whose addresses
depend on the bucket only. session.py asks bucket_of() and replays.
"""

from collections.abc import Callable

from backends.cuda.device import Graph, Stream
from engine.step import StepInput

__all__ = ["BUCKETS", "Graphs", "bucket_of", "buckets_up_to"]

BUCKETS = (1, 2, 4, 8, *range(16, 257, 16))


def buckets_up_to(rows: int) -> tuple[int, ...]:
    """The buckets that steps of up to so many rows need."""
    below = [bucket for bucket in BUCKETS if bucket < rows]
    reaching = [bucket for bucket in BUCKETS if bucket >= rows]
    return tuple(below + reaching[:1])


def bucket_of(step: StepInput, buckets: tuple[int, ...]) -> int | None:
    """The least bucket for a step of one token per row; None for other steps, and those with more rows than any has."""
    rows = step.row_count
    if step.token_count != rows or rows == 0:
        return None
    return next((bucket for bucket in buckets if bucket >= rows), None)


class Graphs:
    """Bucket -> graph. A bucket's work runs as it is the first time, which loads every kernel, and is captured then."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.graphs: dict[int, Graph] = {}

    def run(self, bucket: int, work: Callable[[], None]) -> None:
        """Do the work of a bucket, by its graph if there is one. It makes the same launches each time."""
        graph = self.graphs.get(bucket)
        if graph is None:
            work()
            self.graphs[bucket] = self.stream.capture(work)
        else:
            self.stream.replay(graph)
