"""`python -m server --workers 2`: a worker that is killed costs only its own clients, and another one takes its place; how
all of them end. Real processes and sockets; the tiny model draws as fast as it can, so that streams run on for minutes."""

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from engine import EngineConfig
from server.__main__ import main
from server.settings import ServerSettings, settings_from_environment, settings_from_flags, variables_of
from tests.http.support import ProcessServer, eventually, read_until
from tests.http.test_workers import SHORT, Workers, children, command, kill, long_streams, rests

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")


class Supervised(Workers):
    """The same, but the workers are our own supervisor's."""

    def workers(self) -> list[int]:
        return [pid for pid in children(self.pid) if "server.worker" in command(pid)]

    def engines(self) -> list[int]:
        return [pid for pid in super().engines() if "server.engine_process" in command(pid)]

    def wait_all_ready(self) -> None:
        """Until two workers are there and each answers: one is asked while the other is stopped."""
        eventually(lambda: len(self.workers()) == 2, "two workers")
        self.wait_ready()
        for pid in self.workers():
            with stopped(pid):
                eventually(self.answers, "the other worker's readiness")

    def answers(self) -> bool:
        """A connection that the stopped worker took first is given up."""
        try:
            return httpx.get(self.url + "/ready", timeout=0.5).status_code == 200
        except httpx.TransportError:
            return False

    def says(self) -> str:
        """An answer to a new request."""
        text = httpx.post(self.url + "/v1/completions", json=SHORT).json()["choices"][0]["text"]
        assert isinstance(text, str)
        return text

    def starter(self) -> int:
        """The worker whose child the engine process is."""
        (engine,) = self.engines()
        (pid,) = [pid for pid in self.workers() if engine in children(pid)]
        return pid


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def supervised(model: Path, runtime: Path, *arguments: str, **variables: str) -> Iterator[Supervised]:
    environ = {"RILLET_BACKEND": "null", "RILLET_DRAIN_DEADLINE": "1", "XDG_RUNTIME_DIR": str(runtime)} | variables
    with ProcessServer("-m", "server", "--f", str(model), "--port", "0", "--workers", "2", *arguments, **environ) as process:
        server = Supervised(process, 0, runtime)
        try:
            server.port = int(process.wait_line("Rillet serves").split("/v1 ")[0].rsplit(":", 1)[1])
            yield server
        finally:
            for pid in [*every_worker(runtime), *server.engines()]:
                kill(pid)


def every_worker(runtime: Path) -> list[int]:
    """The workers of the server with this directory, whoever their parent is: their command names it."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if "server.worker" in (said := command(pid)) and str(runtime) in said]


@linux
def test_a_killed_worker_takes_nobody_with_it_and_is_replaced(roomy_path: Path, tmp_path: Path) -> None:
    """Also the one that started the engine process; and SIGTERM ends them all in good order then."""
    with supervised(roomy_path, tmp_path) as server, ExitStack() as stack:
        engines = server.engines()
        starter = server.starter()
        (other,) = [pid for pid in server.workers() if pid != starter]
        kept: list[socket.socket] = []
        for victim in (other, starter):
            (survivor,) = [pid for pid in server.workers() if pid != victim]
            with stopped(survivor):
                lost = stack.enter_context(long_streams(server, 2))
            with stopped(victim):
                kept = stack.enter_context(long_streams(server, 2))
            kill(victim)
            for rest in rests(lost):
                assert b"[DONE]" not in rest
            assert server.says() == "aaa"
            server.wait_all_ready()
            assert survivor in server.workers()
            assert victim not in server.workers()
            assert server.engines() == engines, "one engine for the old and the new worker"
            for client in kept:
                assert read_until(client, b'"text":"'), "its stream runs on"
        server.process.process.terminate()
        for rest in rests(kept):
            assert b'"finish_reason":"abort"' in rest
            assert b"[DONE]" in rest
        assert server.process.wait_end() == 0, "".join(server.process.err)
        assert not every_worker(tmp_path)
        eventually(lambda: not server.engines(), "the engine process's end")
        (home,) = tmp_path.iterdir()
        eventually(lambda: not list(home.iterdir()), "the end of the runtime directory")
        said = "".join(server.process.err)
        assert said.count("a worker ended by signal 9: another one is started") == 2
        assert "Traceback" not in said


@linux
@pytest.mark.full
def test_an_engine_killed_after_its_starter_is_started_by_another_worker(roomy_path: Path, tmp_path: Path) -> None:
    with supervised(roomy_path, tmp_path) as server:
        (engine,) = server.engines()
        starter = server.starter()
        kill(starter)
        kill(engine)
        eventually(lambda: server.engines() not in ([], [engine]), "another engine process")
        server.wait_all_ready()
        assert starter not in server.workers()
        assert server.says() == "aaa"


@linux
@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_every_worker_and_leaves_no_process(roomy_path: Path, tmp_path: Path, number: int) -> None:
    with supervised(roomy_path, tmp_path) as server, ExitStack() as stack:
        first, second = server.workers()
        clients = []
        for idle in (first, second):
            with stopped(idle):
                clients += stack.enter_context(long_streams(server, 2))
        server.process.process.send_signal(number)
        for rest in rests(clients):
            assert b'"finish_reason":"abort"' in rest
            assert b"[DONE]" in rest
        assert server.process.wait_end() == 0, "".join(server.process.err)
        assert not every_worker(tmp_path)
        eventually(lambda: not server.engines(), "the engine process's end")
        (home,) = tmp_path.iterdir()
        eventually(lambda: not list(home.iterdir()), "the end of the runtime directory")
        assert len(server.process.out) == 1, "the address is told once"
        assert server.process.out[0].endswith(", 2 workers\n")
        assert "Traceback" not in "".join(server.process.err)


@linux
def test_a_killed_supervisor_leaves_no_process(roomy_path: Path, tmp_path: Path) -> None:
    with supervised(roomy_path, tmp_path) as server, long_streams(server, 2) as clients:
        kill(server.pid)
        for rest in rests(clients):
            assert b'"finish_reason":"abort"' in rest, "the workers drain"
        eventually(lambda: not every_worker(tmp_path), "the workers' end")
        eventually(lambda: not server.engines(), "the engine process's end")
        assert "Traceback" not in "".join(server.process.err)


@linux
@pytest.mark.full
def test_a_worker_asked_alone_drains_and_is_replaced(roomy_path: Path, tmp_path: Path) -> None:
    with supervised(roomy_path, tmp_path) as server:
        engines, (first, second) = server.engines(), server.workers()
        with stopped(second), long_streams(server, 2) as clients:
            os.kill(first, signal.SIGTERM)
            for rest in rests(clients):
                assert b'"finish_reason":"abort"' in rest
        eventually(lambda: first not in server.workers() and len(server.workers()) == 2, "another worker")
        assert server.engines() == engines
        assert server.says() == "aaa"


@linux
@pytest.mark.full
def test_workers_that_die_as_fast_as_they_start_end_the_server(roomy_path: Path, tmp_path: Path) -> None:
    with supervised(roomy_path, tmp_path) as server:
        seen: set[int] = set()

        def ended() -> bool:
            if server.process.process.poll() is not None:
                return True
            for pid in server.workers():
                kill(pid)
                seen.add(pid)
            return False

        eventually(ended, "the server's end")
        assert server.process.wait_end() == 3
        assert 5 <= len(seen) <= 10
        assert "rillet: a worker ended 5 times within 10 s of its start, at last by signal 9" in server.process.err[-1]
        eventually(lambda: not server.engines(), "the engine process's end")


@linux
def test_a_model_that_cannot_load_ends_the_server_at_once(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    arguments = ["-m", "server", "--f", str(broken), "--port", "0", "--workers", "2"]
    with ProcessServer(*arguments, XDG_RUNTIME_DIR=str(tmp_path)) as server:
        assert server.wait_end() == 1
        said = "".join(server.err)
        assert "broken.gguf" in said
        assert [line for line in server.err if line.startswith("rillet: ")] == [
            "rillet: the model could not be loaded: the log tells why\n"
        ]
        assert "Traceback" not in said
        assert server.out == []
        assert not every_worker(tmp_path)


@linux
def test_a_runtime_directory_that_cannot_be_made_is_one_sentence(roomy_path: Path, tmp_path: Path) -> None:
    (tmp_path / f"rillet-{os.getuid()}").write_text("in the way")
    arguments = ["-m", "server", "--f", str(roomy_path), "--port", "0", "--workers", "2"]
    with ProcessServer(*arguments, XDG_RUNTIME_DIR=str(tmp_path)) as server:
        assert server.wait_end() == 1
        (said,) = server.err
        assert said.startswith("rillet: the directory ") or "is not a directory of this user alone" in said


@linux
@pytest.mark.full
def test_a_second_interrupt_kills_all_at_once(roomy_path: Path, tmp_path: Path) -> None:
    with supervised(roomy_path, tmp_path, "--drain-deadline", "100") as server, long_streams(server, 2):
        server.process.process.send_signal(signal.SIGINT)
        eventually(lambda: "rillet: ending" in "".join(server.process.err), "draining")
        server.process.process.send_signal(signal.SIGINT)
        assert server.process.wait_end() == 130
        eventually(lambda: not [*every_worker(tmp_path), *server.engines()], "the end of all processes")


def test_windows_is_told_of_hypercorn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.sys.platform", "win32")
    assert main(["--workers", "3"]) == 2
    assert "use `hypercorn -w 3 " in capsys.readouterr().err


def test_workers_must_be_at_least_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workers", "0"]) == 2
    assert "--workers must be from 1 to 256, not 0" in capsys.readouterr().err


def test_variables_make_the_same_settings_as_the_flags_did() -> None:
    said = (
        "owner/name:Q4_K_M --offline -d 1,2 --kv-fraction 0.25 --prefix-cache 0 --isq q4k --dtype float16 --seed 7"
        " --temperature 0 --workers 4 --api-key a,b --cors-origins https://a.example,* --drain-deadline 0.5 --hf-token x"
        " --context-cache"
    )
    for arguments in ([], said.split()):
        config, settings = settings_from_flags(arguments, {}, "test")
        assert settings_from_environment(variables_of(config, settings)) == (config, settings)
    assert variables_of(EngineConfig(seed=7, offline=True), ServerSettings(api_keys=("a", "b")))["RILLET_API_KEY"] == "a,b"
