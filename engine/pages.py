"""The page pool and its prefix cache: who holds which page, which pages may be reused, which are found again by content.

Pure bookkeeping: no tensors, no clock, no awaits. A page is in exactly one place: held (references > 0), in limbo (given
back, but named by a ticket not yet waited for), cached (found by its key, may be evicted), pinned (cached, evicted last),
or free. The scheduler is the only caller.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from engine.errors import RilletError

__all__ = ["PageCounts", "PagePool", "page_keys"]


def page_keys(tokens: Sequence[int], page_tokens: int, keys: list[bytes], count: int, salt: bytes) -> list[bytes]:
    """Extend `keys` in place to the first `count` pages of `tokens`: a hash chain over the exact tokens and the salt."""
    if len(keys) >= count:
        return keys
    start = len(keys)
    data = np.asarray(tokens[start * page_tokens : count * page_tokens], np.int32).tobytes()
    previous = keys[-1] if keys else blake2b(salt, digest_size=16, person=b"rillet").digest()
    width = 4 * page_tokens
    for at in range(0, len(data), width):
        previous = blake2b(data[at : at + width], digest_size=16, key=previous).digest()
        keys.append(previous)
    return keys


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Where the pages are; the five add up to all pages."""

    held: int
    limbo: int
    cached: int
    pinned: int
    free: int


class PagePool:
    """`pages` pages of `page_tokens` tokens each.

    A page given back keeps its key, if it has one, until it is taken for other tokens. `after` is the number of the last
    ticket that names the page: until `complete(after)` nobody may take it.
    """

    def __init__(self, pages: int, page_tokens: int, *, max_sessions: int = 64) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._references = [0] * pages
        self._after = [0] * pages
        self._key: list[bytes | None] = [None] * pages
        self._by_key: dict[bytes, int] = {}
        self._free = list(range(pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()          # oldest first
        self._pinned: dict[int, None] = {}
        self._limbo: dict[int, None] = {}
        self._completed = 0
        self._sessions: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._pins = [0] * pages
        self._max_sessions = max_sessions

    # ---- taking and giving back -----------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Pages that could be taken now: free, cached or pinned."""
        return len(self._free) + len(self._cached) + len(self._pinned)

    @property
    def returning(self) -> bool:
        """Whether pages come back when the tickets in flight are done."""
        return bool(self._limbo)

    def take(self) -> int | None:
        """A page for new tokens, held once; None if there is none now. Evicts the page that was unused longest."""
        if self._free:
            page = self._free.pop()
        else:
            while not self._cached and self._pinned:
                self._unpin(next(iter(self._sessions)))
            if not self._cached:
                return None
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._references[page] = 1
        return page

    def share(self, page: int) -> None:
        """Hold a page once more (a fork, a prefix hit)."""
        if self._references[page] == 0:
            self._cached.pop(page, None)
            self._pinned.pop(page, None)
            self._limbo.pop(page, None)
        self._references[page] += 1

    def references(self, page: int) -> int:
        """How often the page is held."""
        return self._references[page]

    def release(self, pages: Iterable[int], after: int) -> None:
        """Give pages back, in the order in which they may be evicted."""
        for page in pages:
            if self._references[page] <= 0:
                raise RilletError(f"page {page} was given back twice: this is a bug of Rillet, please report it")
            self._references[page] -= 1
            self._after[page] = max(self._after[page], after)
            if self._references[page] == 0:
                if self._after[page] > self._completed:
                    self._limbo[page] = None
                else:
                    self._rest(page)

    def complete(self, ticket: int) -> None:
        """Ticket `ticket` and all before it were waited for."""
        self._completed = ticket
        if self._limbo:
            for page in [page for page in self._limbo if self._after[page] <= ticket]:
                del self._limbo[page]
                self._rest(page)

    def _rest(self, page: int) -> None:
        if self._key[page] is None:
            self._free.append(page)
        elif self._pins[page]:
            self._pinned[page] = None
        else:
            self._cached[page] = None

    def _forget(self, page: int) -> None:
        key = self._key[page]
        if key is not None:
            del self._by_key[key]
            self._key[page] = None

    # ---- the prefix cache -----------------------------------------------------------------------------------------

    def register(self, page: int, key: bytes) -> None:
        """The page is full and `key` says with what. If another page has the same content, that one stays the known one."""
        if self._key[page] is None and key not in self._by_key:
            self._key[page] = key
            self._by_key[key] = page

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The longest run of known pages for `keys`; they are not yet held."""
        found: list[int] = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def idle(self, page: int) -> bool:
        """Whether nobody holds the page: sharing it takes one from `available`."""
        return self._references[page] == 0 and page not in self._limbo

    def pin(self, session: str, pages: Sequence[int]) -> None:
        """Keep the keyed ones of `pages` for `session` until no other page can be evicted, or newer sessions push it out."""
        self._unpin(session)
        kept = tuple(page for page in pages if self._key[page] is not None)
        if not kept:
            return
        self._sessions[session] = kept
        for page in kept:
            self._pins[page] += 1
            if page in self._cached:
                del self._cached[page]
                self._pinned[page] = None
        while len(self._sessions) > self._max_sessions:
            self._unpin(next(iter(self._sessions)))

    def _unpin(self, session: str) -> None:
        for page in reversed(self._sessions.pop(session, ())):
            self._pins[page] -= 1
            if self._pins[page] == 0 and page in self._pinned:
                del self._pinned[page]
                self._cached[page] = None

    def clear_cache(self) -> None:
        """Forget every page that nobody holds (statistics and tests)."""
        for session in list(self._sessions):
            self._unpin(session)
        while self._cached:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
            self._free.append(page)

    # ---- looking at it --------------------------------------------------------------------------------------------

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    def counts(self) -> PageCounts:
        held = sum(1 for references in self._references if references)
        return PageCounts(held, len(self._limbo), len(self._cached), len(self._pinned), len(self._free))

    def audit(self) -> str | None:
        """What does not add up, or None. Linear in the pool: for idle moments and tests."""
        counts = self.counts()
        places = [*self._free, *self._cached, *self._pinned, *self._limbo]
        places += [page for page, references in enumerate(self._references) if references]
        if len(places) != self.pages or len(set(places)) != self.pages:
            return f"{counts} are {len(places)} entries, {len(set(places))} different, of {self.pages} pages"
        for key, page in self._by_key.items():
            if self._key[page] != key:
                return f"page {page} is found by a key that it does not have"
        if any(self._key[page] is not None for page in self._free):
            return "a free page has a key"
        return None
