"""Ollama's own client against a real hypercorn: what an editor that speaks only Ollama sees."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import ollama
import pytest

from engine import EngineConfig
from engine.weights.checkpoint import open_checkpoint
from server.decoding import decode
from server.ollama_protocol import OllamaChatRequest
from server.settings import ServerSettings
from tests.http.support import PATIENCE_S, Scripted, ThreadServer, serving
from tests.http.test_tools import ONE, SCHEMA, TEMPLATE, THOUGHT, TWO, WEATHER, say
from tests.support.tiny_gguf import SPECIAL, tiny_vocabulary, write_tiny_gguf

HELLO: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    path = write_tiny_gguf(
        tmp_path_factory.mktemp("ollama") / "tiny.gguf", context=4096, metadata={"tokenizer.chat_template": TEMPLATE}
    )
    with serving(path, backend=Scripted()) as server:
        yield server


@contextlib.contextmanager
def opened(url: str, **more: Any) -> Iterator[ollama.Client]:
    client = ollama.Client(host=url, timeout=PATIENCE_S, **more)
    with client._client:                                 # it leaves its connections open otherwise
        yield client


@pytest.fixture(scope="module")
def client(server: ThreadServer) -> Iterator[ollama.Client]:
    with opened(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def demo(demo_url: str) -> Iterator[ollama.Client]:
    with opened(demo_url) as client:
        yield client


def test_a_chat_is_answered_whole_and_in_pieces(demo: ollama.Client) -> None:
    asked: Any = {"model": "demo:latest", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    asked["options"] = {"temperature": 0, "num_predict": 20, "num_ctx": 4096}
    whole = demo.chat(**asked)
    assert "Paris" in (whole.message.content or "")
    assert whole.done
    assert whole.done_reason in ("stop", "length")
    assert whole.prompt_eval_count
    assert whole.eval_count
    assert whole.total_duration is not None
    assert whole.total_duration >= (whole.eval_duration or 0) > 0
    pieces = list(demo.chat(**asked, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].eval_count == whole.eval_count


def test_a_prompt_is_answered_and_a_raw_one_is_continued(demo: ollama.Client) -> None:
    options = {"temperature": 0, "num_predict": 12}
    templated = demo.generate("default", "What is the capital of France?", system="Be brief.", options=options)
    assert "Paris" in templated.response
    raw = demo.generate("default", "The capital of France is", raw=True, options=options)
    assert raw.prompt_eval_count == 5
    pieces = list(demo.generate("default", "The capital of France is", raw=True, options=options, stream=True))
    assert "".join(piece.response for piece in pieces) == raw.response
    assert demo.generate("default", "").done_reason == "load"
    assert demo.chat("default", []).done_reason == "load"


def test_a_schema_is_kept_to(demo: ollama.Client) -> None:
    asked: Any = [{"role": "user", "content": "Name a city."}]
    answer = demo.chat("default", asked, format=SCHEMA, options={"num_predict": 200, "seed": 3})
    jsonschema.validate(json.loads(answer.message.content or ""), SCHEMA)
    assert isinstance(json.loads(demo.generate("default", "A JSON object:", raw=True, format="json").response), dict)


def test_vectors_have_length_one_and_do_not_depend_on_company(demo: ollama.Client) -> None:
    both = demo.embed("default", ["a text", "another one"])
    assert sum(number**2 for number in both.embeddings[0]) == pytest.approx(1, abs=1e-4)
    assert both.prompt_eval_count == 4
    assert list(demo.embed("default", "another one").embeddings[0]) == list(both.embeddings[1])
    assert list(demo.embeddings("default", "a text").embedding) == list(both.embeddings[0])


def test_the_model_is_told(demo: ollama.Client, client: ollama.Client) -> None:
    [model] = demo.list().models
    assert model.model == "org/demo:latest"
    assert model.size
    assert model.size > 9e7
    assert demo.ps().models[0].model == model.model
    shown = client.show("tiny")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert (shown.modelinfo or {})["llama.context_length"] == 4096
    assert "tools" not in (demo.show("demo").capabilities or [])


def test_calls_and_thoughts_are_told_apart_from_words(server: ThreadServer, client: ollama.Client) -> None:
    say(server, THOUGHT + "Let me look.\n" + TWO)
    whole = client.chat("tiny", HELLO, tools=[WEATHER], think=True).message
    assert whole.thinking == "Paris is far."
    assert (whole.content or "").strip() == "Let me look."
    calls = whole.tool_calls or []
    assert (calls[0].function.name, calls[0].function.arguments) == ("weather", {"city": "Par\u2028is 🙂"})
    pieces = [piece.message for piece in client.chat("tiny", HELLO, tools=[WEATHER], stream=True)]
    assert "".join(piece.thinking or "" for piece in pieces) == whole.thinking
    assert [call for piece in pieces for call in piece.tool_calls or []] == calls
    say(server, "Rain.")
    history: Any = [*HELLO, whole, {"role": "tool", "tool_name": "weather", "content": "rain"}]
    assert client.chat("tiny", history, tools=[WEATHER]).message.content == "Rain."


def test_a_line_is_one_line_and_a_failure_is_told_in_one(server: ThreadServer) -> None:
    say(server, ONE)
    answer = httpx.post(server.url + "/api/chat", json={"model": "tiny", "messages": HELLO})
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert all(isinstance(json.loads(line), dict) for line in answer.text.splitlines())
    server.backend.fault = None


@pytest.mark.parametrize(
    ("path", "body", "status", "part"),
    [
        ("chat", {"messages": HELLO, "format": "xml"}, 400, "format"),
        ("chat", {"messages": HELLO, "options": {"mirostat": 2}}, 400, "mirostat"),
        ("chat", {"messages": HELLO, "options": {"temperature": -1}}, 400, "options.temperature must be"),
        ("chat", {"messages": HELLO, "options": {"repeat_penalty": 1000}}, 400, "options.repeat_penalty must be"),
        ("chat", {"messages": HELLO, "options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, 400, "options.repeat_last_n"),
        ("chat", {"messages": HELLO, "options": {"presence_penalty": 1, "repeat_last_n": 64}}, 400, "options.repeat_last_n"),
        ("chat", {"messages": HELLO, "options": {"num_predict": 2**40}}, 400, "options.num_predict must be"),
        ("chat", {"messages": HELLO, "options": {"stop": ["x" * 999]}}, 400, "options.stop"),
        ("chat", {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs"),
        ("chat", {"options": {"seed": -(2**70)}}, 400, "options.seed must be"),
        ("generate", {"prompt": "x", "raw": True, "system": "y"}, 400, "system"),
        ("generate", {"prompt": "x", "raw": True, "options": {"min_p": 2}}, 400, "options.min_p must be"),
        ("embed", {"input": ["x"] * 2049}, 400, "input"),
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "images"),
        ("chat", {"messages": HELLO, "think": "much"}, 400, "think"),
        ("chat", {"messages": HELLO, "model": "gpt-4"}, 404, "gpt-4"),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, 400, "template"),
        ("generate", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("generate", {"prompt": 3}, 400, "prompt"),
        ("embed", {"input": ""}, 400, "input"),
        ("pull", {"model": "x"}, 501, "cannot be pulled"), ("nothing", {"model": "x"}, 404, "address"),
    ],
)
def test_what_cannot_be_done_is_refused_in_ollamas_words(
    server: ThreadServer, path: str, body: dict[str, Any], status: int, part: str
) -> None:
    answer = httpx.post(f"{server.url}/api/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert part in answer.json()["error"]


@pytest.mark.parametrize(("served", "asked"), [("tiny", "tiny:latest"), ("tiny:latest", "tiny"), ("a:b", "a:b")])
def test_the_name_that_is_told_is_taken_at_every_address(roomy_path: Path, served: str, asked: str) -> None:
    """Editors look for models here and then ask at OpenAI's addresses."""
    config = EngineConfig(served_model_name=served, max_model_len=256)
    with serving(roomy_path, config=config) as server, opened(server.url) as client:
        [model] = client.list().models
        for name in (model.model or "", asked):
            assert client.generate(name, "x", options={"num_predict": 1}).eval_count == 1
            body = {"model": name, "messages": HELLO, "max_tokens": 1}
            assert httpx.post(server.url + "/v1/chat/completions", json=body).status_code == 200
        with pytest.raises(ollama.ResponseError, match="not served here"):
            client.show("other:latest")


def test_logprobs_are_told_whole_and_in_pieces(demo: ollama.Client) -> None:
    asked: Any = {"model": "demo", "prompt": "The capital of France is", "raw": True, "logprobs": True, "top_logprobs": 2}
    asked["options"] = {"temperature": 0, "num_predict": 3}
    whole = demo.generate(**asked)
    scores = whole.logprobs or []
    assert "".join(score.token for score in scores) == whole.response
    assert all(score.logprob == max(one.logprob for one in score.top_logprobs or []) for score in scores)
    pieces = [piece for one in demo.generate(**asked, stream=True) for piece in one.logprobs or []]
    assert pieces == scores


def test_options_that_mean_nothing_special_change_nothing(demo: ollama.Client) -> None:
    def say(**options: Any) -> str:
        usual = {"temperature": 0, "num_predict": 6}
        return demo.generate("demo", "The capital of France is", raw=True, options=usual | options).response

    plain = say()
    assert say(repeat_penalty=3.0, presence_penalty=2.0, repeat_last_n=0) == plain
    assert say(num_ctx=77, num_thread=1, low_vram=True, typical_p=1, mirostat=0) == plain
    assert len({say(temperature=2, seed=-1, num_predict=16) for _ in range(3)}) > 1
    assert len({say(temperature=2, seed=5, num_predict=16) for _ in range(3)}) == 1


def test_results_answer_the_calls_of_the_turn_before_them() -> None:
    def call(name: str, **more: Any) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": {"city": "x"}}, **more}

    def result(**more: Any) -> dict[str, Any]:
        return {"role": "tool", "content": "rain", **more}

    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call("weather"), call("clock"), call("weather", id="mine")]},
        result(tool_name="weather"), result(tool_name="weather"), result(),
        {"role": "assistant", "tool_calls": [call("clock"), call("weather", id="other")]},
        result(tool_call_id="other"), result(), result(tool_name="nobody"),
    ]  # fmt: skip
    chat = decode(json.dumps({"messages": messages}).encode(), OllamaChatRequest).chat()
    told = [(message.tool_call_id, message.name) for message in chat.messages if message.role == "tool"]
    assert told == [
        ("call_1", "weather"), ("mine", "weather"), ("call_2", "clock"), ("other", "weather"), ("call_4", "clock"),
        (None, "nobody"),
    ]  # fmt: skip


def test_a_model_that_does_not_think_says_so(demo: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="think") as refused:
        demo.chat("demo", HELLO, think=True)
    assert refused.value.status_code == 400
    assert demo.chat("demo", HELLO, think=False, options={"num_predict": 1}).done


def test_a_silent_stream_is_kept_alive_by_what_no_client_sees(roomy_path: Path) -> None:
    with serving(roomy_path, ServerSettings(heartbeat_s=0.05)) as server:
        server.backend.gate.clear()
        body = {"prompt": "x", "raw": True, "options": {"num_predict": 2}}
        with httpx.stream("POST", server.url + "/api/generate", json=body, timeout=PATIENCE_S) as answer:
            chunks = answer.iter_bytes()
            assert next(chunks).strip() == b""
            server.backend.gate.set()
            lines = b"".join(chunks).splitlines()
        assert "".join(json.loads(line)["response"] for line in lines) == "aa"
        assert json.loads(lines[-1])["done_reason"] == "length"


def test_a_gap_is_filled_with_the_vocabularys_own_tokens(tmp_path: Path) -> None:
    words = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    vocabulary = [*tiny_vocabulary(), *words]
    kinds = [3 if token in (*SPECIAL, *words) else 1 for token in vocabulary]
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf", vocabulary=vocabulary, metadata={"tokenizer.ggml.token_type": kinds}
    )
    ids = open_checkpoint(path).tokenizer.encode("<fim_prefix>def f():\n<fim_suffix>\nprint(f())<fim_middle>")
    config = EngineConfig(served_model_name="tiny", max_model_len=512)
    with serving(path, backend=Scripted("    return 1\n"), config=config) as server, opened(server.url) as client:
        assert "insert" in (client.show("tiny").capabilities or [])
        answer = client.generate("tiny", "def f():\n", suffix="\nprint(f())")
        assert answer.response == "    return 1\n"
        assert answer.prompt_eval_count == len(ids)


def test_the_key_is_asked_for_in_ollamas_words(roomy_path: Path) -> None:
    with serving(roomy_path, ServerSettings(api_keys=("sesame",))) as server:
        with opened(server.url) as stranger, pytest.raises(ollama.ResponseError, match="API key") as refused:
            stranger.list()
        assert refused.value.status_code == 401
        with opened(server.url, headers={"Authorization": "Bearer sesame"}) as allowed:
            assert allowed.list().models


def test_an_answer_that_fails_midway_ends_with_an_error(roomy_path: Path) -> None:
    with serving(roomy_path) as server:
        told = []
        body = {"prompt": "x", "raw": True}
        with httpx.stream("POST", server.url + "/api/generate", json=body, timeout=PATIENCE_S) as answer:
            for line in answer.iter_lines():
                told.append(json.loads(line))
                server.backend.fault = RuntimeError("the device is gone")
        assert told[0]["response"].startswith("a")
        assert "the device is gone" in told[-1]["error"]
