"""What clients do to a server: they leave, they stop reading, they send slowly, too much or nonsense."""

import threading
import time
from pathlib import Path

import httpx

from server.settings import ServerSettings
from tests.http.support import PATIENCE_S, Steered, ThreadServer, connected, eventually, post_bytes, read_until, serving

ENDLESS = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}


def idle(server: ThreadServer) -> bool:
    return server.pages_held() == 0 and len(server.app.connections) == 0


def test_a_client_that_leaves_frees_its_pages(steered: ThreadServer) -> None:
    steered.backend.gate.clear()
    with connected(steered.port) as client:
        client.sendall(post_bytes("/v1/completions", ENDLESS))
        read_until(client, b"\r\n\r\n")
        eventually(steered.pages_held, "the request's start")
    steered.backend.gate.set()
    eventually(lambda: idle(steered), "the request's end")


def test_a_client_that_leaves_before_a_whole_answer_frees_its_pages(steered: ThreadServer) -> None:
    steered.backend.gate.clear()
    with connected(steered.port) as client:
        client.sendall(post_bytes("/v1/completions", {**ENDLESS, "stream": False, "n": 2, "prompt": ["x", "y"]}))
        eventually(steered.pages_held, "the request's start")
    steered.backend.gate.set()
    eventually(lambda: idle(steered), "the request's end")


def test_clients_that_have_left_before_they_are_read_get_no_step(steered: ThreadServer) -> None:
    """Request and end come in one piece; no step ends while the gate is closed, so only the leaving can end them."""
    steered.backend.gate.clear()
    for _ in range(40):
        with connected(steered.port) as client:
            client.sendall(post_bytes("/v1/completions", {**ENDLESS, "stream": False}))
    statistics = steered.app.host.engine.statistics
    eventually(lambda: len(steered.app.connections) == 0, "the end of every connection")
    assert statistics().num_requests_running == statistics().num_requests_waiting == 0
    steered.backend.gate.set()
    eventually(lambda: idle(steered), "the requests' end")


def test_many_clients_that_leave_at_any_moment_leave_nothing(steered: ThreadServer) -> None:
    for size in range(0, 400, 40):
        with connected(steered.port) as client:
            client.sendall(post_bytes("/v1/completions", {**ENDLESS, "n": 2, "prompt": ["x", "y"]}))
            if size:
                client.recv(size)
    eventually(lambda: idle(steered), "the requests' end")
    engine = steered.app.host.engine
    assert engine.metrics.audit_failures == 0


def test_a_client_that_reads_nothing_is_cut_off_and_others_are_not_disturbed(roomy_path: Path) -> None:
    settings = ServerSettings(stall_s=0.4)
    with (
        serving(roomy_path, settings, backend=Steered(pages=1 << 15), send_buffer_bytes=1 << 14) as server,
        connected(server.port, receive_buffer_bytes=1 << 12) as stalled,
    ):
        stalled.sendall(post_bytes("/v1/completions", {**ENDLESS, "n": 4}))
        eventually(lambda: any(c.blocked_at is not None for c in list(server.app.connections._live)), "a send that waits")
        assert server.pages_held() > 0
        fine = httpx.post(server.url + "/v1/completions", json={"prompt": "y", "max_tokens": 50}, timeout=PATIENCE_S)
        assert fine.json()["choices"][0]["text"] == "a" * 50
        eventually(lambda: idle(server), "the stalled client's end")
        # its socket is closed too: what was in the buffers comes, and then the connection's end or a reset
        try:
            rest = read_until(stalled, b"[DONE]")
        except ConnectionResetError:
            rest = b""
        assert b"[DONE]" not in rest


def test_a_client_that_reads_slowly_but_reads_is_not_cut_off(roomy_path: Path) -> None:
    settings = ServerSettings(stall_s=0.4)
    with (
        serving(roomy_path, settings, send_buffer_bytes=1 << 14) as server,
        connected(server.port, receive_buffer_bytes=1 << 12) as slow,
    ):
        slow.sendall(post_bytes("/v1/completions", {**ENDLESS, "max_tokens": 1200}))
        data, begin = b"", time.monotonic()
        while b"[DONE]" not in data[-64:]:
            if time.monotonic() - begin < 1.0:           # for longer than the stall timeout, a little at a time
                part = slow.recv(2048)
                pause = threading.Event().wait
                pause(0.02)                              # the client's own slowness, not a wait for the server
            else:
                part = slow.recv(1 << 16)
            assert part, "the server cut off a client that reads"
            data += part
        assert data.count(b'"text":"a') > 0


def test_a_body_that_is_too_large_is_refused(steered: ThreadServer, roomy_path: Path) -> None:
    with serving(roomy_path, ServerSettings(body_bytes=2048)) as server:
        refused = httpx.post(server.url + "/v1/completions", json={"prompt": "x" * 4096})
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "request_too_large"
        with connected(server.port) as client:           # without a length, by chunks
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            client.sendall(head + b"1000\r\n" + b" " * 4096 + b"\r\n0\r\n\r\n")
            assert b" 413 " in read_until(client, b"\r\n\r\n")
        assert httpx.get(server.url + "/ready").status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for_for_ever(roomy_path: Path) -> None:
    with serving(roomy_path, ServerSettings(body_s=0.1)) as server, connected(server.port) as client:
        client.sendall(post_bytes("/v1/completions", {"prompt": "x"})[:-5])
        answer = read_until(client, b'"request_timeout"}}')
        assert b" 408 " in answer


def test_a_huge_header_and_garbage_are_refused(steered: ThreadServer) -> None:
    for data in (b"GET / HTTP/1.1\r\nX: " + b"y" * (1 << 17) + b"\r\n\r\n", b"\x16\x03\x01 nonsense\r\n\r\n"):
        with connected(steered.port) as client:
            try:
                client.sendall(data)
                answer = read_until(client, b"\r\n\r\n")
            except (ConnectionResetError, BrokenPipeError):
                answer = b" 431 "
            assert b" 4" in answer[:15]
    assert httpx.get(steered.url + "/ready").status_code == 200


def test_two_requests_on_one_connection_and_one_behind_the_other(steered: ThreadServer) -> None:
    body = {"prompt": "x", "max_tokens": 2}
    with connected(steered.port) as client:
        client.sendall(post_bytes("/v1/completions", body) + post_bytes("/v1/completions", body))
        data = b""
        while data.count(b'"text":"aa"') < 2:
            data += client.recv(1 << 16)
        assert data.count(b"HTTP/1.1 200") == 2


def test_a_request_id_that_is_not_sane_is_replaced(steered: ThreadServer) -> None:
    for sent in ("", "a b", "x" * 129, 'quote"'):
        answer = httpx.get(steered.url + "/version", headers={"x-request-id": sent})
        assert answer.headers["x-request-id"].startswith("req-")
    kept = httpx.get(steered.url + "/version", headers={"x-request-id": "trace.1:a-b_c"})
    assert kept.headers["x-request-id"] == "trace.1:a-b_c"
