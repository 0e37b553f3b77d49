"""Models from a ModelScope on the loopback: what comes, what is asked and kept, what a broken or hostile one may do."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import ConfigError, ModelNotFound
from engine.weights import download as downloader
from engine.weights.download import DownloadFailed, download, get_json
from engine.weights.hub import resolve_model
from engine.weights.models import cached_models, plan_removal
from engine.weights.modelscope import ModelScopeRepository
from tests.support.loopback_hub import LoopbackHub, loopback_hub

SECRET = "ms-secretSecret"
FILES = {"tiny-Q8_0.gguf": b"8" * 300_000, "tiny-Q4_0.gguf": b"4" * 100, "README.md": b"x"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with loopback_hub() as hub:
        for variable in ("MODELSCOPE_DOMAIN", "MODELSCOPE_API_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url + "/")
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "scope"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def resolve(model_id: str, **options: object) -> Path:
    return resolve_model(model_id, model_source="modelscope", **options)


def test_a_tag_brings_one_file_to_where_modelscope_keeps_it(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("owner/tiny-0.5B", FILES, revision="master")
    path = resolve("owner/tiny-0.5B:q8_0")
    assert path == tmp_path / "scope" / "models" / "owner" / "tiny-0___5B" / "tiny-Q8_0.gguf"
    assert path.read_bytes() == FILES["tiny-Q8_0.gguf"]
    assert [model.name for model in cached_models() if model.source == "modelscope"] == ["owner/tiny-0.5B"]


def test_what_is_there_is_not_fetched_again_and_offline_nothing_is_asked(hub: LoopbackHub) -> None:
    hub.add("owner/tiny", FILES, revision="master")
    path = resolve("owner/tiny:Q8_0")
    before = len(hub.requests)
    assert resolve("owner/tiny:Q8_0") == path
    assert len(hub.requests) == before + 1, "the list alone"
    assert resolve("owner/tiny:Q8_0", offline=True) == path
    assert resolve("owner/tiny", offline=True) == path, "the only one in the cache"
    assert len(hub.requests) == before + 1
    with pytest.raises(ModelNotFound, match="no GGUF file is Q4_0: there is :Q8_0"):
        resolve("owner/tiny:Q4_0", offline=True)
    with pytest.raises(ModelNotFound, match="it is not in the cache, and no hub is asked"):
        resolve("owner/other", offline=True)


def test_a_hub_that_does_not_answer_is_replaced_by_the_cache(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("owner/tiny", FILES, revision="master")
    path = resolve("owner/tiny:Q8_0")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
    assert resolve("owner/tiny:Q8_0") == path
    assert "taking it from the cache" in caplog.text
    with pytest.raises(ModelNotFound, match=r"cannot be reached.*check the network"):
        resolve("owner/other")


def test_safetensors_come_with_their_folder(hub: LoopbackHub) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"w", "tokenizer.json": b"{}"}
    hub.add("owner/model", files | {"pytorch_model.bin": b"pickle"}, revision="master")
    folder = resolve("owner/model")
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == set(files)
    assert not hub.asked("pytorch_model.bin")


def test_a_break_goes_on_with_a_range(hub: LoopbackHub) -> None:
    hub.add("owner/tiny", FILES, revision="master")
    hub.breaks["tiny-Q8_0.gguf"] = 200_000
    assert resolve("owner/tiny:Q8_0").read_bytes() == FILES["tiny-Q8_0.gguf"]
    assert [request.range for request in hub.requests if request.server == "cdn"] == [None, "bytes=200000-"]


def test_a_download_that_another_process_began_goes_on(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("owner/tiny", FILES, revision="master")
    data = FILES["tiny-Q8_0.gguf"]
    folder = tmp_path / "scope" / "models" / "owner" / "tiny"
    folder.mkdir(parents=True)
    partial = folder / f"tiny-Q8_0.gguf.{hashlib.sha256(data).hexdigest()[:16]}.incomplete"
    partial.write_bytes(data[:1234])
    assert resolve("owner/tiny:Q8_0").read_bytes() == data
    assert [request.range for request in hub.requests if request.server == "cdn"] == ["bytes=1234-"]
    assert not partial.exists()


def test_bytes_that_are_not_what_the_hub_states_are_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("owner/tiny", FILES, revision="master")
    folder = tmp_path / "scope" / "models" / "owner" / "tiny"
    folder.mkdir(parents=True)
    sha256 = hashlib.sha256(FILES["tiny-Q8_0.gguf"]).hexdigest()
    (folder / f"tiny-Q8_0.gguf.{sha256[:16]}.incomplete").write_bytes(b"another file's beginning")
    with pytest.raises(ModelNotFound, match="does not have the size or the SHA-256 that the hub states"):
        resolve("owner/tiny:Q8_0")
    assert [path.name for path in folder.iterdir()] == []
    assert resolve("owner/tiny:Q8_0").read_bytes() == FILES["tiny-Q8_0.gguf"], "the next attempt starts anew"


def test_another_revision_replaces_the_files_of_the_same_size(hub: LoopbackHub) -> None:
    hub.add("owner/tiny", {"tiny-Q8_0.gguf": b"new"}, revision="master")
    hub.add("owner/tiny", {"tiny-Q8_0.gguf": b"old", "tiny-F16.gguf": b"f16"}, revision="v1")
    assert resolve("owner/tiny").read_bytes() == b"new"
    assert resolve("owner/tiny:F16", revision="v1").read_bytes() == b"f16"
    assert resolve("owner/tiny:Q8_0", revision="v1").read_bytes() == b"old"
    with pytest.raises(ModelNotFound, match="not in the cache"):
        resolve("owner/tiny", offline=True)
    assert resolve("owner/tiny").read_bytes() == b"new"


def test_without_hashes_another_revision_is_fetched_again(hub: LoopbackHub) -> None:
    hub.states_sha256 = False
    hub.add("owner/tiny", {"tiny-Q8_0.gguf": b"one"}, revision="v1")
    hub.add("owner/tiny", {"tiny-Q8_0.gguf": b"two"}, revision="v2")
    assert resolve("owner/tiny", revision="v1").read_bytes() == b"one"
    assert resolve("owner/tiny", revision="v2").read_bytes() == b"two"
    fetched = len(hub.asked("FilePath"))
    assert resolve("owner/tiny", revision="v2").read_bytes() == b"two"
    assert len(hub.asked("FilePath")) == fetched, "the same revision is not"


def test_a_replacement_that_was_interrupted_is_not_taken_for_the_old_revision(hub: LoopbackHub) -> None:
    old, half = {"a.gguf": b"one"}, {"a.gguf": b"two", "config.json": b"{}"}
    hub.add("owner/tiny", old, revision="v1")
    hub.add("owner/tiny", half, revision="v2")
    path = resolve("owner/tiny", revision="v1")
    hub.breaks["a.gguf"] = 0
    hub.location = "http://[bad/"
    with pytest.raises(ModelNotFound):
        resolve("owner/tiny", revision="v2")
    hub.location = None
    path.write_bytes(b"two")                             # as if the process had ended right after the file
    assert resolve("owner/tiny", revision="v1").read_bytes() == b"one"


def test_hidden_files_and_our_own_note_are_not_of_the_repository(hub: LoopbackHub) -> None:
    hidden = {".rillet.json": b"{}", ".rillet.json.new": b"{}", ".git/config.json": b"{}", "a/.b.json": b"{}"}
    hub.add("owner/model", hidden | {"config.json": b"{}", "model.safetensors": b"w"}, revision="master")
    assert set(ModelScopeRepository("owner/model").names()) == {"config.json", "model.safetensors"}
    resolve("owner/model")
    assert not any(name in request.path for name in hidden for request in hub.requests)


@pytest.mark.parametrize(
    "location", ["http://[bad/", "//[", "http://a..b/", f"http://{'a' * 70}.x/", "http://\xe9/", "http://127.0.0.1:abc/"]
)
def test_a_redirect_to_what_is_no_address_fails_at_once(
    hub: LoopbackHub, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(downloader.time, "sleep", pauses.append)
    hub.add("owner/tiny", FILES, revision="master")
    hub.location = location
    with pytest.raises(ModelNotFound, match="the one that it redirects to, is none"):
        resolve("owner/tiny:Q8_0")
    assert pauses == []
    assert len(hub.asked("FilePath")) == 1
    with pytest.raises(DownloadFailed):
        get_json(f"{hub.url}/api/v1/models/owner/tiny/repo?Revision=master&FilePath=README.md", {})


@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_a_revision_that_no_address_can_carry_is_refused(source: str, hub: LoopbackHub) -> None:
    for revision in ("\udcff", "a\x00", "a\nb"):
        with pytest.raises(ConfigError, match="characters that no revision has"):
            resolve_model("owner/tiny", model_source=source, revision=revision)
    assert hub.requests == []


def test_a_token_reaches_the_hub_and_nobody_else(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/private", FILES, revision="master", token=SECRET)
    with pytest.raises(ModelNotFound, match="access needs a token"):
        resolve("owner/private:Q8_0")
    hub.requests.clear()
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", SECRET)
    assert resolve("owner/private:Q8_0").is_file()
    assert {(request.server, request.token) for request in hub.requests} == {("hub", SECRET), ("cdn", None)}
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "two\nlines")
    with pytest.raises(ConfigError, match="characters that no token has") as caught:
        resolve("owner/private:Q8_0")
    assert "lines" not in str(caught.value)


def test_what_is_not_there_is_a_sentence(hub: LoopbackHub) -> None:
    hub.add("owner/tiny", FILES, revision="master")
    with pytest.raises(ModelNotFound, match="owner/other on ModelScope: no such repository"):
        resolve("owner/other")
    with pytest.raises(ModelNotFound, match=r"no\.gguf is not in the repository: look at its list"):
        resolve("owner/tiny", weight_file="no.gguf")
    with pytest.raises(ModelNotFound, match="write it as owner/name"):
        resolve("tiny")


def test_names_of_a_hostile_hub_do_not_leave_the_cache(hub: LoopbackHub, tmp_path: Path) -> None:
    evil = {"../../../evil-Q4_K_M.gguf": b"x", "a/../../evil-Q4_K_M.gguf": b"x", "/tmp/evil-Q4_K_M.gguf": b"x"}
    hub.add("owner/evil", evil | {"ok-Q8_0.gguf": b"ok"}, revision="master")
    assert resolve("owner/evil").name == "ok-Q8_0.gguf"
    assert not list(tmp_path.rglob("evil-*"))


def test_remove_deletes_the_folder_and_nothing_beside_it(hub: LoopbackHub) -> None:
    hub.add("owner/tiny", FILES, revision="master")
    hub.add("owner/more", FILES, revision="master")
    kept, path = resolve("owner/more:Q8_0"), resolve("owner/tiny:Q8_0")
    resolve("owner/tiny:Q4_0")
    plan_removal("owner/tiny", "Q4_0", "modelscope").execute()
    assert path.is_file()
    assert not path.with_name("tiny-Q4_0.gguf").exists()
    plan_removal("owner/tiny", None, "modelscope").execute()
    assert not path.parent.exists()
    assert kept.is_file()
    for name in ("owner/tiny", "owner", "../models/owner", "owner/..", "owner/more/."):
        with pytest.raises(ModelNotFound, match="not in ModelScope's cache"):
            plan_removal(name, None, "modelscope")


# ---- the downloader alone ---------------------------------------------------------------------------------------------


def test_more_bytes_than_stated_are_not_written(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("owner/big", {"config.json": b"x" * 1000}, revision="main")
    with pytest.raises(DownloadFailed, match="more than the 10 bytes that it states"):
        download(f"{hub.url}/owner/big/resolve/main/config.json", tmp_path / "file", 10, None, {})
    assert not (tmp_path / "file").exists()


def test_a_server_that_only_breaks_off_is_given_up(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(downloader.time, "sleep", pauses.append)
    with pytest.raises(DownloadFailed, match="breaks off again and again"):
        download("http://127.0.0.1:1/x", tmp_path / "file", 10, None, {})
    assert pauses == [1.0, 2.0, 4.0, 8.0]


def test_only_http_is_spoken_and_answers_are_bounded(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.json").write_text("{}")
    with pytest.raises(DownloadFailed, match="no http address"):
        get_json((tmp_path / "secret.json").as_uri(), {})
    hub.add("owner/big", {"a.json": b"[1, 2]", "b.json": b"no"}, revision="main")
    assert get_json(f"{hub.url}/owner/big/resolve/main/a.json", {}) == [1, 2]
    with pytest.raises(DownloadFailed, match="no JSON"):
        get_json(f"{hub.url}/owner/big/resolve/main/b.json", {})
    monkeypatch.setattr(downloader, "MAX_JSON_BYTES", 3)
    with pytest.raises(DownloadFailed, match="more than 3 bytes"):
        get_json(f"{hub.url}/owner/big/resolve/main/a.json", {})
