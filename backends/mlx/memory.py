"""How much memory the backend may take, of Metal's working set or of the machine's memory; runner.py and session.py ask.

Metal ends the process when an allocation cannot be had, so the pool of pages is refused here before anything is allocated.
"""

import os
import sys
from math import prod
from pathlib import Path

import mlx.core as mx

from backends.mlx.sampler import HEAD_ROWS
from backends.mlx.weights import memory_limit
from engine.model.spec import Dense, ModelSpec

__all__ = ["MOST_UNASKED_BYTES", "available_bytes", "scratch_bytes", "set_limits"]

MOST_UNASKED_BYTES = 1 << 30     # of pages without Metal: MLX writes a whole pool at once, and is for tests there
MEMINFO = Path("/proc/meminfo")


def available_bytes(spec: ModelSpec, tokens: int, ranks: int = 1) -> int:
    """What weights have left for pages, and for other models, after what a step of so many tokens takes; for
    one of so many ranks, which share a machine."""
    limit = (memory_limit() or 4 << 30) // ranks
    if mx.metal.is_available():
        return max(0, limit - mx.get_active_memory() - scratch_bytes(spec, tokens))
    free = limit * ranks // 2
    if MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else free
    elif sys.platform != "win32" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, free // ranks - scratch_bytes(spec, tokens))


def scratch_bytes(spec: ModelSpec, tokens: int) -> int:
    """A step's own arrays, with room: six times the logits of one chunk, and a layer's widest results twice over, in
    float32."""
    widest = 0
    for layer in spec.layers:
        a, feed = layer.attention, layer.feed_forward
        width = feed.width if isinstance(feed, Dense) else feed.width * feed.experts_per_token + (feed.shared_width or 0)
        widest = max(widest, (a.heads + 2 * a.kv_heads) * a.head_size + 3 * width + 4 * spec.hidden_size)
    return 4 * (6 * prod((min(HEAD_ROWS, tokens), spec.vocabulary_size)) + 2 * tokens * widest)


def set_limits(spec: ModelSpec, tokens: int, ranks: int = 1) -> None:
    """On Metal: freed arrays that MLX keeps stay below one step's, and what is resident stays in memory."""
    if mx.metal.is_available() and (limit := memory_limit()) is not None:
        mx.set_cache_limit(scratch_bytes(spec, tokens))
        mx.set_memory_limit(limit // ranks)
        mx.set_wired_limit(limit // ranks)
