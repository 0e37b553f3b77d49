"""What went wrong -> status, headers and the body that OpenAI clients expect. One table for the engine's tree and HTTP.

Every route raises; server.app hands the error to `answer`, server.sse to `body` once a stream has begun. A bad request is
never a 500, and no answer carries a prompt or a traceback.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from quart import Response
from werkzeug.exceptions import HTTPException

from engine import (
    BackendError,
    ContextTooLong,
    EngineClosed,
    InvalidRequest,
    ModelError,
    Overloaded,
    RilletError,
    UnknownModel,
)
from server.addresses import NotOffered, UnknownAddress

__all__ = ["ErrorBody", "Kind", "NotReady", "Unauthorized", "answer", "body", "told"]

log = logging.getLogger("rillet.server")
MAX_MESSAGE = 2000


class NotReady(RilletError):
    """The model is loading, draining or lost. `state` is its name; retry_after_s is None where waiting does not help."""

    def __init__(self, message: str, *, state: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.state = state
        self.retry_after_s = retry_after_s


class Unauthorized(RilletError):
    """The request shows no API key, or a wrong one."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a class of errors is told: the retries of OpenAI's clients depend on status and `retry`."""

    status: int
    type: str
    code: str | None
    retry: bool = False


KINDS: tuple[tuple[type[RilletError], Kind], ...] = (
    (Unauthorized, Kind(401, "invalid_request_error", "invalid_api_key")),
    (UnknownAddress, Kind(404, "invalid_request_error", "unknown_url")),
    (NotOffered, Kind(501, "invalid_request_error", "not_offered")),
    (UnknownModel, Kind(404, "invalid_request_error", "model_not_found")),
    (ContextTooLong, Kind(400, "invalid_request_error", "context_length_exceeded")),
    (InvalidRequest, Kind(400, "invalid_request_error", "invalid_value")),
    (Overloaded, Kind(429, "rate_limit_error", "overloaded", retry=True)),
    (NotReady, Kind(503, "service_unavailable_error", "not_ready", retry=True)),
    (EngineClosed, Kind(503, "service_unavailable_error", "engine_closed", retry=True)),
    (BackendError, Kind(503, "service_unavailable_error", "engine_failed")),
    (ModelError, Kind(503, "service_unavailable_error", "model_failed")),
)
HTTP: dict[int, Kind] = {
    400: Kind(400, "invalid_request_error", "bad_request"),
    404: Kind(404, "invalid_request_error", "unknown_url"),
    405: Kind(405, "invalid_request_error", "method_not_allowed"),
    408: Kind(408, "invalid_request_error", "request_timeout", retry=True),
    413: Kind(413, "invalid_request_error", "request_too_large"),
}
INTERNAL = Kind(500, "server_error", "internal_error")


class ErrorDetails(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """OpenAI's."""

    error: ErrorDetails


def _kind(error: Exception) -> Kind:
    if isinstance(error, HTTPException):
        status = error.code or 500
        return HTTP.get(status) or (Kind(status, "invalid_request_error", None) if status < 500 else INTERNAL)
    return next((kind for base, kind in KINDS if isinstance(error, base)), INTERNAL)


def _message(error: Exception, kind: Kind) -> str:
    match error:
        case RilletError() if kind is not INTERNAL:
            return str(error)[:MAX_MESSAGE]
        case HTTPException() if kind is not INTERNAL:
            return MESSAGES.get(kind.status) or error.description or error.name
    return "an error inside the server; it was logged, please report it"


MESSAGES = {
    404: "there is no such address here: GET /openapi.json lists those that there are",
    405: "this address does not take this method: the Allow header lists those that it takes",
    408: "the body did not arrive in time: send it faster, or start with a higher --body-timeout",
    413: "the body is too large: shorten it, or start with a higher --body-limit",
}


def body(error: Exception) -> bytes:
    """The JSON of an error; also the data of an error event."""
    kind, message, param = told(error)
    code = error.state if isinstance(error, NotReady) else kind.code
    return msgspec.json.encode(ErrorBody(ErrorDetails(message, kind.type, param, code)))


def told(error: Exception) -> tuple[Kind, str, str | None]:
    """What a client may know of an error, for APIs that write it in their own way: its kind, message and field."""
    kind = _kind(error)
    param = getattr(error, "field", None)
    return kind, _sayable(_message(error, kind)), param and _sayable(param)


def _sayable(text: str) -> str:
    """A client's own words may come back in a message, and JSON of theirs may hold half a surrogate pair."""
    return text.encode("utf-8", "replace").decode()


def answer(error: Exception, write: Callable[[Exception], bytes] = body) -> Response:
    """The whole response for an error that came before anything was sent. write: what makes its JSON."""
    kind = _kind(error)
    if kind is INTERNAL:
        log.error("a request failed by a fault of the server: %s", type(error).__name__, exc_info=error)
    response = Response(write(error), status=kind.status, content_type="application/json")
    wait_s = getattr(error, "retry_after_s", None)
    if wait_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    if not kind.retry or (isinstance(error, NotReady) and wait_s is None):
        response.headers["x-should-retry"] = "false"
    if kind.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPException):
        for name, value in error.get_headers():
            if name == "Allow":
                response.headers["Allow"] = value
    return response
