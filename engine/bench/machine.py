"""The machine's limits, measured in the same run as what is held against them: memory bandwidth and multiply-adds.

`python -m engine.bench.machine THREADS` prints them as JSON. bench runs it in a process of its own, because the threads of
NumPy's BLAS would go on spinning beside the kernels that are measured next.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

__all__ = ["Machine", "measure_machine"]

STREAM_BYTES = 256 << 20     # far beyond any cache
MATRIX = 1536
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """bandwidth: bytes read from memory per second; multiply_adds: float32 ones per second, both by `threads` threads."""

    threads: int
    bandwidth: float
    multiply_adds: float


def measure_machine(threads: int) -> Machine:
    """Measure in a child process, best of several rounds."""
    command = [sys.executable, "-P", "-m", "engine.bench.machine", str(threads)]
    limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OPENBLAS", "OMP", "MKL")}
    done = subprocess.run(command, capture_output=True, check=True, env=os.environ | limits)  # noqa: S603 (our own module)
    return Machine(**json.loads(done.stdout))


def _bandwidth(threads: int) -> float:
    """Every thread ors through words of its own."""
    import numpy as np

    words = [np.ones(STREAM_BYTES // 8 // threads, np.uint64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, words))
            best = max(best, STREAM_BYTES / (time.perf_counter() - began))
    return best


def _multiply_adds() -> float:
    import numpy as np

    a, b = np.ones((MATRIX, MATRIX), np.float32), np.ones((MATRIX, MATRIX), np.float32)
    best = 0.0
    for _ in range(ROUNDS):
        began = time.perf_counter()
        a @ b
        best = max(best, MATRIX**3 / (time.perf_counter() - began))
    return best


def main() -> None:
    threads = int(sys.argv[1])
    limits = {"threads": threads, "bandwidth": _bandwidth(threads), "multiply_adds": _multiply_adds()}
    sys.stdout.write(json.dumps(limits))


if __name__ == "__main__":
    main()
