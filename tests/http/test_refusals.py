"""A bad request is a 4xx in OpenAI's shape that names the field, never a 500, and the engine stays alive."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http.support import PATIENCE_S, ThreadServer, serving

X = [{"role": "user", "content": "x"}]
DEEP = "[" * 100_000
NAN, INF, HUGE = b"NaN", b"-Infinity", b"1" + b"0" * 5000


def check(answer: httpx.Response, status: int, field: str | None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == field, error
    assert len(error["message"]) > 10
    assert "Traceback" not in answer.text
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["content-type"] == "application/json"
    return dict(error)


COMMON: list[tuple[dict[str, Any], str]] = [
    ({"n": 10**9}, "n"), ({"n": 0}, "n"), ({"n": -1}, "n"), ({"n": 2**70}, "n"), ({"n": "2"}, "n"), ({"n": 1.5}, "n"),
    ({"n": True}, "n"), ({"n": {}}, "n"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": 1e9}, "temperature"), ({"temperature": "0"}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_k": -2}, "top_k"), ({"top_k": 2**40}, "top_k"),
    ({"min_p": 2}, "min_p"), ({"seed": 2**64}, "seed"), ({"seed": "a"}, "seed"),
    ({"stop": 1}, "stop"), ({"stop": [1]}, "stop"), ({"stop": [""]}, "stop"), ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "x" * 300}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 2**31}, "max_tokens"), ({"max_tokens": "9"}, "max_tokens"),
    ({"frequency_penalty": 3}, "frequency_penalty"), ({"presence_penalty": -3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias"), ({"logit_bias": {"5": 101}}, "logit_bias"), ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"), ({"logit_bias": {"5": "x"}}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"session_id": ""}, "session_id"), ({"session_id": "x" * 257}, "session_id"), ({"cache_salt": 5}, "cache_salt"),
    ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats"),
    ({"ignore_eos": 1}, "ignore_eos"), ({"model": 5}, "model"),
    # not supported, so refused by name
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"), ({"function_call": {"name": "f"}}, "function_call"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"), ({"regex": "a"}, "regex"), ({"ebnf": "a"}, "ebnf"),
    ({"grammar": "a"}, "grammar"), ({"json_schema": "{}"}, "json_schema"), ({"bad_words": ["x"]}, "bad_words"),
    ({"allowed_token_ids": [5]}, "allowed_token_ids"), ({"separate_reasoning": False}, "separate_reasoning"),
    ({"modalities": ["text", "audio"]}, "modalities"), ({"audio": {"voice": "x"}}, "audio"), ({"best_of": 5}, "best_of"),
    ({"min_tokens": 5}, "min_tokens"), ({"chat_template": "{{ 1 }}"}, "chat_template"), ({"thinking": False}, "thinking"),
    ({"use_beam_search": True}, "use_beam_search"), ({"reasoning_effort": "enormous"}, "reasoning_effort"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"), ({"logits_processors": ["x"]}, "logits_processors"),
    ({"n_predict": 5}, "n_predict"), ({"temprature": 2}, "temprature"), ({"max_token": 5}, "max_token"),
    # what an answer must look like
    ({"response_format": "json"}, "response_format"), ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format.json_schema.schema"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["x"] * 1025}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"guided_choice": [1]}, "guided_choice"), ({"guided_regex": 5}, "guided_regex"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
]  # fmt: skip
CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"), ({"messages": "x"}, "messages"), ({"messages": None}, "messages"),
    ({"messages": ["x"]}, "messages[0]"), ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [*X, {"role": "emperor", "content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
     "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls"),
    ({"messages": X * 5000}, "messages"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}, "type": "x"}]}]},
     "messages[0].tool_calls[0].type"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]},
     "messages[0].content[0]"),
    ({"tools": "x"}, "tools"), ({"tools": [5]}, "tools"), ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
    ({"tools": [{"function": {"name": ""}}]}, "tools"), ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools"),
    ({"tools": [{"function": {"name": "f"}}] * 2}, "tools[1].function.name"), ({"tool_choice": "perhaps"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"), ({"tool_choice": 5}, "tool_choice"),
    ({"tools": [{"function": {"name": "f"}}], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [{"function": {"name": "f"}}], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"logprobs": 5}, "logprobs"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"), ({"prompt": "x"}, "prompt"), ({"system": "x"}, "system"),
    ({"echo": True}, "echo"),
    ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"deadline_s": 1e9}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {f"k{at}": at for at in range(17)}}, "chat_template_kwargs"),
]  # fmt: skip
COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"),
    ({"prompt": 5}, "prompt"), ({"prompt": [True]}, "prompt"), ({"prompt": [1, "x"]}, "prompt"), ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"), ({"prompt": [2**80]}, "prompt"), ({"prompt": [[1], [10**6]]}, "prompt"),
    ({"prompt": ["x"] * 257}, "prompt"), ({"prompt": "x" * 5000}, "prompt"), ({"prompt": "x" * 1_000_000}, "prompt"),
    ({"prompt": ["x", "y" * 5000]}, "prompt"), ({"prompt": {"a": 1}}, "prompt"),
    ({"logprobs": 21}, "logprobs"), ({"logprobs": True}, "logprobs"), ({"suffix": "x"}, "suffix"),
    ({"suffix": "x", "prompt": [1, 2]}, "suffix"), ({"suffix": "x", "echo": True}, "echo"), ({"suffix": 5}, "suffix"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"), ({"messages": X}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "base", "table"),
    [
        ("/v1/chat/completions", {"messages": X}, COMMON + CHAT),
        ("/v1/completions", {"prompt": "x"}, COMMON + COMPLETION),
    ],
    ids=["chat", "completions"],
)
def test_every_bad_field_is_a_400_with_its_name(steered: ThreadServer, path: str, base: Any, table: Any) -> None:
    with httpx.Client(base_url=steered.url, timeout=PATIENCE_S) as client:
        for more, field in table:
            answer = client.post(path, json={**base, **more})
            assert answer.status_code == 400, (more, answer.text[:300])
            named = answer.json()["error"]["param"]
            assert named is not None, (more, answer.text)
            assert named == field or named.startswith((field + "[", field + ".")), (more, named)
            check(answer, 400, named)
        assert client.post(path, json={**base, "max_tokens": 2}).status_code == 200
    assert steered.pages_held() == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_bodies_that_are_no_json_object_are_refused(steered: ThreadServer, path: str) -> None:
    bodies: list[tuple[bytes, str | None]] = [
        (b"", None), (b"x", None), (b"[]", None), (b"null", None), (b'"x"', None), (b"{", None), (b"\xff\xfe", None),
        (DEEP.encode(), None), (b'{"messages":' + DEEP.encode(), None), (b'{"a":' * 50_000, None),
        (b'{"temperature": ' + NAN + b"}", "temperature"), (b'{"top_p": ' + INF + b"}", "top_p"),
        (b'{"n": ' + HUGE + b"}", "n"), (b'{"temperature": 1e999}', "temperature"), (b'{"user": "\\ud83d"}', None),
        (b'{"prompt": "\xff"}', None), (b'{"messages": [], "\\ud800": ' + NAN + b"}", "?"),
        (b'{"prompt": "x", "messages": [], "prompt": "\x00"}', None),
    ]  # fmt: skip
    with httpx.Client(base_url=steered.url, timeout=PATIENCE_S) as client:
        for body, field in bodies:
            check(client.post(path, content=body), 400, field)
        missing = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}[path]
        check(client.post(path, content=b"{}"), 400, missing)
        assert client.get("/ready").status_code == 200


def test_unknown_addresses_and_methods_have_the_same_shape(steered: ThreadServer) -> None:
    with httpx.Client(base_url=steered.url) as client:
        check(client.get("/nothing"), 404, None)
        check(client.get("/v1/models/nothing/here"), 404, "model")
        check(client.post("/v1/nothing", json={}), 404, None)
        refused = client.get("/v1/chat/completions")
        check(refused, 405, None)
        assert "POST" in refused.headers["allow"]
        assert client.options("/v1/chat/completions").status_code == 200
        assert client.head("/health").status_code == 200


def test_prompts_and_keys_are_not_logged(steered: ThreadServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    secret = "my-most-private-words"
    with httpx.Client(base_url=steered.url, headers={"Authorization": f"Bearer {secret}"}) as client:
        client.post(f"/v1/completions?q={secret}", json={"prompt": secret, "max_tokens": 1, "echo": True})
        client.post("/v1/completions", json={"prompt": secret, "n": 10**9})
        client.post("/v1/chat/completions", json={"messages": [{"role": secret, "content": secret}]})
    own = [record.getMessage() for record in caplog.records if record.name.startswith("rillet")]
    assert any("/v1/completions" in line for line in own)
    assert not any(secret in line for line in own)


def test_health_lives_and_ready_waits_while_the_model_loads(roomy_path: Path) -> None:
    from tests.http.support import Steered

    backend = Steered()
    backend.load_gate.clear()
    with serving(roomy_path, backend=backend, wait=False) as server, httpx.Client(base_url=server.url) as client:
        assert backend.reported.wait(PATIENCE_S)
        assert client.get("/health").status_code == 200
        ready = client.get("/ready")
        assert ready.status_code == 503
        assert ready.json() == {"status": "loading", "what": "reading the tiny weights", "done": 1, "total": 2}
        for answer in (client.post("/v1/completions", json={"prompt": "x"}), client.get("/v1/models")):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "loading"
            assert int(answer.headers["retry-after"]) >= 1
            assert "x-should-retry" not in answer.headers
        backend.load_gate.set()
        server.call(server.app.host.wait_settled())
        assert client.get("/ready").json() == {"status": "ready"}
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_model_that_cannot_load_is_told_everywhere(roomy_path: Path) -> None:
    from engine import OutOfDeviceMemory
    from tests.http.support import Steered

    backend = Steered()
    backend.load_fault = OutOfDeviceMemory("weights need 9 GB, the device has 8: take a smaller model")
    with serving(roomy_path, backend=backend) as server, httpx.Client(base_url=server.url) as client:
        for path in ("/ready", "/health"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert "take a smaller model" in json.dumps(answer.json())
        check(client.post("/v1/completions", json={"prompt": "x"}), 503, None)


def test_a_loading_server_can_be_ended(roomy_path: Path) -> None:
    from tests.http.support import Steered

    backend = Steered()
    backend.load_gate.clear()
    with serving(roomy_path, backend=backend, wait=False):
        assert backend.reported.wait(PATIENCE_S)
