"""llama.cpp as a peer: a child process in an environment that has llama-cpp-python, which runs the same workloads.

It is asked in turns with our engine, so that a noisy machine is noisy for both; while one side runs, the other one waits.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.bench.workloads import Rates, Workload
from engine.errors import ConfigError

__all__ = ["LlamaCpp"]

PAGE = 256     # llama.cpp rounds its context up to it
PATIENCE_S = 600
LAST_WORDS = 4000


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
        self._said = tempfile.TemporaryFile()                      # nobody reads a pipe while it computes
        try:
            self._child = subprocess.Popen(  # noqa: S603 (the interpreter that the user named)
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, errors="replace",
                start_new_session=True,                            # what it starts ends with it
            )
        except OSError as error:
            self._said.close()
            raise ConfigError(f"--peer-python {self._command[0]}: {error.strerror}: name a Python interpreter") from None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self.version = str(self._answer("version")["version"])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def run(self, work: Workload) -> Rates:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"prompts": work.prompts, "answers": work.answers}) + "\n")
            self._child.stdin.flush()
        except OSError:
            raise self._failure("it does not listen any more") from None
        answer = self._answer("prompt", "decode", "output")
        return Rates(*(float(answer[name]) for name in ("prompt", "decode", "output")))

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put("")
        self._child.stdout.close()

    def _answer(self, *names: str) -> dict[str, Any]:
        """The next line: an object with these names."""
        try:
            line = self._lines.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise self._failure(f"it says nothing for {PATIENCE_S} s") from None
        if not line:
            self._child.wait(10)
            raise self._failure(f"it ended with {self._child.returncode}")
        try:
            answer = json.loads(line)
            if isinstance(answer, dict) and all(answer.get(name) is not None for name in names):
                return answer
        except ValueError:
            pass
        raise self._failure(f"it says {line.strip()[:100]!r}")

    def _failure(self, what: str) -> ConfigError:
        self._said.seek(0)
        last = self._said.read()[-LAST_WORDS:].decode("utf-8", "replace").strip().rpartition("\n")[2]
        return ConfigError(
            f"the peer failed ({last[:300] or what}): pip install llama-cpp-python into an environment of its own and name "
            "its interpreter with --peer-python"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if sys.platform == "win32":
            self._child.kill()
        else:
            with suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._listener.join(10)
        if self._child.stdin is not None:
            with suppress(OSError):                                # what it was never told
                self._child.stdin.close()
        self._said.close()
