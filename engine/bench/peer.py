"""llama.cpp as a peer: a child process in an environment that has llama-cpp-python, which runs the same workloads.

It is asked in turns with our engine, so that a noisy machine is noisy for both; while one side runs, the other one waits.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.bench.workloads import Rates, Workload
from engine.errors import ConfigError

__all__ = ["LlamaCpp"]

PAGE = 256     # llama.cpp rounds its context up to it


class LlamaCpp:
    """A context manager; run() takes a workload of at most the context and sequences that it was made for."""

    def __init__(self, python: str | None, model: Path, threads: int, works: Sequence[Workload]) -> None:
        context = max(sum(map(len, work.prompts)) + sum(work.answers) for work in works)
        sequences = max(len(work.prompts) for work in works)
        script = str(resources.files("engine.bench").joinpath("llama_cpp_side.py"))
        self._command = [
            python or sys.executable, "-P", script, str(model), str(threads), str(-(-context // PAGE) * PAGE), str(sequences),
        ]  # fmt: skip

    def __enter__(self) -> "LlamaCpp":
        try:
            self._child = subprocess.Popen(  # noqa: S603 (the interpreter that the user named)
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise ConfigError(f"--peer-python {self._command[0]}: {error.strerror}: name a Python interpreter") from None
        self.version = str(self._answer()["version"])
        return self

    def run(self, work: Workload) -> Rates:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"prompts": work.prompts, "answers": work.answers}) + "\n")
        self._child.stdin.flush()
        return Rates(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            _, said = self._child.communicate()
            last = said.strip().rpartition("\n")[2] or f"it ended with {self._child.returncode}"
            raise ConfigError(
                f"the peer failed ({last[:300]}): pip install llama-cpp-python into an environment of its own and name its "
                "interpreter with --peer-python"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.communicate()
