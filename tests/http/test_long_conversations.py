"""A conversation of a megabyte: while its body is read, rendered and tokenized, others get their answers."""

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import EngineConfig
from tests.http.support import PATIENCE_S, Steered, eventually, serving
from tests.support.tiny_gguf import write_tiny_gguf

MESSAGES: Any = [{"role": ("user", "assistant")[at % 2], "content": f"message {at}: " + "word " * 51} for at in range(3999)]
SIZE = sum(len(message["content"]) for message in MESSAGES)
HEALTH_S = 1.0


@pytest.mark.parametrize("context", [1 << 17, 3 << 19], ids=["too long", "that fits"])
def test_health_answers_while_a_megabyte_of_messages_becomes_tokens(tmp_path: Path, context: int) -> None:
    assert SIZE > 1_000_000
    path = write_tiny_gguf(tmp_path / "tiny.gguf", context=context)
    config = EngineConfig(served_model_name="tiny", max_model_len=context)
    with serving(path, backend=Steered(pages=context // 32 + 64), config=config) as server:
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {"messages": MESSAGES, "max_tokens": 1}
            answers.append(httpx.post(server.url + "/v1/chat/completions", json=body, timeout=PATIENCE_S))

        asking = threading.Thread(target=ask)
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
            client.get("/health")
            began = time.monotonic()
            asking.start()
            waits = []
            while not answers:
                asked = time.monotonic()
                assert client.get("/health").status_code == 200
                waits.append(time.monotonic() - asked)
        took = time.monotonic() - began
        asking.join(PATIENCE_S)
        if context < SIZE:
            assert answers[0].json()["error"]["code"] == "context_length_exceeded"
        else:
            assert answers[0].json()["usage"]["prompt_tokens"] > SIZE // 3
        assert len(waits) > 3, f"nobody asked while it took {took:.1f} s"
        assert max(waits) < HEALTH_S
        eventually(lambda: server.pages_held() == 0, "the pages' return")
