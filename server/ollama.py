"""Ollama's API for the editors that speak only that: chat, generate, embed, and what is asked about models.

server.app routes here; server.ollama_protocol has the requests, server.ollama_lines the answers. There is one model, it is
always loaded; nothing that manages models is there.
"""

import asyncio
import time
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from quart import Quart, Response

from engine import EngineClient, InvalidRequest, RequestError
from server.asking import Route
from server.conversing import Conversation
from server.embeddings import Pooling, unit_length
from server.host import EngineHost, parts_of
from server.ollama_lines import AnswerLines, error_bytes, loaded
from server.ollama_protocol import (
    EmbeddingsRequest,
    EmbedRequest,
    GenerateRequest,
    OllamaChatRequest,
    ShowRequest,
    in_own_words,
)
from server.settings import ServerSettings
from server.sse import encode, stream_response

__all__ = ["error_bytes", "owns", "register"]

LINES = "application/x-ndjson"
# Editors refuse servers that tell an older version: this is the one whose API is spoken here. Rillet's own is at /version.
API_VERSION = "0.12.11"
NEVER = "9999-12-31T23:59:59Z"                           # clients show a time that has passed as "stopping"


def owns(path: str) -> bool:
    """Whether what goes wrong at this address is told as Ollama tells it."""
    return path.startswith("/api/")


def register(app: Quart) -> None:
    host, settings = parts_of(app)

    @app.post("/api/chat")
    async def post_ollama_chat() -> Response:
        return await chat(host, settings)

    @app.post("/api/generate")
    async def post_ollama_generate() -> Response:
        return await generate(host, settings)

    @app.post("/api/embed")
    async def post_ollama_embed() -> Response:
        route = Route(host, settings, prefix="embd")
        body = await route.read(EmbedRequest)
        texts: list[str | list[int]] = [body.input] if isinstance(body.input, str) else list(body.input)
        return _json(await _embed(route.engine, texts))

    @app.post("/api/embeddings")
    async def post_ollama_embeddings() -> Response:
        route = Route(host, settings, prefix="embd")
        body = await route.read(EmbeddingsRequest)
        return _json({"embedding": (await _embed(route.engine, [body.prompt]))["embeddings"][0]})

    @app.get("/api/tags")
    async def get_ollama_tags() -> Response:
        return _json({"models": [await _model(host)]})

    @app.get("/api/ps")
    async def get_ollama_ps() -> Response:
        model = await _model(host)
        on_device = 0 if host.engine.device.startswith("cpu") else model["size"]
        seen = {"expires_at": NEVER, "size_vram": on_device, "context_length": host.engine.context_length}
        return _json({"models": [model | seen]})

    @app.post("/api/show")
    async def post_ollama_show() -> Response:
        route = Route(host, settings, prefix="show")
        await route.read(ShowRequest)
        return _json(await _show(host))

    @app.get("/api/version")
    async def get_ollama_version() -> Response:
        return _json({"version": API_VERSION})


def _json(value: Any) -> Response:
    return Response(encode(value), content_type="application/json")


async def chat(host: EngineHost, settings: ServerSettings) -> Response:
    began = time.monotonic()
    route = Route(host, settings, prefix="chat")
    body = await route.read(OllamaChatRequest)
    engine = route.engine
    if not body.messages:
        return _json(loaded(_name(engine), chat=True))
    conversation = await _opened(route, body)
    lines = AnswerLines(conversation, engine, _name(engine), chat=True, began=began)
    return await _answer(conversation, lines, body.stream, settings)


async def generate(host: EngineHost, settings: ServerSettings) -> Response:
    began = time.monotonic()
    route = Route(host, settings, prefix="gen")
    body = await route.read(GenerateRequest)
    engine = route.engine
    if not body.prompt and not body.suffix:
        return _json(loaded(_name(engine), chat=False))
    if body.suffix or body.raw or not (engine.has_chat_template or body.system):
        plain = await engine.infill(body.prompt or "", body.suffix) if body.suffix else body.prompt or ""
        try:
            stream = await route.ask(plain, body.params, fields={"grammar": "format"})
        except RequestError as error:
            raise in_own_words(error) from None
        conversation = Conversation(stream, 1, None)
    else:
        conversation = await _opened(route, body)
    lines = AnswerLines(conversation, engine, _name(engine), chat=False, began=began)
    return await _answer(conversation, lines, body.stream, settings)


async def _opened(route: Route, body: OllamaChatRequest | GenerateRequest) -> Conversation:
    if body.think and route.engine.dialect.reasoning is None:
        raise InvalidRequest("think: this model is not known to think: leave it out", field="think")
    request = await asyncio.to_thread(body.chat) if route.large else body.chat()
    try:
        return await Conversation.open(route, request)
    except RequestError as error:
        raise in_own_words(error) from None


async def _answer(
    conversation: Conversation, lines: AnswerLines, stream: bool | None, settings: ServerSettings
) -> Response:  # fmt: skip
    if stream is False:
        return _json(await lines.whole())
    return stream_response(conversation, lines, settings.heartbeat_s, content_type=LINES)


async def _embed(engine: EngineClient, texts: list[str | list[int]]) -> dict[str, Any]:
    began = time.monotonic()
    if not all(texts):
        raise InvalidRequest("input has an empty text: give at least one token", field="input")
    pooled = await Pooling(engine, texts, "mean").run() if texts else []
    return {
        "model": _name(engine),
        "embeddings": [unit_length(vector).tolist() for vector, _ in pooled],
        "total_duration": round((time.monotonic() - began) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": sum(count for _, count in pooled),
    }


def _name(engine: EngineClient) -> str:
    """With a tag, as every name has one there."""
    name = engine.model_name
    return name if ":" in name else f"{name}:latest"


async def _model(host: EngineHost) -> dict[str, Any]:
    engine = host.engine
    name = _name(engine)
    return {
        "name": name,
        "model": name,
        "modified_at": _since(host),
        "size": (await engine.look()).weights_bytes,
        "digest": sha256(name.encode()).hexdigest(),
        "details": _details(engine),
    }


def _since(host: EngineHost) -> datetime:
    return datetime.fromtimestamp(host.created, UTC)


def _details(engine: EngineClient) -> dict[str, Any]:
    facts = engine.model_facts
    return {
        "parent_model": "", "format": facts.format, "family": facts.family, "families": [facts.family],
        "parameter_size": _count(facts.weights), "quantization_level": facts.storage,
    }  # fmt: skip


def _count(weights: int) -> str:
    """134515008 -> 134.52M, as Ollama writes it."""
    for size, unit, digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 2)):
        if weights >= size:
            return f"{weights / size:.{digits}f}{unit}"
    return str(weights)


async def _infills(engine: EngineClient) -> bool:
    try:
        await engine.infill("a", "b")
    except InvalidRequest:                               # its vocabulary has no such tokens
        return False
    return True


async def _show(host: EngineHost) -> dict[str, Any]:
    engine = host.engine
    able = ["completion"]                                # "embedding" is told of models that can nothing else
    if engine.dialect.tools is not None:
        able.append("tools")
    if engine.dialect.reasoning is not None:
        able.append("thinking")
    if await _infills(engine):
        able.append("insert")
    defaults = "\n".join(f"{name} {value:g}" for name, value in engine.sampling_defaults.items())
    facts = engine.model_facts
    return {
        "modelfile": "", "parameters": defaults, "template": engine.chat_template or "", "modified_at": _since(host),
        "details": _details(engine),
        "model_info": {
            "general.architecture": facts.family, "general.basename": engine.model_name,
            "general.parameter_count": facts.weights, f"{facts.family}.context_length": engine.context_length,
        },
        "capabilities": able,
    }  # fmt: skip
