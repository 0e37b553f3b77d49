"""Which model is meant: what is on this disk, what contradicts itself, and what the hub's failures are called.

Downloads themselves are tested over sockets (tests/http/test_hub_loopback.py); here the hub's client is replaced.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub.constants
import pytest
from huggingface_hub import errors

from engine.config import EngineConfig
from engine.errors import BadModelFile, ConfigError, ModelNotFound
from engine.weights import hub
from engine.weights.hub import DEMO_FILE, DEMO_MODEL, demo_model, model_path, resolve_model, split_tag
from engine.weights.open_model import note_use
from tests.support.tiny_gguf import write_tiny_gguf


class Downloads:
    """Stands for hf_hub_download: remembers what was asked, gives a path in `cache` or raises `error`.

    And for HfApi, whose model_info finds the hub in reach.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = self.folder = cache
        self.error: Exception | None = None
        self.asked: list[tuple] = []

    def __call__(self, repository: str, file: str, *, revision: str | None, token: str | None) -> str:
        self.asked.append((repository, file, revision, token))
        if self.error is not None:
            raise self.error
        self.folder = self.cache / f"models--{repository.replace('/', '--')}" / "snapshots" / ("0" * 40)
        return str(self.folder / file)

    def model_info(self, _repository: str, **_options: object) -> SimpleNamespace:
        return SimpleNamespace(siblings=())


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Downloads:
    fake = Downloads(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(fake.cache))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: fake)
    return fake


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "model.gguf")


# ---- on this disk -----------------------------------------------------------------------------------------------------


def test_a_file_on_this_disk_is_taken_as_it_is(model: Path, downloads: Downloads) -> None:
    assert resolve_model(weight_file=str(model)) == model
    assert resolve_model(weight_path=model) == model
    assert resolve_model(weight_path=model.parent, weight_file="model.gguf") == model
    assert resolve_model(str(model)) == model
    assert resolve_model(str(model.parent)) == model
    assert resolve_model("a/b", weight_file=model) == model
    assert resolve_model("owner/name", weight_path=model) == model, "the id is only its name then"
    assert downloads.asked == []


def test_a_path_and_a_file_beside_it(model: Path) -> None:
    assert resolve_model(str(model.parent), weight_file="model.gguf") == model
    with pytest.raises(ConfigError, match=r"model\.gguf is a file, and --f other\.gguf names another: leave one"):
        resolve_model(str(model), weight_file="other.gguf")


def test_using_a_model_sets_when_it_was_used(model: Path) -> None:
    os.utime(model, (1000, 2000))
    note_use(model)
    assert model.stat().st_mtime == 2000
    assert abs(model.stat().st_atime - time.time()) < 60
    note_use(model.parent / "absent.gguf")               # it is only a convenience


def test_a_folder_with_one_gguf_means_that_file(model: Path) -> None:
    assert resolve_model(weight_path=model.parent) == model
    (model.parent / "second.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"2 GGUF files: name one of them, such as model\.gguf"):
        resolve_model(weight_path=model.parent)


def test_a_folder_with_a_split_gguf_means_its_first_part(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"big-Q8_0-0000{number}-of-00003.gguf").write_bytes(b"")
    assert resolve_model(weight_path=tmp_path) == tmp_path / "big-Q8_0-00001-of-00003.gguf"


def test_a_folder_with_safetensors_is_the_model_even_with_gguf_beside(model: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (model.parent / name).write_bytes(b"{}")
    assert resolve_model(weight_path=model.parent) == model.parent


def test_a_folder_without_gguf_is_handed_on(tmp_path: Path) -> None:
    assert resolve_model(weight_path=tmp_path) == tmp_path


def test_a_missing_file_names_the_path_and_the_cure(tmp_path: Path) -> None:
    for options in (
        {"weight_file": tmp_path / "no.gguf"}, {"weight_path": str(tmp_path / "no.gguf")}, {"model_id": "./no.gguf"},
        {"weight_path": tmp_path, "weight_file": "no.gguf"},
    ):  # fmt: skip
        with pytest.raises(ModelNotFound, match=r"no\.gguf: no such file: check the path"):
            resolve_model(**options)


NO_IDS = ["", "a b/c", "a/b/c", "owner/na\0me", "owner/..", "x" * 5000, "C:\\model", "~nobody-here/x"]


@pytest.mark.parametrize("model_id", NO_IDS)
def test_what_is_neither_an_id_nor_a_path_is_said_so(model_id: str, downloads: Downloads) -> None:
    with pytest.raises((ModelNotFound, ConfigError)):
        resolve_model(model_id)
    assert downloads.asked == []


# ---- contradictions ---------------------------------------------------------------------------------------------------


def test_contradictions_are_configuration_errors(model: Path) -> None:
    with pytest.raises(ConfigError, match="revision 'v1' is of a hub repository"):
        resolve_model(weight_path=model, revision="v1")
    with pytest.raises(ConfigError, match="name one with --m too"):
        resolve_model(revision="v1")
    with pytest.raises(ConfigError, match="names a quantization, and --f"):
        resolve_model("owner/name:Q4_K_M", weight_file="x.gguf")
    with pytest.raises(ConfigError, match="model_source must be huggingface or modelscope"):
        resolve_model("owner/name", model_source="elsewhere")
    with pytest.raises(ConfigError, match="model_source must be one of"):
        EngineConfig(model_source="elsewhere")


def test_a_tag_stands_after_the_colon() -> None:
    assert split_tag("owner/name:Q4_K_M") == ("owner/name", "Q4_K_M")
    assert split_tag("owner/name") == ("owner/name", None)
    for wrong in ("owner/name:", "owner/name:a b", "owner/name:a:b", "owner/name:../x"):
        with pytest.raises(ConfigError, match="after the colon stands a quantization"):
            split_tag(wrong)


# ---- from a hub -------------------------------------------------------------------------------------------------------


def test_a_file_within_a_hub_repository_is_downloaded(downloads: Downloads) -> None:
    found = resolve_model("owner/name", weight_file="deep/q4.gguf", hf_token="secret", revision="main")
    assert found == downloads.folder / "deep" / "q4.gguf"
    assert downloads.asked == [("owner/name", "deep/q4.gguf", "main", "secret")]


def test_the_config_says_where_the_token_is(downloads: Downloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "token").write_text("from-file\n")
    named = {"model_id": "owner/name", "weight_file": "q4.gguf", "hf_token_path": str(tmp_path / "token")}
    model_path(EngineConfig(**named))
    model_path(EngineConfig(**named, hf_token="given"))
    monkeypatch.setenv("HF_TOKEN", "for the hub's client")
    model_path(EngineConfig(**named))
    assert [token for *_, token in downloads.asked] == ["from-file", "given", None]


def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(downloads: Downloads) -> None:
    for token in ("", "hf_secret with space", "hf_secret\nX: y", "hf_secreté"):
        with pytest.raises(ConfigError) as caught:
            resolve_model("owner/name", weight_file="q4.gguf", hf_token=token)
        assert "hf_secret" not in str(caught.value)
    assert "hf_secret" not in repr(EngineConfig(hf_token="hf_secret"))
    assert downloads.asked == []


def test_with_nothing_named_the_demo_model_is_taken(monkeypatch: pytest.MonkeyPatch, downloads: Downloads) -> None:
    installed = demo_model()
    if installed is not None:
        assert resolve_model() == installed
        assert installed.suffix == ".gguf"
    monkeypatch.setattr(hub, "DEMO_WHEEL", "no-such-distribution")
    assert resolve_model() == downloads.folder / DEMO_FILE
    assert downloads.asked == [(DEMO_MODEL, DEMO_FILE, None, None)]


RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/x"))
REFUSED = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co/x"))
FAILURES: list[tuple[Exception, str]] = [
    (errors.RepositoryNotFoundError("x", response=RESPONSE), "no such repository, or it is private"),
    (errors.GatedRepoError("x", response=RESPONSE), "gated: accept its licence"),
    (errors.RevisionNotFoundError("x", response=RESPONSE), "no such revision"),
    (errors.RemoteEntryNotFoundError("x", response=RESPONSE), "has no such file"),
    (errors.HfHubHTTPError("x", response=RESPONSE), "try again later"),
    (errors.HfHubHTTPError("x", response=REFUSED), "the hub refuses the token"),
    (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
    (errors.HFValidationError("x"), "no hub id"),
    (errors.OfflineModeIsEnabled("x"), "cannot be reached"),
    (OSError(28, "No space left on device"), "No space left"),
    (httpx.ConnectError("refused"), "download failed"),
]


@pytest.mark.parametrize(("error", "words"), FAILURES, ids=[f"{type(error).__name__}-{words}" for error, words in FAILURES])
def test_every_failure_of_the_hub_is_model_not_found_with_a_cure(
    downloads: Downloads, error: Exception, words: str
) -> None:
    downloads.error = error
    with pytest.raises(ModelNotFound, match=words):
        resolve_model("owner/name", weight_file="q4.gguf")


def test_an_index_that_names_no_files_is_a_bad_file(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "nothing"):
        index.write_text(text)
        with pytest.raises(BadModelFile):
            hub._read_index(index)
