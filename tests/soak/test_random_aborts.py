"""A thousand requests to a real server, left at a random moment or read to their end: afterwards nothing is left of them."""

import asyncio
import random
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine import EngineConfig
from tests.http.support import PATIENCE_S, Steered, ThreadServer, connected, eventually, post_bytes, serving
from tests.support.tiny_gguf import write_tiny_gguf

REQUESTS = 1000
CLIENTS = 8


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir()) if sys.platform == "linux" else 0


async def tasks() -> int:
    return len(asyncio.all_tasks())


def one(server: ThreadServer, number: int) -> str:
    rng = random.Random(number)
    wishes = {
        "stream": rng.random() < 0.8, "max_tokens": rng.choice([1, 20, 400]), "n": rng.choice([1, 1, 3]), "seed": number,
        "ignore_eos": True, "prompt": "x" * rng.randint(1, 200), "temperature": rng.choice([0, 1]),
    }  # fmt: skip
    request = post_bytes("/v1/completions", wishes, "Connection: close")
    with connected(server.port) as client:
        end = rng.choice(["whole", "whole", "some", "none", "half a request", "half closed", "reset"])
        if end == "half a request":
            client.sendall(request[: rng.randrange(len(request))])
            return "left"
        client.sendall(request)
        match end:
            case "none":
                return "left"
            case "some":
                client.recv(rng.randint(1, 2000))
                return "left"
            case "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return "left"
            case "half closed":
                client.shutdown(socket.SHUT_WR)
        answer = b""
        while data := client.recv(1 << 16):
            answer += data
        return answer[9:12].decode() or "left"


@pytest.fixture(scope="module")
def server_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("soak") / "tiny.gguf", context=4096)


def test_a_thousand_requests_with_random_ends_leave_no_page_task_or_descriptor(server_path: Path) -> None:
    config = EngineConfig(served_model_name="tiny", max_model_len=4096)
    with serving(server_path, backend=Steered(pages=130, max_num_seqs=8), config=config) as server:
        assert one(server, 1) == one(server, 1)
        eventually(lambda: len(server.app.connections) == 0, "a quiet server")
        before = descriptors(), server.call(tasks())
        with ThreadPoolExecutor(CLIENTS) as pool:
            ends = list(pool.map(lambda number: one(server, number), range(REQUESTS), timeout=5 * PATIENCE_S))
        assert ends.count("200") > REQUESTS // 5
        assert {end for end in ends if end != "left"} <= {"200", "429"}
        eventually(lambda: len(server.app.connections) == 0 and server.pages_held() == 0, "the end of every request")
        eventually(lambda: descriptors() <= before[0] and server.call(tasks()) <= before[1], "the end of tasks and sockets")
        engine = server.app.host.engine
        statistics = engine.statistics()
        assert statistics.num_requests_running == statistics.num_requests_waiting == 0
        assert statistics.metrics.audit_failures == 0
        assert "abort" in statistics.metrics.request_success
