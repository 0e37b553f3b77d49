"""LoopbackHub: a small Hugging Face hub and ModelScope on 127.0.0.1, for clients that download for real.

It speaks what huggingface_hub asks (the model's info, its tree, HEAD and GET of /resolve/, with the headers that the client
relies on) and ModelScope's two routes. Weights are redirected to a second server, as to a CDN. It remembers every request and
can break off in the middle of a file, once.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".gguf", ".safetensors", ".bin")                # what a real hub keeps apart


@dataclass(frozen=True)
class Request:
    """What a client asked, and with which token."""

    server: str                                          # hub or cdn
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Model:
    """One repository: its files by revision. token: what it asks for; gated: what it says without."""

    revisions: dict[str, dict[str, bytes]]
    token: str | None = None
    gated: bool = False


@dataclass
class LoopbackHub:
    """Both servers while they run; `models` by id, `requests` in their order."""

    models: dict[str, Model] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)                     # file name -> bytes after which it breaks off
    commit: str | None = None                                                # instead of a real one, to play a hostile hub
    etag: str | None = None                                                  # likewise, for small files and for large ones
    location: str | None = None                                              # where ModelScope sends for files, likewise
    states_sha256: bool = True                                               # in ModelScope's lists
    url: str = ""
    cdn_url: str = ""

    def add(self, model_id: str, files: dict[str, bytes], revision: str = "main", **options: object) -> None:
        self.models.setdefault(model_id, Model({}, **options)).revisions[revision] = files

    def asked(self, part: str, method: str = "GET") -> list[Request]:
        """The requests whose path has `part`."""
        return [request for request in self.requests if part in request.path and request.method == method]

    def commit_of(self, files: dict[str, bytes]) -> str:
        return self.commit or hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """The hub, until the block ends; then its port refuses connections."""
    hub = LoopbackHub()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler(hub)) for handler in (_hub_handler, _cdn_handler)]
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    server_name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Nothing: stderr is the client's."""

    def do_GET(self) -> None:
        self.note()
        self.answer()

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self) -> None:
        raise NotImplementedError

    def note(self) -> None:
        header = self.headers.get("Authorization")
        token = header.removeprefix("Bearer ") if header else None
        self.hub.requests.append(
            Request(self.server_name, self.command, unquote(self.path), self.headers.get("Range"), token)
        )

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def reply_json(self, value: object, status: int = 200, **headers: str) -> None:
        self.reply(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def reply_file(self, name: str, data: bytes, **headers: str) -> None:
        """The file or the range of it that is asked for; cut off where the hub's `breaks` say so, once."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        cut = self.hub.breaks.pop(name, None) if self.command == "GET" else None
        self.reply(
            206 if asked else 200, rest if cut is None else rest[:cut], Content_Length=str(len(rest)), Accept_Ranges="bytes",
            **headers,
        )  # fmt: skip
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _hub_handler(hub: LoopbackHub) -> type[_Handler]:
    class HubHandler(_Handler):
        server_name = "hub"

        def answer(self) -> None:
            url = urlsplit(self.path)
            path, query = unquote(url.path), parse_qs(url.query)
            # the order matters: ModelScope's paths begin like Hugging Face's
            for pattern, answer in (
                (r"/api/v1/models/(?P<model>[^/]+/[^/]+)/repo(?P<list>/files)?", self.modelscope),
                (r"/api/models/(?P<model>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", self.tree),
                (r"/api/models/(?P<model>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", self.info),
                (r"/(?P<model>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self.resolve),
            ):
                if match := re.fullmatch(pattern, path):
                    answer(query, **match.groupdict())
                    return
            self.refuse("RepoNotFound")

        def refuse(self, code: str, status: int = 404) -> None:
            self.reply_json({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

        def files(self, model: str, revision: str | None) -> dict[str, bytes] | None:
            """The files, or None after a refusal, as the real hub refuses."""
            found = hub.models.get(model)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if found is None or (found.token is not None and not found.gated and token != found.token):
                self.refuse("RepoNotFound", 401)
                return None
            for name, files in found.revisions.items():
                if (revision or "main") in (name, hub.commit_of(files)):
                    return files
            self.refuse("RevisionNotFound")
            return None

        def info(self, query: object, model: str, revision: str | None = None) -> None:
            if (files := self.files(model, revision)) is not None:
                siblings = [{"rfilename": name} for name in files]
                self.reply_json({"id": model, "sha": hub.commit_of(files), "siblings": siblings})

        def tree(self, query: object, model: str, revision: str) -> None:
            if (files := self.files(model, revision)) is not None:
                self.reply_json([_entry(name, data) for name, data in files.items()])

        def resolve(self, query: object, model: str, revision: str, file: str) -> None:
            if (files := self.files(model, revision)) is None:
                return
            repository = hub.models[model]
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if repository.gated and token != repository.token:
                self.refuse("GatedRepo", 401 if not token else 403)
                return
            commit = {"X_Repo_Commit": hub.commit_of(files)}
            if file not in files:
                self.reply(404, X_Error_Code="EntryNotFound", **commit)
                return
            data = files[file]
            if not file.endswith(LARGE):
                self.reply_file(file, data, ETag=hub.etag or f'"{hashlib.sha1(data).hexdigest()}"', **commit)
                return
            sha256 = hashlib.sha256(data).hexdigest()
            location = f"{hub.cdn_url}/{sha256}/{quote(file)}"
            self.reply(
                302, Location=location, X_Linked_Etag=hub.etag or f'"{sha256}"', X_Linked_Size=str(len(data)),
                Accept_Ranges="bytes", **commit,
            )  # fmt: skip

        def modelscope(self, query: dict[str, list[str]], model: str, list: str | None) -> None:
            found = hub.models.get(model)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if found is None:
                self.reply_json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
                return
            if found.token is not None and token != found.token:
                self.reply_json({"Code": 10010205001, "Message": "no access", "Success": False}, 403)
                return
            files = found.revisions.get(query["Revision"][0], {})
            if list:
                entries = [
                    {
                        "Path": name, "Name": name.rpartition("/")[2], "Type": "blob", "Size": len(data),
                        "Sha256": hashlib.sha256(data).hexdigest() if hub.states_sha256 else None, "Revision": "0" * 40,
                    }
                    for name, data in files.items()
                ]  # fmt: skip
                self.reply_json({"Code": 200, "Success": True, "Data": {"Files": entries}})
                return
            file = query["FilePath"][0]
            if file not in files:
                self.reply_json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
            elif hub.location is not None:
                self.reply(302, Location=hub.location)
            elif file.endswith(LARGE):
                self.reply(302, Location=f"{hub.cdn_url}/{hashlib.sha256(files[file]).hexdigest()}/{quote(file)}")
            else:
                self.reply_file(file, files[file])

    HubHandler.hub = hub
    return HubHandler


def _cdn_handler(hub: LoopbackHub) -> type[_Handler]:
    class CdnHandler(_Handler):
        server_name = "cdn"

        def answer(self) -> None:
            _, sha256, name = unquote(self.path).split("/", 2)
            for model in hub.models.values():
                for files in model.revisions.values():
                    if name in files and hashlib.sha256(files[name]).hexdigest() == sha256:
                        self.reply_file(name, files[name], ETag=f'"{sha256}"')
                        return
            self.reply(404)

    CdnHandler.hub = hub
    return CdnHandler


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
