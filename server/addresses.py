"""What is said of an address that is not there: the one that was meant, or why nothing can be there.

server.app asks it for every 404 of its map of addresses. Paths come from clients: nothing but fixed sentences and our own
addresses goes back.
"""

from collections.abc import Set
from functools import cache

from quart import Quart

from engine import RilletError

__all__ = ["NotOffered", "UnknownAddress", "explained"]

# Ollama's addresses that change which models there are.
MANAGING = {
    "/api/pull": "models cannot be pulled over HTTP",
    "/api/push": "models cannot be pushed over HTTP",
    "/api/create": "models cannot be created over HTTP",
    "/api/copy": "models cannot be copied over HTTP",
    "/api/delete": "models cannot be deleted over HTTP",
    "/api/blobs": "models cannot be created over HTTP",
}
CURE = "start the server with --m ID or --f FILE; `rillet pull` and `rillet remove` keep the models of this machine"
MAX_PARTS = 8


class UnknownAddress(RilletError):
    """There is no such address, but another one that was probably meant."""


class NotOffered(RilletError):
    """Something of another server's API that this one will not do."""


def explained(app: Quart, path: str) -> RilletError | None:
    """What to answer to a path that no route has; None where nothing more is known."""
    for managing, sentence in MANAGING.items():
        if path == managing or path.startswith(managing + "/"):
            return NotOffered(f"{sentence}: {CURE}")
    parts = [part for part in path.split("/") if part]
    known = _addresses(app)
    for first in range(min(len(parts), MAX_PARTS)):
        rest = "/" + "/".join(parts[first:])
        for meant in (rest, "/v1" + rest):
            if meant in known:
                return UnknownAddress(f"there is no such address here: did you mean {meant}?")
    return None


@cache
def _addresses(app: Quart) -> Set[str]:
    return frozenset(rule.rule for rule in app.url_map.iter_rules() if "<" not in rule.rule and rule.rule != "/")
