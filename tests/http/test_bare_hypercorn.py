"""`hypercorn server.app:app` as the README has it, without our settings for it: one worker in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.http.support import ProcessServer, connected, eventually, free_port, post_bytes, read_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM for a child there")
STORY = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
DRAIN_S = 4.0                                            # beyond the 3 s that hypercorn leaves by itself
MODEL = {"RILLET_MAX_MODEL_LEN": "1024", "RILLET_KV_BYTES": "60000000", "RILLET_DRAIN_DEADLINE": f"{DRAIN_S:g}"}


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    """The children that run the app: the others are multiprocessing's tracker."""
    lines = subprocess.run(["ps", "-e", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in lines.splitlines()]
    return [int(pid) for pid, parent, command in rows if int(parent) == process.pid and "spawn_main" in command]


@pytest.fixture
def bare(demo_path: Path) -> Iterator[tuple[ProcessServer, int]]:
    port = free_port()
    arguments = ["-m", "hypercorn", "server.app:app", "--bind", f"127.0.0.1:{port}"]
    with ProcessServer(*arguments, RILLET_F=str(demo_path), **MODEL) as server:
        try:
            server.wait_line("serving ")
            eventually(lambda: httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200, "the model's loading")
            yield server, port
        finally:                                         # a test that failed must leave none
            for worker in workers_of(server.process):
                os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("whom", ["parent", "all"])
def test_answers_have_the_drain_deadline_whoever_gets_sigterm(bare: tuple[ProcessServer, int], whom: str) -> None:
    server, port = bare
    with connected(port) as running:
        running.sendall(post_bytes("/v1/completions", {**STORY, "n": 4}))
        read_until(running, b'"text":"')
        began = time.monotonic()
        for process in (server.process.pid, *(workers_of(server.process) if whom == "all" else ())):
            os.kill(process, signal.SIGTERM)
        rest = read_until(running, b"[DONE]")
        took = time.monotonic() - began
        assert b"[DONE]" in rest, "it was cut"
        assert b'"finish_reason":"length"' in rest or took > DRAIN_S - 0.5, "it was not given its time"
    assert server.wait_end() == 0, "".join(server.err)
    assert sum("running answers have 4 s" in line for line in server.err) == 1
    assert "Traceback" not in "".join(server.err)


def test_a_worker_that_gets_sigterm_alone_drains_and_another_takes_its_place(bare: tuple[ProcessServer, int]) -> None:
    server, port = bare
    [worker] = workers_of(server.process)
    with connected(port) as running:
        running.sendall(post_bytes("/v1/completions", {**STORY, "max_tokens": 60}))
        read_until(running, b'"text":"')
        os.kill(worker, signal.SIGTERM)
        assert b'"finish_reason":"length"' in read_until(running, b"[DONE]")
    eventually(lambda: workers_of(server.process) not in ([], [worker]), "another worker")
    server.process.terminate()
    server.wait_end()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_start_is_one_sentence_and_a_code(tmp_path: Path, workers: str) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    for variables, sentence in (
        ({"RILLET_MAX_SEQS": "5"}, "RILLET_MAX_NUM_SEQS"),
        ({"RILLET_F": str(tmp_path / "none.gguf"), "RILLET_LOG_LEVEL": "warning"}, "none.gguf"),
        ({"RILLET_F": str(broken), "RILLET_LOG_LEVEL": "warning"}, "broken.gguf"),
    ):
        arguments = ["-m", "hypercorn", "-w", workers, "-b", f"127.0.0.1:{free_port()}", "server.app:app"]
        with ProcessServer(*arguments, **variables) as server:
            code = server.wait_end()
            assert code == 1 or workers == "1", "hypercorn 0.18 forgets the code of its workers"
            said = "".join(server.err)
            assert sum(sentence in line for line in server.err) == 1, said
            assert "Traceback" not in said
