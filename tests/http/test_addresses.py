"""Addresses that are nearly right, and those of other servers' APIs: what is said there. And what is written to the log."""

import logging
from collections.abc import Iterator

import httpx
import ollama
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI

from tests.http.support import PATIENCE_S, ThreadServer, connected, eventually, post_bytes, read_until


@pytest.fixture
def client(steered: ThreadServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=steered.url, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def editor(steered: ThreadServer) -> Iterator[ollama.Client]:
    client = ollama.Client(steered.url, timeout=PATIENCE_S)
    with client._client:                                 # it leaves its connections open otherwise
        yield client


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"), ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"), ("/v1//chat/completions", "/v1/chat/completions"),
        ("/completions", "/v1/completions"), ("/models", "/v1/models"), ("/v1/models/", "/v1/models"),
        ("/openai/v1/responses", "/v1/responses"), ("/messages", "/v1/messages"), ("/v1/health", "/health"),
        ("/v1/api/chat", "/api/chat"), ("/health/", "/health"), ("/embeddings", "/v1/embeddings"),
    ],
)  # fmt: skip
def test_an_address_that_is_nearly_right_tells_the_right_one(client: httpx.Client, path: str, meant: str) -> None:
    answer = client.post(path, json={})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].endswith(f"did you mean {meant}?")
    assert answer.json()["error"]["code"] == "unknown_url"


def test_an_answer_that_comes_before_the_body_says_that_the_connection_ends(steered: ThreadServer) -> None:
    for path, status in ((b"/api/pull", b" 501 "), (b"/nothing", b" 404 ")):
        with connected(steered.port) as raw:
            raw.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
            head = read_until(raw, b"}")
            assert status in head
            assert b"connection: close" in head.lower()
        with connected(steered.port) as raw:             # whole, it goes on
            raw.sendall(post_bytes(path.decode(), b"{}"))
            assert status in read_until(raw, b"}")
            raw.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in read_until(raw, b"}")


def test_other_addresses_are_simply_unknown(client: httpx.Client) -> None:
    for path in ("/nothing", "/v1/nothing", "/v1/chat", "/v1/", "/%3Cscript%3E", "/" + "a/" * 500):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "did you mean" not in answer.text
        assert "/openapi.json" in answer.text


def test_a_base_url_without_v1_is_told_to_the_openai_client(steered: ThreadServer) -> None:
    with (
        OpenAI(base_url=steered.url, api_key="x", max_retries=0) as client,
        pytest.raises(openai.NotFoundError, match="did you mean /v1/chat/completions"),
    ):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


def test_ollamas_commands_about_models_are_refused_in_words(editor: ollama.Client) -> None:
    for call, word in (
        (lambda: editor.pull("llama3"), "pulled"), (lambda: editor.push("llama3"), "pushed"),
        (lambda: editor.delete("llama3"), "deleted"), (lambda: editor.copy("a", "b"), "copied"),
        (lambda: editor.create("a", from_="b"), "created"),
    ):  # fmt: skip
        with pytest.raises(ollama.ResponseError, match=f"models cannot be {word} over HTTP: .*--m ID") as caught:
            call()
        assert caught.value.status_code == 501
    with pytest.raises(ollama.ResponseError, match="cannot be pulled"):
        list(editor.pull("llama3", stream=True))


def test_ollamas_clients_are_told_what_the_model_is(editor: ollama.Client, steered: ThreadServer) -> None:
    facts = steered.app.host.engine.model_facts
    assert (facts.family, facts.storage, facts.format) == ("llama", "F32", "gguf")
    for details in (editor.show("tiny").details, editor.list().models[0].details, editor.ps().models[0].details):
        assert details is not None
        assert (details.family, details.families, details.format) == ("llama", ["llama"], "gguf")
        assert details.quantization_level == "F32"
        assert details.parameter_size
        assert float(details.parameter_size[:-1]) > 0
        assert details.parameter_size[-1] in "KM"
    shown = editor.show("tiny")
    assert shown.template == steered.app.host.engine.chat_template
    assert "message" in (shown.template or "")
    assert (shown.modelinfo or {})["general.parameter_count"] == facts.weights


def test_anthropics_client_lists_the_model_in_its_own_words(steered: ThreadServer) -> None:
    with Anthropic(base_url=steered.url, api_key="x", max_retries=0, timeout=PATIENCE_S) as client:
        page = client.models.list()
        [model] = list(page)
        assert (model.id, model.type, model.display_name) == ("tiny", "model", "tiny")
        assert model.created_at.year > 2020
        assert (page.has_more, page.first_id, page.last_id) == (False, "tiny", "tiny")
        assert client.models.retrieve("tiny") == model
    with OpenAI(base_url=steered.url + "/v1", api_key="x", max_retries=0) as other:
        assert other.models.list().data[0].owned_by == "rillet"


def test_what_watches_the_server_is_logged_at_debug_only(
    client: httpx.Client, steered: ThreadServer, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("rillet")
    logger.propagate = True
    caplog.set_level("DEBUG", "rillet")
    for path in ("/metrics", "/health", "/ready", "/version"):
        assert client.get(path).status_code == 200
    eventually(lambda: len(steered.app.connections) == 0, "the requests' end")
    levels = {record.getMessage().split()[2].strip('"'): record.levelname for record in caplog.records
              if record.name == "rillet.access"}  # fmt: skip
    assert levels == {"/metrics": "DEBUG", "/health": "DEBUG", "/ready": "DEBUG", "/version": "INFO"}
