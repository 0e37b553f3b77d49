"""Which file is meant, without a network: huggingface_hub's download is replaced."""

from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from engine.errors import ConfigError, ModelNotFound
from engine.weights import hub
from engine.weights.hub import DEMO_FILE, DEMO_MODEL, demo_model, resolve_model
from tests.support.tiny_gguf import write_tiny_gguf


class Downloads:
    """Stands for hf_hub_download: remembers what was asked, gives `path` or raises `error`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: Exception | None = None
        self.asked: list[tuple] = []

    def __call__(self, repository: str, file: str, *, revision: str | None, token: str | None) -> str:
        self.asked.append((repository, file, revision, token))
        if self.error is not None:
            raise self.error
        return str(self.path)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Downloads:
    fake = Downloads(tmp_path / "downloaded.gguf")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    return fake


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "model.gguf")


def test_a_file_on_this_disk_is_taken_as_it_is(model: Path, downloads: Downloads) -> None:
    assert resolve_model(weight_file=str(model)) == model
    assert resolve_model(weight_path=model) == model
    assert resolve_model(model_id="a/b", weight_file=model) == model
    assert downloads.asked == []


def test_a_folder_with_one_gguf_means_that_file(model: Path) -> None:
    assert resolve_model(weight_path=model.parent) == model
    (model.parent / "second.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"2 GGUF files: name one of them, such as model\.gguf"):
        resolve_model(weight_path=model.parent)


def test_a_folder_without_gguf_is_handed_on(tmp_path: Path) -> None:
    assert resolve_model(weight_path=tmp_path) == tmp_path


def test_a_missing_file_names_the_path_and_the_cure(tmp_path: Path) -> None:
    for options in ({"weight_file": tmp_path / "no.gguf"}, {"weight_path": str(tmp_path / "no.gguf")}):
        with pytest.raises(ModelNotFound, match=r"no\.gguf: no such file: check the path"):
            resolve_model(**options)


def test_a_file_within_a_hub_repository_is_downloaded(downloads: Downloads) -> None:
    found = resolve_model("owner/name", weight_file="q4.gguf", hf_token="secret", revision="main")
    assert found == downloads.path
    assert downloads.asked == [("owner/name", "q4.gguf", "main", "secret")]


def test_contradictions_are_configuration_errors(model: Path) -> None:
    with pytest.raises(ConfigError, match="leave out"):
        resolve_model("owner/name", weight_path=model)
    with pytest.raises(ModelNotFound, match="name one of its GGUF files"):
        resolve_model("owner/name")


def test_with_nothing_named_the_demo_model_is_taken(monkeypatch: pytest.MonkeyPatch, downloads: Downloads) -> None:
    installed = demo_model()
    if installed is not None:
        assert resolve_model() == installed
        assert installed.suffix == ".gguf"
    monkeypatch.setattr(hub, "DEMO_WHEEL", "no-such-distribution")
    assert resolve_model() == downloads.path
    assert downloads.asked == [(DEMO_MODEL, DEMO_FILE, None, None)]


RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/x"))
FAILURES: list[tuple[Exception, str]] = [
    (errors.RepositoryNotFoundError("x", response=RESPONSE), "no such repository, or it is private"),
    (errors.GatedRepoError("x", response=RESPONSE), "gated: accept its licence"),
    (errors.RevisionNotFoundError("x", response=RESPONSE), "no such revision"),
    (errors.RemoteEntryNotFoundError("x", response=RESPONSE), "has no such file"),
    (errors.HfHubHTTPError("x", response=RESPONSE), "try again later"),
    (errors.LocalEntryNotFoundError("x"), "cannot be reached"),
    (errors.HFValidationError("x"), "no hub id"),
    (errors.OfflineModeIsEnabled("x"), "download failed|cannot be reached"),
    (OSError(28, "No space left on device"), "No space left"),
    (httpx.ConnectError("refused"), "download failed"),
]


@pytest.mark.parametrize(("error", "words"), FAILURES, ids=[type(error).__name__ for error, _ in FAILURES])
def test_every_failure_of_the_hub_is_model_not_found_with_a_cure(
    downloads: Downloads, error: Exception, words: str
) -> None:
    downloads.error = error
    with pytest.raises(ModelNotFound, match=words):
        resolve_model("owner/name", weight_file="q4.gguf")
