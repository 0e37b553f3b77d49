"""llama.cpp's own llama-batched-bench as a peer: `--peer PATH` of the program, run anew for every turn.

It makes its prompts itself (random ids), gives every sequence the same lengths and draws at random: the same work as ours
for workloads of equal lengths, and the others are refused. peer.py is the other kind of peer, with the very same tokens.
"""

import json
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.bench.workloads import Rates, Workload
from engine.errors import ConfigError

__all__ = ["BatchedBench"]

PAGE = 256              # llama.cpp rounds its context up to it, for every sequence
BATCH = 512
PATIENCE_S = 600
WANTED = ("speed_pp", "speed_tg", "t")


class BatchedBench:
    """A context manager, as peer.LlamaCpp is; there is nothing to keep between turns."""

    def __init__(self, program: str, model: Path, threads: int, works: Sequence[Workload]) -> None:
        self._program, self._model, self._threads = program, model, threads
        for work in works:
            if len(set(map(len, work.prompts))) > 1 or len(set(work.answers)) > 1:
                raise ConfigError(
                    f"llama-batched-bench gives all sequences the same length, {work.name} does not: leave it out of --rows, "
                    "or use --peer llama.cpp with --peer-python"
                )

    def __enter__(self) -> "BatchedBench":
        return self

    def run(self, work: Workload) -> Rates:
        """One run of the program, which loads the model and warms it up before it measures."""
        streams, prompt, answer = len(work.prompts), len(work.prompts[0]), work.answers[0]
        context = streams * -(-(prompt + answer) // PAGE) * PAGE
        command = [
            self._program, "-m", str(self._model), "-c", str(context), "-b", str(BATCH), "-ub", str(BATCH), "-npp",
            str(prompt), "-ntg", str(answer), "-npl", str(streams), "-t", str(self._threads), "-tb", str(self._threads),
            "-kvu", "--output-format", "jsonl",
        ]  # fmt: skip
        try:
            done = subprocess.run(  # noqa: S603 (the program that the user named)
                command, capture_output=True, text=True, timeout=PATIENCE_S, errors="replace", check=False
            )
        except OSError as error:
            raise ConfigError(f"--peer {self._program}: {error.strerror}: name the program llama-batched-bench") from None
        except subprocess.TimeoutExpired:
            raise ConfigError(f"--peer {self._program} took more than {PATIENCE_S} s for {work.name}: leave it out") from None
        return rates_of(self._report(done), streams, answer)

    def _report(self, done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
        for line in (done.stdout + "\n" + done.stderr).splitlines():
            start = line.find('{"n_kv_max"')
            if start >= 0:
                with suppress(ValueError):
                    report = json.loads(line[start:])
                    if all(isinstance(report.get(name), float | int) and report[name] > 0 for name in WANTED):
                        return dict(report)
        said = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2] or f"it ended with {done.returncode}"
        raise ConfigError(f"--peer {self._program} gave no figures ({said[:300]}): is it llama-batched-bench of this year?")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing runs between turns."""


def rates_of(report: dict[str, Any], streams: int, answer: int) -> Rates:
    """Its decode counts every answer token; the first one of ours comes with the prompt."""
    return Rates(
        prompt=float(report["speed_pp"]), decode=float(report["speed_tg"]), output=streams * answer / float(report["t"])
    )
