"""What the engine itself costs: its own tokens per second, the start, the first token, events through a real server.

__main__.py runs these rows by name. The null backend draws without computing, so that only the engine is left.
"""

import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio

from engine.api import Engine
from engine.bench.figures import Figure
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.null_backend import NullBackend
from engine.packing import Plan
from engine.weights.hub import model_path

__all__ = ["core_figures", "free_port", "prompt_figures", "sse_figures", "start_figures", "wait_ready"]

SEQUENCES = 256
NULL_TOKENS = 200
PROMPT_TOKENS = 50
SSE_STREAMS = 64
SSE_TOKENS = 750
START_LIMIT_S = 300.0


# ---- the engine's own cost --------------------------------------------------------------------------------------------


def core_figures(config: EngineConfig) -> Iterator[Figure]:
    """Tokens/s through Engine.stream on one core with a backend that computes nothing, and the time to plan and pack."""
    with _one_core():
        rate, plan_ms = anyio.run(_null_run)
    settings = f"{SEQUENCES} streams x {NULL_TOKENS} tokens, prompt 100, null backend, one core"
    yield Figure("engine alone", rate, "tok/s", settings, ">= 30,000")
    yield Figure("plan + pack", plan_ms, "ms", f"median at {SEQUENCES} rows", "<= 0.6")


async def _null_run() -> tuple[float, float]:
    times: list[float] = []
    config = EngineConfig(max_waiting=10 * SEQUENCES, weight_file=str(model_path(EngineConfig())))
    async with Engine(config, backend=NullBackend(max_num_seqs=SEQUENCES)) as engine:
        scheduler = engine._live.scheduler
        plan = scheduler.plan

        def timed() -> Plan | None:
            began = time.perf_counter()
            planned = plan()
            if planned is not None and len(planned.draws) == SEQUENCES and not planned.prefills:
                times.append(time.perf_counter() - began)
            return planned

        async def one() -> None:
            async with await engine.stream([5] * 100, max_tokens=NULL_TOKENS, ignore_eos=True, temperature=0) as stream:
                async for _ in stream:
                    pass

        best = 0.0
        for measured in (False, True, True):
            scheduler.plan = timed if measured else plan  # type: ignore[method-assign]
            began = time.perf_counter()
            async with anyio.create_task_group() as group:
                for _ in range(SEQUENCES):
                    group.start_soon(one)
            best = max(best, SEQUENCES * NULL_TOKENS / (time.perf_counter() - began))
    return best, statistics.median(times) * 1e3


@contextmanager
def _one_core() -> Iterator[None]:
    if sys.platform == "linux":
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            yield
        finally:
            os.sched_setaffinity(0, cores)
    else:
        yield


# ---- from the command to the first token ----------------------------------------------------------------------------------


def start_figures(config: EngineConfig) -> Iterator[Figure]:
    """`python -m engine.chat` from a pipe: seconds from the start of the process to the first character, and its memory."""
    model = model_path(config)
    size = model.stat().st_size
    with tempfile.TemporaryDirectory() as cache:
        cold, _ = _first_character(model, {"NUMBA_CACHE_DIR": cache})
        yield Figure("first start to first token", cold, "s", "compiling every kernel, empty Numba cache", "<= 15")
        warm, memory = min(_first_character(model, {"NUMBA_CACHE_DIR": cache}) for _ in range(3))
    yield Figure("warm start to first token", warm, "s", "kernels from the cache, best of 3", "<= 3")
    cache_bytes = 64 << 20
    allowed = 1.3 * size + cache_bytes + 300e6
    settings = f"peak of a chat of one turn, file {size / 1e6:.0f} MB, KV cache {cache_bytes / 1e6:.0f} MB"
    yield Figure("resident memory", memory / 1e6, "MB", settings, f"<= {allowed / 1e6:.0f}")


def _first_character(model: Path, variables: dict[str, str]) -> tuple[float, int]:
    """(seconds to the first character of the answer, peak resident bytes)"""
    command = [sys.executable, "-m", "engine.chat", "--f", str(model), "--max-tokens", "16", "--kv-bytes", str(64 << 20)]
    began = time.perf_counter()
    with subprocess.Popen(  # noqa: S603 (our own module)
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | variables
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"How are you?\n")
        child.stdin.close()
        if not child.stdout.read(1):
            raise ConfigError(f"{' '.join(command)} gave no answer: run it by hand to see why")
        seconds = time.perf_counter() - began
        child.stdout.read()
        return seconds, _end(child)


def _end(child: "subprocess.Popen[bytes]") -> int:
    """Wait for the end; the peak of its resident bytes, 0 where the system does not tell."""
    if sys.platform == "win32":
        child.wait()
        return 0
    else:  # noqa: RET505 (mypy knows platforms by this form only)
        _, _, usage = os.wait4(child.pid, 0)
        child.returncode = 0
        return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


# ---- one stream on the real backend ---------------------------------------------------------------------------------------


def prompt_figures(config: EngineConfig) -> Iterator[Figure]:
    """First token of a short prompt that is not in the cache."""
    seconds = anyio.run(_first_token, config)
    yield Figure("first token", seconds * 1e3, "ms", f"prompt of {PROMPT_TOKENS} tokens, best of 5, warm engine", "<= 300")


async def _first_token(config: EngineConfig) -> float:
    best = float("inf")
    async with Engine(config) as engine:
        for turn in range(6):
            prompt = [100 + (turn * 977 + i * 31) % 20000 for i in range(PROMPT_TOKENS)]
            began = time.perf_counter()
            async with await engine.stream(prompt, max_tokens=8, temperature=0, ignore_eos=True) as stream:
                async for _ in stream:
                    break
            best = min(best, time.perf_counter() - began)
    return best


# ---- events through a real server -----------------------------------------------------------------------------------------


def sse_figures(config: EngineConfig) -> Iterator[Figure]:
    """Events/s that a real hypercorn sends while the null backend draws; the client only counts."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--backend", "null", "--f", str(model_path(config)), "--port", str(port)]
    with subprocess.Popen(  # noqa: S603 (our own module)
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        try:
            wait_ready(f"http://127.0.0.1:{port}/ready", child)
            rate = _count_events(port)
        finally:
            child.terminate()
            child.wait(30)
    settings = f"{SSE_STREAMS} streams x {SSE_TOKENS} tokens, /v1/chat/completions, null backend"
    yield Figure("SSE events", rate, "events/s", settings, ">= 10,000")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(url: str, child: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and child.poll() is None:
        with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):  # noqa: S310
            return
        time.sleep(0.1)
    raise ConfigError("the server did not become ready: run `python -m server --backend null` by hand to see why")


def _count_events(port: int) -> float:
    """Open the streams, count "data:" until each connection is at its end."""
    body = json.dumps({
        "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": SSE_TOKENS, "ignore_eos": True,
        "temperature": 0,
    }).encode()
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    events, began = 0, time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for _ in range(SSE_STREAMS):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(timeout=60):
                connection = key.fileobj  # type: ignore[assignment]
                data = connection.recv(1 << 16)
                events += data.count(b"data: {")
                if not data:
                    selector.unregister(connection)
                    connection.close()
    return events / (time.perf_counter() - began)
