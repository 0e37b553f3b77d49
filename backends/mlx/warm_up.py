"""The steps that are run before anybody waits: Metal compiles each variant of a kernel when it is first used.

session.py runs them once the pages are there, on a device. Which variant a step takes depends on its count of tokens, for
products with native blocks, and on how many parts attention cuts the longest context into.
"""

from collections.abc import Iterator

import numpy as np

from backends.mlx.metal import parts_of
from backends.mlx.steps import PAGE_TOKENS, PaddedStep
from engine.model.spec import ModelSpec

__all__ = ["warm_up_steps"]

ROWS = (1, 2, 4, 8, 16, 32)
PROMPT = 64              # tokens


def warm_up_steps(spec: ModelSpec, pages: int) -> Iterator[PaddedStep]:
    """Steps that read page 0 and write to the scratch page: of single tokens, and of a prompt."""
    widest = min(pages, -(-spec.context_length // PAGE_TOKENS))
    seen: set[tuple[int, ...]] = set()
    for rows in ROWS:
        yield blank_step([1] * rows, 1, pages)
        width = 1
        while (width := 2 * width) <= 2 * widest:
            parts = tuple(sorted({parts_of(min(width, widest), rows, layer.attention) for layer in spec.layers}))
            if parts not in seen:
                seen.add(parts)
                yield blank_step([1] * rows, min(width, widest), pages)
    yield blank_step([PROMPT], PROMPT // PAGE_TOKENS, pages)


def blank_step(lengths: list[int], width: int, scratch_page: int) -> PaddedStep:
    """Rows of so many tokens each, with page tables of `width` columns."""
    count = sum(lengths)
    zeros = np.zeros(count, np.int32)
    return PaddedStep(
        tokens=zeros,
        positions=zeros,
        slots=zeros + np.int32(scratch_page * PAGE_TOKENS),
        row_starts=np.cumsum([0, *lengths]).astype(np.int32),
        kv_lengths=np.array(lengths, np.int32),
        page_tables=np.zeros((len(lengths), width), np.int32),
        count=count,
    )
