"""What can be asked about the server: /health, /ready, /version, /v1/models. Routed to by server.app; changes nothing.

/health says whether the process should live (200 while loading), /ready whether it should get requests.
"""

from datetime import UTC, datetime
from typing import Any

from msgspec import UNSET, Struct, UnsetType
from quart import Quart, Response, request

from engine import __version__
from server.host import EngineHost, parts_of
from server.responses import AnthropicModelCard, AnthropicModelList, ModelCard, ModelList
from server.sse import encode

__all__ = ["ServerState", "Version", "register"]


class ServerState(Struct):
    """status: loading, ready, draining or failed; while loading what is done, and how much of it."""

    status: str
    what: str | UnsetType = UNSET
    done: int | UnsetType = UNSET
    total: int | UnsetType = UNSET
    error: str | UnsetType = UNSET                       # why it failed


class Version(Struct):
    version: str


def register(app: Quart) -> None:
    host, _ = parts_of(app)

    @app.get("/v1/models")
    async def get_models() -> Response:
        return models(host)

    @app.get("/v1/models/<path:name>")
    async def get_model(name: str) -> Response:
        return model(host, name)

    @app.get("/health")
    async def get_health() -> Response:
        return health(host)

    @app.get("/ready")
    async def get_ready() -> Response:
        return ready(host)

    @app.get("/version")
    async def get_version() -> Response:
        return version()


def _json(value: Any, status: int = 200) -> Response:
    return Response(encode(value), status=status, content_type="application/json")


def _state(host: EngineHost) -> ServerState:
    state = ServerState(host.state)
    match host.state:
        case "loading":
            state.what, state.done, state.total = host.loading.what, host.loading.done, host.loading.total
        case "failed":
            state.error = str(host.failure)
    return state


def health(host: EngineHost) -> Response:
    """200 while alive, also while loading and draining; 503 when loading failed or the engine is dead."""
    return _json(_state(host), 503 if host.failure is not None else 200)


def ready(host: EngineHost) -> Response:
    """200 when requests are taken; else 503 with what is going on."""
    response = _json(_state(host), 200 if host.state == "ready" else 503)
    if host.state == "loading":
        response.headers["Retry-After"] = "1"
    return response


def version() -> Response:
    return _json(Version(__version__))


def models(host: EngineHost) -> Response:
    if _asked_by_anthropic():
        card = _anthropic_card(host)
        return _json(AnthropicModelList([card], first_id=card.id, last_id=card.id))
    return _json(ModelList([_card(host)]))


def model(host: EngineHost, name: str) -> Response:
    """Any of the names by which requests may call the model; UnknownModel for others."""
    host.engine.check_model(name)
    return _json(_anthropic_card(host) if _asked_by_anthropic() else _card(host))


def _asked_by_anthropic() -> bool:
    return "anthropic-version" in request.headers


def _anthropic_card(host: EngineHost) -> AnthropicModelCard:
    name = host.engine.model_name
    since = datetime.fromtimestamp(host.created, UTC).isoformat().replace("+00:00", "Z")
    return AnthropicModelCard(name, display_name=name, created_at=since)


def _card(host: EngineHost) -> ModelCard:
    engine = host.engine
    return ModelCard(engine.model_name, host.created, engine.context_length)
