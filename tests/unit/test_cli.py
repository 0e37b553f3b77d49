"""The console script `rillet`: which command runs, with which exit code, from which folder."""

import subprocess
import sys
import sysconfig
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from engine import __version__, chat, cli


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rillet {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_has_one_line_per_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    for command in ("chat", "complete", "serve", "pull", "list", "show", "remove", "bench"):
        assert sum(line.startswith(f"  rillet {command} ") for line in shown) == 1


def test_an_unknown_command_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sevre", "--port", "1"]) == 2
    assert capsys.readouterr().err == "rillet: 'sevre' is no command: did you mean serve?\n"
    assert cli.main(["xyzzy"]) == 2
    assert "there are chat, serve" in capsys.readouterr().err


def test_chat_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "main", lambda arguments: len(arguments))
    assert cli.main(["chat", "--f", "x.gguf"]) == 2


def serve_without_a_code(arguments: list[str]) -> None:
    assert arguments == ["--port", "1"]


def serve_with_a_code(arguments: list[str]) -> int:
    return 7


@pytest.mark.parametrize(("name", "code"), [("serve_without_a_code", 0), ("serve_with_a_code", 7)])
def test_a_command_of_another_package_is_run(name: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, f"{__name__}:{name}")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    assert cli.main(["serve", "--port", "1"]) == code


def test_a_command_that_cannot_be_loaded_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(monkeypatch, "no_such_module:main")
    assert cli.main(["serve"]) == 1
    assert "it cannot be loaded" in capsys.readouterr().err


def offer(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    points = EntryPoints([EntryPoint("serve", value, "rillet.commands")])
    monkeypatch.setattr(cli, "entry_points", lambda **wanted: points.select(**wanted))


def test_importing_the_command_line_imports_no_server() -> None:
    code = "import sys, engine.cli, engine.chat; print([n for n in sys.modules if n.split('.')[0] in ('server', 'backends')])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_script_runs_in_any_folder(tmp_path: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / "rillet"
    command = [script, "chat", "--f", "no.gguf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, input="")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("rillet chat: no.gguf: no such file")
    assert done.stderr.count("\n") == 1
