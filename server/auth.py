"""API keys: who may ask. server.app calls `check` before every route, known or not.

Keys are compared as digests in constant time, all of them each time, and are never logged. /health, /ready and preflights
need none.
"""

import hmac
from collections.abc import Sequence
from hashlib import sha256

from server.errors import Unauthorized

__all__ = ["Keys"]

OPEN = frozenset({"/health", "/ready"})


class Keys:
    """No keys: everybody may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def check(self, method: str, path: str, authorization: str | None) -> None:
        """Raise Unauthorized unless the request shows one of the keys or needs none."""
        if not self._digests or path in OPEN or method == "OPTIONS":
            return
        scheme, _, key = (authorization or "").partition(" ")
        shown = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        known = False
        for digest in self._digests:                      # no early end: the time must not tell which one it was
            known |= hmac.compare_digest(shown, digest)
        if scheme.lower() != "bearer" or not known:
            what = "a wrong API key" if authorization else "no API key"
            raise Unauthorized(f"the request shows {what}: send the header `Authorization: Bearer KEY`")
