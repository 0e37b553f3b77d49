"""What lies where in the key/value cache: runner.py sizes the pool by it, rope.py writes to it, attention.py reads it."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["PAGE_TOKENS", "CacheItem", "CacheLayout"]

CacheItem = Literal["bf16", "fp8"]       # fp8: E4M3, scale 1

PAGE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Pages as [layer][keys, values][kv_head][token 0..31][head_size]; a page is one piece of memory."""

    layers: int
    kv_heads: int
    head_size: int
    item: CacheItem

    @property
    def item_bytes(self) -> int:
        return 1 if self.item == "fp8" else 2

    @property
    def part_bytes(self) -> int:
        """A layer's keys of a page, or its values."""
        return self.kv_heads * PAGE_TOKENS * self.head_size * self.item_bytes

    @property
    def page_bytes(self) -> int:
        return self.layers * 2 * self.part_bytes

    def keys(self, layer: int) -> int:
        """Where a layer's keys begin in a page; its values follow after part_bytes."""
        assert 0 <= layer < self.layers, (layer, self.layers)
        return layer * 2 * self.part_bytes
