"""SRV: what clients of a real server feel. First token and time between tokens, alone and while a long prompt comes in, and
how long a token is under way from where it was drawn to the client.

The server is a process of its own; clients are sockets in this one, which only notes when bytes arrive.
"""

import json
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.bench.figures import Figure
from engine.bench.own_cost import free_port, wait_ready
from engine.config import EngineConfig
from engine.weights.hub import model_path

__all__ = ["serving_figures"]

STREAMS, PROMPT, ANSWER = 8, 50, 150
LONG = 4000                # tokens of the prompt that comes in while the others decode
PATIENCE_S = 120


@dataclass
class Client:
    """One streamed completion."""

    connection: socket.socket
    began: float
    first_id: int              # of its prompt: no other request of the run has it
    arrivals: list[float] = field(default_factory=list)      # one per event with a token
    rest: bytes = b""


def serving_figures(config: EngineConfig) -> Iterator[Figure]:
    model = model_path(config)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        stamps = Path(folder) / "stamps.json"
        command = [sys.executable, "-m", "engine.bench.stamped_server", str(stamps), "--f", str(model), "--port", str(port)]
        command += ["--backend", config.backend]
        if config.threads:
            command += ["--threads", str(config.threads)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:  # noqa: S603 (our own)
            try:
                wait_ready(f"http://127.0.0.1:{port}/ready", child)
                _stream(port, 1, 0)
                alone = _stream(port, STREAMS, 1)
                beside = _stream(port, STREAMS, 2, beside=LONG)
            finally:
                child.terminate()
                child.wait(30)
        drawn = {int(first): times for first, times in json.loads(stamps.read_text("utf-8")).items()}
    settings = f"{STREAMS} streams, prompt {PROMPT}, {ANSWER} tokens, /v1/completions"
    firsts = sorted(client.arrivals[0] - client.began for client in alone)
    yield Figure("SRV first token, p50", firsts[len(firsts) // 2] * 1e3, "ms", settings)
    yield Figure("SRV first token, p99", firsts[-1] * 1e3, "ms", settings)
    gaps, gaps_beside = _gaps(alone), _gaps(beside)
    yield Figure("SRV between tokens, p50", _share(gaps, 0.5) * 1e3, "ms", settings)
    yield Figure("SRV between tokens, p99", _share(gaps, 0.99) * 1e3, "ms", settings)
    under_way = sorted(
        arrival - when for client in alone for arrival, when in zip(client.arrivals, drawn[client.first_id], strict=False)
    )
    yield Figure("SRV drawn to client, p50", _share(under_way, 0.5) * 1e3, "ms", settings)
    yield Figure("SRV drawn to client, p99", _share(under_way, 0.99) * 1e3, "ms", settings, "<= 10")
    slow = _share(gaps_beside, 0.99)
    yield Figure("SRV beside a prompt, p99", slow * 1e3, "ms", f"the same while a prompt of {LONG:,} tokens is prefilled")
    yield Figure("SRV beside / alone", slow / _share(gaps, 0.5), "x", "p99 beside over p50 alone", "<= 3")


def _gaps(clients: Sequence[Client]) -> list[float]:
    return sorted(b - a for client in clients for a, b in zip(client.arrivals, client.arrivals[1:], strict=False))


def _share(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


def _open(port: int, prompt: list[int], tokens: int) -> Client:
    body = json.dumps({
        "model": "default", "prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 0, "ignore_eos": True,
    }).encode()  # fmt: skip
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    client = Client(connection, time.perf_counter(), prompt[0])
    connection.sendall(head + body)
    return client


def _stream(port: int, streams: int, turn: int, beside: int = 0) -> list[Client]:
    """Run the streams to their end; with `beside`, a prompt of so many tokens is sent when all of them have begun."""
    clients = [_open(port, _ids(turn * 100 + number, PROMPT), ANSWER) for number in range(streams)]
    others: list[Client] = []
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.connection, selectors.EVENT_READ, client)
        while selector.get_map():
            for key, _ in selector.select(timeout=PATIENCE_S):
                _read(key.data, selector)
            if beside and not others and all(len(client.arrivals) > 5 for client in clients):
                others.append(_open(port, _ids(turn * 100 + 99, beside), 1))
                selector.register(others[0].connection, selectors.EVENT_READ, others[0])
            if all(key.data in others for key in selector.get_map().values()):
                break
    for client in others:
        client.connection.close()
    if beside:                      # only what was drawn while the long prompt was under way
        for client in clients:
            client.arrivals = [at for at in client.arrivals if at >= others[0].began]
    return clients


def _read(client: Client, selector: selectors.BaseSelector) -> None:
    data = client.connection.recv(1 << 16)
    now = time.perf_counter()
    if not data:
        selector.unregister(client.connection)
        client.connection.close()
        return
    lines = (client.rest + data).split(b"\n")
    client.rest = lines.pop()
    client.arrivals += [now for line in lines if line.startswith(b"data: {") and b'"finish_reason":null' in line]


def _ids(number: int, length: int) -> list[int]:
    return [100 + (number * 977 + i * 31 + i * i % 97) % 19_000 for i in range(length)]
