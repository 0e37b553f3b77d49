"""StepInputs as tests want them: rows of tokens with their pages, everything else as plain as it can be."""

from collections.abc import Callable

import numpy as np

from engine.step import StepInput

__all__ = ["PAGE_TOKENS", "StepBuilder", "build_step", "ints"]

PAGE_TOKENS = 32
StepBuilder = Callable[..., StepInput]


def ints(values: object) -> np.ndarray:
    return np.array(values, np.int32)


def build_step(
    rows: list[tuple[list[int], int, list[int]]], sample_at: list[int] | None = None, **fields: object
) -> StepInput:
    """A step of rows (tokens, tokens before them, pages), greedy; it samples each row's last token, or where told."""
    lengths = [len(tokens) for tokens, _, _ in rows]
    positions = [before + i for tokens, before, _ in rows for i in range(len(tokens))]
    slots = [
        pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS
        for tokens, before, pages in rows
        for p in range(before, before + len(tokens))
    ]
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    tables = np.zeros((len(rows), max(len(pages) for _, _, pages in rows)), np.int32)
    for table, (_, _, pages) in zip(tables, rows, strict=True):
        table[: len(pages)] = pages
    at = ints(starts[1:] - 1 if sample_at is None else sample_at)
    places = len(at)
    defaults = {
        "copies": np.zeros((0, 2), np.int32),
        "tokens": ints([token for tokens, _, _ in rows for token in tokens]),
        "positions": ints(positions),
        "slots": ints(slots),
        "row_starts": starts,
        "kv_lengths": ints([before + len(tokens) for tokens, before, _ in rows]),
        "page_tables": tables,
        "sample_at": at,
        "temperature": np.zeros(places, np.float32),
        "top_k": np.zeros(places, np.int32),
        "top_p": np.ones(places, np.float32),
        "min_p": np.zeros(places, np.float32),
        "repetition": np.ones(places, np.float32),
        "frequency": np.zeros(places, np.float32),
        "presence": np.zeros(places, np.float32),
        "seed": np.zeros((places, 2), np.uint32),
        "draw_position": ints(positions)[at] + np.int32(1),
        "choice": np.zeros(places, np.int32),
        "score": np.full(places, -1, np.int32),
        "top_count": np.full(places, -1, np.int32),
    }
    return StepInput(**(defaults | fields))
