"""Models from a hub on the loopback, fetched by real processes with the real huggingface_hub: what comes, what is asked, what
is said when nothing comes. huggingface_hub reads its variables when it is imported: every client is a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.weights.checkpoint import open_checkpoint
from tests.http.support import PATIENCE_S, ROOT
from tests.support.loopback_hub import LoopbackHub, loopback_hub
from tests.support.tiny_gguf import write_tiny_gguf

SECRET = "hf_secretSecret"
MANY = """
import json, sys
from engine.cli import main
for line in json.loads(sys.argv[1]):
    print(f"exit code {main(line)}", flush=True)
"""


class Client:
    """Runs the rillet command against the hub, with a cache of its own."""

    def __init__(self, hub: LoopbackHub, home: Path) -> None:
        self.home = home
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "RILLET_", "MODELSCOPE_"))}
        self.environ = kept | {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
            "MODELSCOPE_CACHE": str(home / "modelscope"), "COLUMNS": "200",
        }  # fmt: skip

    def __call__(self, *arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "engine.cli", *arguments, stdin=stdin, **variables)

    def many(self, *lines: str, **variables: str) -> list[str]:
        """Several commands in one process; what each says on stdout and stderr, with its exit code as the last line."""
        done = self.run("-c", MANY, json.dumps([line.split() for line in lines]), stderr=subprocess.STDOUT, **variables)
        assert done.returncode == 0, done.stdout
        answers = [[]]
        for line in done.stdout.splitlines():
            answers[-1].append(line)
            if line.startswith("exit code"):
                answers.append([])
        assert len(answers) == len(lines) + 1, done.stdout
        return ["\n".join(answer) for answer in answers[:-1]]

    def run(
        self, *arguments: str, stdin: str = "", stderr: int = subprocess.PIPE, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=PATIENCE_S, input=stdin,
            cwd=ROOT, env=self.environ | variables,
        )  # fmt: skip

    def pull(self, *arguments: str, **variables: str) -> Path:
        done = self("pull", *arguments, **variables)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    def cached(self) -> set[str]:
        """The names of all files in snapshots."""
        return {path.name for path in self.home.glob("hub/*/snapshots/*/**/*") if path.is_file()}


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with loopback_hub() as hub:
        yield hub


@pytest.fixture
def rillet(hub: LoopbackHub, tmp_path: Path) -> Client:
    return Client(hub, tmp_path / "home")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Three quantizations of a model, as a hub has them."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        f"tiny-{storage}.gguf": write_tiny_gguf(folder / f"{storage}.gguf", storage=storage).read_bytes()
        for storage in ("Q8_0", "F16", "F32")
    }


def test_one_file_by_its_name_brings_this_file_alone(hub: LoopbackHub, rillet: Client, tiny: dict[str, bytes]) -> None:
    hub.add("owner/tiny", {"README.md": b"x", "deep/tiny-Q8_0.gguf": tiny["tiny-Q8_0.gguf"], "tiny-F32.gguf": b"no"})
    path = rillet.pull("owner/tiny", "--f", "deep/tiny-Q8_0.gguf")
    assert path.read_bytes() == tiny["tiny-Q8_0.gguf"]
    assert path.parts[-2:] == ("deep", "tiny-Q8_0.gguf")
    assert rillet.cached() == {"tiny-Q8_0.gguf"}
    assert len(hub.asked("/api/models/")) == 1, "the one question whether the hub is in reach"


def test_a_tag_is_a_quantization_and_the_cache_alone_knows_it_again(
    hub: LoopbackHub, rillet: Client, tiny: dict[str, bytes]
) -> None:
    hub.add("owner/tiny", tiny)
    path = rillet.pull("owner/tiny:q8_0")
    assert path.name == "tiny-Q8_0.gguf"
    hub.requests.clear()
    pulled, shown, missing = rillet.many(
        "pull owner/tiny:Q8_0", "show owner/tiny:Q8_0", "show owner/tiny:F16", HF_HUB_OFFLINE="1"
    )
    assert pulled == f"{path}\nexit code 0"
    assert "tiny-Q8_0" in shown
    assert "no GGUF file is F16: there is :Q8_0" in missing
    assert hub.requests == []


def test_without_a_tag_one_is_chosen_and_named(hub: LoopbackHub, rillet: Client, tiny: dict[str, bytes]) -> None:
    hub.add("owner/tiny", tiny | {"mmproj-tiny-Q4_K_M.gguf": b"no model"})
    done = rillet("pull", "owner/tiny")
    assert Path(done.stdout.strip()).name == "tiny-Q8_0.gguf"
    assert done.stderr == (
        "owner/tiny has 3 GGUF models: taking tiny-Q8_0.gguf; another one: :F16, :F32, :Q8_0\n"
    ), "and no progress bar, where stderr is no terminal"


def test_chat_with_a_hub_model_then_without_the_hub(tmp_path: Path, tiny: dict[str, bytes]) -> None:
    chat = ("chat", "--m", "owner/tiny:Q8_0", "--temperature", "0", "--max-tokens", "4", "--kv-bytes", "4000000")
    with loopback_hub() as hub:
        hub.add("owner/tiny", tiny)
        rillet = Client(hub, tmp_path)
        online = rillet(*chat, stdin="hello\n")
        assert online.returncode == 0, online.stderr
        assert hub.asked("tiny-Q8_0.gguf")
    offline = rillet(*chat, "--offline", stdin="hello\n")                    # nothing listens there any more
    fallen_back = rillet(*chat, stdin="hello\n")
    for done in (offline, fallen_back):
        assert (done.returncode, done.stdout) == (0, online.stdout), done.stderr
    assert "taking it from the cache" in fallen_back.stderr
    assert "taking it from the cache" not in offline.stderr


SAFETENSORS = {
    "config.json": b"{}", "tokenizer.json": b"{}", "tokenizer.model": b"x", "chat_template.jinja": b"x",
    "model-00001-of-00002.safetensors": b"1" * 100, "model-00002-of-00002.safetensors": b"2" * 100,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
}  # fmt: skip
OTHERS = {
    "README.md": b"x", "pytorch_model.bin": b"pickle", "pytorch_model.bin.index.json": b"{}", "model.pt": b"pickle",
    "original/consolidated.00.pth": b"pickle", "consolidated.safetensors": b"twice", "original/params.json": b"{}",
    "model.onnx": b"x", "tiny-Q4_0.gguf": b"x",
}  # fmt: skip


def test_safetensors_come_with_what_belongs_to_them_and_no_pickle(hub: LoopbackHub, rillet: Client) -> None:
    hub.add("owner/shards", SAFETENSORS | OTHERS)
    folder = rillet.pull("owner/shards")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == set(SAFETENSORS)
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == b"2" * 100
    assert not any(name in request.path for name in OTHERS for request in hub.requests)


def test_all_parts_of_a_split_gguf_come(hub: LoopbackHub, rillet: Client) -> None:
    parts = {f"Q8_0/big-0000{number}-of-00003.gguf": bytes([number]) * 50 for number in (1, 2, 3)}
    hub.add("owner/big", parts | {"big-Q4_0.gguf": b"x"})
    by_tag, by_name = rillet.many("pull owner/big:Q8_0", "pull owner/big --f Q8_0/big-00002-of-00003.gguf")
    assert by_tag == by_name
    assert Path(by_tag.splitlines()[0]).name == "big-00001-of-00003.gguf"
    assert rillet.cached() == {name.removeprefix("Q8_0/") for name in parts}


def test_a_revision_is_another_version(hub: LoopbackHub, rillet: Client) -> None:
    hub.add("owner/tiny", {"tiny.gguf": b"new"})
    hub.add("owner/tiny", {"tiny.gguf": b"old"}, revision="v1")
    new, old, none = rillet.many(
        "pull owner/tiny", "pull owner/tiny --revision v1", "pull owner/tiny --f tiny.gguf --revision v2"
    )
    assert [Path(answer.splitlines()[0]).read_bytes() for answer in (new, old)] == [b"new", b"old"]
    assert "no such revision" in none


def test_a_token_reaches_the_hub_and_nobody_else(hub: LoopbackHub, rillet: Client, tmp_path: Path) -> None:
    hub.add("owner/private", {"tiny-Q8_0.gguf": b"x" * 1000}, token=SECRET)
    token_file = tmp_path / "token"
    token_file.write_text(SECRET + "\n")
    for arguments, variables in (
        (["--hf-token", SECRET], {"HF_TOKEN": "hf_wrong"}),
        ([], {"HF_TOKEN": SECRET}),
        (["--hf-token-path", str(token_file)], {}),
    ):
        done = rillet("pull", "owner/private:Q8_0", *arguments, HF_HOME=str(tmp_path / str(len(hub.requests))), **variables)
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
    assert all(request.token == SECRET for request in hub.requests if "owner/private" in request.path)
    to_the_cdn = [request for request in hub.requests if request.server == "cdn"]
    assert len(to_the_cdn) == 3
    assert all(request.token is None for request in to_the_cdn)


FAILURES = {
    "owner/gated": "owner/gated/tiny-Q8_0.gguf: access is gated: accept its licence",
    "owner/private": "owner/private: no such repository, or it is private: check the id, or give a token",
    "owner/tiny --f no.gguf": "owner/tiny/no.gguf: the repository has no such file",
    "owner/tiny --revision v9": "owner/tiny at revision v9: no such revision: check --revision",
    "owner/tiny:Q5_K_M": "owner/tiny: no GGUF file is Q5_K_M: there is :Q8_0",
    "owner/pickles": "owner/pickles: it has only pytorch_model.bin: pickles are never loaded",
    "owner/evil --f ../../x.gguf": "owner/evil/../../x.gguf: this is no name of a file in a repository",
}


def test_a_failure_is_one_sentence_with_a_cure(hub: LoopbackHub, rillet: Client) -> None:
    hub.add("owner/gated", {"tiny-Q8_0.gguf": b"x"}, token=SECRET, gated=True)
    hub.add("owner/private", {"tiny-Q8_0.gguf": b"x"}, token=SECRET)
    hub.add("owner/tiny", {"tiny-Q8_0.gguf": b"x"})
    hub.add("owner/pickles", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    answers = rillet.many(*(f"pull {arguments}" for arguments in FAILURES))
    for answer, sentence in zip(answers, FAILURES.values(), strict=True):
        said, code = answer.splitlines()
        assert code == "exit code 1"
        assert said.startswith(f"rillet pull: {sentence}")


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: LoopbackHub, rillet: Client) -> None:
    block = 10 * 1024 * 1024                             # huggingface_hub writes blocks of this size
    data = os.urandom(1024) * (2 * block // 1024) + b"the end"
    hub.add("owner/long", {"long-Q8_0.gguf": data})
    hub.breaks["long-Q8_0.gguf"] = block + 5000
    assert rillet.pull("owner/long", "--f", "long-Q8_0.gguf").read_bytes() == data
    assert [request.range for request in hub.requests if request.server == "cdn"] == [None, f"bytes={block}-"]


def test_names_of_a_hostile_hub_do_not_leave_the_cache(hub: LoopbackHub, rillet: Client, tmp_path: Path) -> None:
    evil = {"../../../../../evil-Q4_K_M.gguf": b"x", "/tmp/evil-Q4_K_M.gguf": b"x", "..\\..\\evil-Q4_K_M.gguf": b"x"}
    hub.add("owner/evil", evil | {"good-Q8_0.gguf": b"good"})
    index = json.dumps({"weight_map": {"a": "../../../../../evil.safetensors"}}).encode()
    hub.add("owner/index", {"config.json": b"{}", "a.safetensors": b"x", "model.safetensors.index.json": index} | evil)
    pulled, refused = rillet.many("pull owner/evil", "pull owner/index")
    assert pulled.splitlines()[0].endswith("/good-Q8_0.gguf")
    assert "its index names ../../../../../evil.safetensors, which it does not have" in refused
    hub.commit = "../../../../evil"
    hub.add("owner/commit", {"a-Q8_0.gguf": b"x"})
    assert rillet("pull", "owner/commit").returncode == 1
    assert [path for path in tmp_path.rglob("*") if "evil" in path.name and "owner--evil" not in path.name] == []


@pytest.mark.parametrize("etag", ['"../../../../evil"', '"{root}/evil"', 'W/"../../../../evil"', '".."', 'W..', '"a\\evil"'])
def test_an_etag_is_no_path(hub: LoopbackHub, rillet: Client, tmp_path: Path, etag: str) -> None:
    hub.etag = etag.replace("{root}", str(tmp_path))
    hub.add("owner/one", {"a-Q8_0.gguf": b"x"})
    hub.add("owner/more", SAFETENSORS)
    before = set(tmp_path.rglob("*"))
    for answer in rillet.many("pull owner/one", "pull owner/one --f a-Q8_0.gguf", "pull owner/more"):
        assert answer.startswith("rillet pull: the hub states ")
        assert "which is no name of a file" in answer
        assert answer.endswith("exit code 1")
    written = {path for path in set(tmp_path.rglob("*")) - before if path.is_file() and "xet" not in path.parts}
    assert written == set()


def test_a_commit_is_no_path(hub: LoopbackHub, rillet: Client, tmp_path: Path) -> None:
    hub.commit = "../../../../evil"
    hub.add("owner/more", SAFETENSORS)
    present, absent = rillet.many("pull owner/more", "pull owner/more --f no.gguf")
    assert "the hub states X-Repo-Commit '../../../../evil'" in present
    assert "the hub states X-Repo-Commit '../../../../evil'" in absent
    assert not list(tmp_path.rglob("*evil*"))


def test_a_cached_link_that_leads_out_is_not_used_for_a_download(hub: LoopbackHub, rillet: Client, tmp_path: Path) -> None:
    hub.add("owner/tiny", {"tiny-Q8_0.gguf": b"good"})
    path = rillet.pull("owner/tiny")
    outside = tmp_path / "outside"
    outside.write_bytes(b"bad")
    path.unlink()
    path.symlink_to(outside)
    done = rillet("pull", "owner/tiny")
    assert done.returncode == 1
    assert "leads out of the cache: delete that link and pull again" in done.stderr


GUARDED = """
import huggingface_hub
from huggingface_hub.utils import get_session
from engine.weights import hub_headers
from engine.weights.hub_headers import guard_headers, refuse_astray
guard_headers()
guard_headers()
first = get_session()
huggingface_hub.close_session()
assert get_session() is not first
assert hub_headers._hooks(get_session()).count(refuse_astray) == 1
"""


def test_a_client_that_is_made_anew_is_guarded_too(rillet: Client) -> None:
    done = rillet.run("-c", GUARDED)
    assert done.returncode == 0, done.stderr


def test_all_files_are_of_one_commit(hub: LoopbackHub, rillet: Client) -> None:
    hub.add("owner/shards", SAFETENSORS)
    rillet.pull("owner/shards")
    commit = hub.commit_of(SAFETENSORS)
    heads = [request.path for request in hub.requests if request.method == "HEAD" and "/resolve/" in request.path]
    assert sum("/resolve/main/" in path for path in heads) <= 2, "the index and the first file"
    assert sum(f"/resolve/{commit}/" in path for path in heads) >= len(SAFETENSORS) - 2


def test_list_and_remove_know_what_was_pulled(
    hub: LoopbackHub, rillet: Client, tiny: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("owner/tiny", tiny)
    hub.add("owner/tiny", tiny, revision="master")
    hub.add("owner/shards", SAFETENSORS)
    *_, listed = rillet.many(
        "pull owner/tiny:Q8_0", "pull owner/tiny:F16", "pull owner/shards",
        "pull owner/tiny:F32 --model-source modelscope", "list", MODELSCOPE_ENDPOINT=hub.url,
    )  # fmt: skip
    rows = [line.split("  ")[0] for line in listed.splitlines()]
    assert rows[:5] == ["model", "owner/shards", "owner/tiny:F16", "owner/tiny:Q8_0", "owner/tiny"]
    assert "safetensors, 2 shards" in listed
    assert "\x1b" not in listed

    unsure, gone, other_tag, path = rillet.many(
        "remove owner/tiny:F16", "remove owner/tiny:F16 --yes", "show owner/tiny:Q8_0", f"remove {tmp_path} --yes"
    )
    assert "is not removed: say --yes" in unsure
    assert "is a path: delete it yourself" in path
    assert gone.startswith("removed owner/tiny:F16 (1 file, ")
    assert other_tag.endswith("exit code 0")
    *_, left = rillet.many(
        "remove owner/tiny --yes", "remove owner/tiny --yes --model-source modelscope", "remove owner/tiny --yes", "list"
    )
    assert "owner/tiny" not in left
    assert "owner/shards" in left
    assert rillet.cached() == set(SAFETENSORS)


def test_what_was_pulled_opens_as_a_model(hub: LoopbackHub, rillet: Client, tiny: dict[str, bytes]) -> None:
    hub.add("owner/tiny", tiny)
    checkpoint = open_checkpoint(rillet.pull("owner/tiny:Q8_0"))
    assert checkpoint.spec.family == "llama"
    checkpoint.close()
