"""Servers as processes: how they start, drain, fail, and which exit code tells it."""

import json
import signal
import socket
import sys
from pathlib import Path

import httpx
import pytest

from server.__main__ import main
from tests.http.support import PATIENCE_S, ProcessServer, connected, eventually, free_port, post_bytes, read_until

STORY = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
MODEL = ("--max-model-len", "1024", "--kv-bytes", "60000000")
posix = pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM for a child there")


@posix
def test_sigterm_lets_streams_end_until_the_deadline_and_exits_with_0(demo_path: Path) -> None:
    arguments = ["-m", "server", "--f", str(demo_path), "--port", "0", *MODEL, "--drain-deadline", "2"]
    with ProcessServer(*arguments) as server:
        url = server.wait_line("Rillet serves").split(" at ")[1].split("/v1 ")[0]
        port = int(url.rsplit(":", 1)[1])
        with connected(port) as running, connected(port) as kept:
            running.sendall(post_bytes("/v1/completions", STORY))
            read_until(running, b'"text":"')
            kept.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in read_until(kept, b"}")
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: httpx.get(url + "/ready").status_code == 503, "draining")
            refused = httpx.post(url + "/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(url + "/health").status_code == 200
            rest = read_until(running, b"[DONE]")
            assert b'"finish_reason":"abort"' in rest
            assert not any(" 1 answers" in line for line in server.err)
            assert b"[DONE]" in rest
        assert server.wait_end() == 0, "".join(server.err)
        assert "Traceback" not in "".join(server.err)


@posix
def test_a_second_interrupt_ends_at_once(demo_path: Path) -> None:
    with ProcessServer("-m", "server", "--f", str(demo_path), "--port", "0", *MODEL) as server:
        url = server.wait_line("Rillet serves").split(" at ")[1].split("/v1 ")[0]
        with connected(int(url.rsplit(":", 1)[1])) as running:
            running.sendall(post_bytes("/v1/completions", STORY))
            read_until(running, b'"text":"')
            server.process.send_signal(signal.SIGINT)
            eventually(lambda: httpx.get(url + "/ready").status_code == 503, "draining")
            server.process.send_signal(signal.SIGINT)
            assert server.wait_end() == 130


def test_a_broken_model_file_is_one_sentence_and_an_exit_code(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with ProcessServer("-m", "server", "--f", str(broken), "--port", "0", "--log-level", "error") as server:
        assert server.wait_end() == 1
        assert ["broken.gguf" in line for line in server.err] == [True], "it is said once"
        assert "Traceback" not in "".join(server.err)
        assert server.out == []


def test_wrong_flags_and_taken_ports_are_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, part in (
        (["--prot", "1"], "--prot"),
        (["--port", "x"], "--port must be a whole number"),
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--drain-deadline", "-1"], "--drain-deadline must be"),
        (["--api-key", "a,,b"], "API key"),
        (["--log-level", "loud"], "--log-level"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert part in error
        assert error.count("\n") == 1
    monkeypatch.setenv("RILLET_PROT", "1")
    assert main([]) == 2
    assert "RILLET_PORT" in capsys.readouterr().err
    monkeypatch.delenv("RILLET_PROT")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("RILLET_PORT", str(taken.getsockname()[1]))
        assert main([]) == 1
        assert "cannot listen on" in capsys.readouterr().err


@posix
def test_hypercorn_serves_server_app_drains_it_and_ends(demo_path: Path) -> None:
    port = free_port()
    arguments = ["-m", "hypercorn", "-c", "python:server.hypercorn_config", "-b", f"127.0.0.1:{port}", "server.app:app"]
    variables = {
        "RILLET_F": str(demo_path), "RILLET_MAX_MODEL_LEN": "1024", "RILLET_KV_BYTES": "60000000", "RILLET_API_KEY": "k1,k2",
        "RILLET_DRAIN_DEADLINE": "2",
    }  # fmt: skip
    with ProcessServer(*arguments, **variables) as server:
        server.wait_line("serving ")
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: httpx.get(url + "/ready").status_code == 200, "the model's loading")
        assert httpx.get(url + "/v1/models").status_code == 401
        with connected(port) as running:
            running.sendall(post_bytes("/v1/completions", STORY, "Authorization: Bearer k2"))
            read_until(running, b'"text":"')
            server.process.send_signal(signal.SIGTERM)
            rest = read_until(running, b"[DONE]")
            assert b'"finish_reason":"abort"' in rest, "hypercorn would have cut it without a word"
        assert server.wait_end() == 0, "".join(server.err)


def test_hypercorn_ends_with_a_code_when_the_model_cannot_load(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    port = free_port()
    arguments = ["-m", "hypercorn", "-c", "python:server.hypercorn_config", "-b", f"127.0.0.1:{port}", "server.app:app"]
    with ProcessServer(*arguments, RILLET_F=str(broken)) as server:
        server.wait_line("broken.gguf")
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x"}, timeout=PATIENCE_S)
        assert answer.status_code == 503
        assert "broken.gguf" in json.dumps(answer.json())
        assert server.wait_end() != 0


def test_an_engine_that_dies_ends_the_process_with_a_sentence_and_a_code() -> None:
    with ProcessServer("-m", "tests.http.dying_server") as server:
        port = int(server.wait_line("Rillet serves").split("/v1 ")[0].rsplit(":", 1)[1])
        with connected(port) as running:
            running.sendall(post_bytes("/v1/completions", STORY))
            assert b"the device burned" in read_until(running, b"[DONE]"), "the stream is told before the process ends"
        assert server.wait_end() == 1
        assert sum("a step failed: RuntimeError: the device burned" in line for line in server.err) == 1


def test_hypercorn_does_not_start_with_a_variable_that_nobody_knows() -> None:
    arguments = ["-m", "hypercorn", "-w", "0", "-b", f"127.0.0.1:{free_port()}", "server.app:app"]
    with ProcessServer(*arguments, RILLET_MAX_SEQS="5") as server:
        assert server.wait_end() != 0
        assert "RILLET_MAX_NUM_SEQS" in "".join(server.err)


def test_importing_the_app_loads_nothing() -> None:
    with ProcessServer("-c", "import server.app, sys; print('numba' in sys.modules)", RILLET_NONSENSE="1") as child:
        assert child.wait_end() == 0
        assert child.out == ["False\n"]
