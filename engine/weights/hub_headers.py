"""guard_headers(): a hub's answer may not choose a path outside of the cache, whatever its ETag says.

huggingface_hub joins its cache's folder with the ETag and the commit that a server states, unchecked. hugging_face.py calls
this before each download: from then on every HEAD of a file that huggingface_hub makes in this process is looked at, before
anything is written. It must never change a request or an answer, and holds for other callers of huggingface_hub too.
"""

import re
import threading
from typing import Any

from engine.errors import ModelNotFound

__all__ = ["guard_headers"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")   # of a file in the cache's blobs, of a folder in its snapshots
_lock = threading.Lock()


def guard_headers() -> None:
    """Have answers looked at; cheap where it is so already. Clients that huggingface_hub makes anew are guarded as well."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    with _lock:
        if not _is_guarded(get_session()):
            _guard_new_clients()
        assert _is_guarded(get_session())


def refuse_astray(response: Any, *arguments: Any, **options: Any) -> None:
    """Raise ModelNotFound if this answer states a name that is no plain file name. The hook of both HTTP libraries."""
    if response.request.method != "HEAD":
        return
    headers = response.headers
    stated = {"X-Repo-Commit": headers.get("X-Repo-Commit")}                 # used even of a refusal
    if response.status_code < 400:
        stated["X-Linked-ETag"] = headers.get("X-Linked-ETag")
        if not headers.get("X-Linked-ETag"):
            stated["ETag"] = headers.get("ETag")
    for header, value in stated.items():
        # taken apart as huggingface_hub does it, which strips any number of W and /
        if value and not NAME.fullmatch(value.lstrip("W/").strip('"') if header != "X-Repo-Commit" else value):
            raise ModelNotFound(
                f"the hub states {header} {value[:100]!r}, which is no name of a file: take another hub (HF_ENDPOINT)"
            )


def _hooks(session: Any) -> Any:
    """The hooks on answers of an httpx client (huggingface_hub 1 and later) or a requests session (before)."""
    return session.event_hooks["response"] if hasattr(session, "event_hooks") else session.hooks["response"]


def _is_guarded(session: Any) -> bool:
    return refuse_astray in _hooks(session)


def _guard_new_clients() -> None:
    """Wrap the factory in force, which may be a caller's own; huggingface_hub closes its client and makes another one."""
    import huggingface_hub
    from huggingface_hub.utils import _http

    is_httpx = hasattr(huggingface_hub, "set_client_factory")
    make: Any = getattr(_http, "_GLOBAL_CLIENT_FACTORY" if is_httpx else "_GLOBAL_BACKEND_FACTORY")

    def guarded() -> Any:
        session = make()
        _hooks(session).append(refuse_astray)
        return session

    if is_httpx:
        huggingface_hub.set_client_factory(guarded)
    else:
        huggingface_hub.configure_http_backend(backend_factory=guarded)
