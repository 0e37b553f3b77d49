"""A StepInput made ready for the graph: padded to sizes that come again, so that MLX's allocator and kernels meet few shapes.

session.py makes a PaddedStep, the caches read it. Padding tokens write to the scratch page, which is the last of the pool.
"""

from dataclasses import dataclass

import numpy as np

from engine.step import IntArray, StepInput

__all__ = ["PAGE_TOKENS", "PaddedStep", "rounded_up"]

PAGE_TOKENS = 32
EIGHT, FINE, COARSE = 8, 64, 32


def rounded_up(count: int) -> int:
    """The next size: powers of two up to 8, as kernels are compiled for each; then eights, then matrix tiles."""
    if count <= 1:
        return count
    if count <= EIGHT:
        return 1 << (count - 1).bit_length()
    step = EIGHT if count <= FINE else COARSE
    return -(-count // step) * step


def rounded_width(pages: int) -> int:
    """The next width of a page table: powers of two and the halves between them."""
    size = 1
    while size < pages:
        if pages <= size * 3 // 2 and size > 1:
            return size * 3 // 2
        size *= 2
    return size


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """Arrays on the host. T and W are padded, rows are not."""

    tokens: IntArray          # (T,) id, or -1 - s: drawn at place s of the ticket before
    positions: IntArray       # (T,)
    slots: IntArray           # (T,)
    row_starts: IntArray      # (B + 1,)
    kv_lengths: IntArray      # (B,)
    page_tables: IntArray     # (B, W)
    count: int                # tokens that are not padding

    @classmethod
    def of(cls, step: StepInput, scratch_page: int) -> "PaddedStep":
        missing = rounded_up(step.token_count) - step.token_count
        columns = rounded_width(max(1, step.page_tables.shape[1])) - step.page_tables.shape[1]
        return cls(
            np.pad(step.tokens, (0, missing)),
            np.pad(step.positions, (0, missing)),
            np.pad(step.slots, (0, missing), constant_values=scratch_page * PAGE_TOKENS),
            step.row_starts,
            step.kv_lengths,
            np.pad(step.page_tables, ((0, 0), (0, columns))),
            step.token_count,
        )

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row in this step, (B,)."""
        return np.diff(self.row_starts)
