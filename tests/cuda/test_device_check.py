"""ci/device_check.py without a GPU: it says so at once, and what it measures runs, in small, on the emulated device."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: pip install rillet[cuda]")

from tests.cuda.emulated_device import EmulatedDevice
from tests.cuda.recording_cuda import has_driver

PROGRAM = Path(__file__).parents[2] / "ci" / "device_check.py"


@pytest.fixture
def check(monkeypatch):
    spec = importlib.util.spec_from_file_location("device_check", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "device_check", module)
    spec.loader.exec_module(module)
    for name in ("CACHE_BYTES", "REPEATS"):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(module, "ROUND_S", 0.0)
    return module


@pytest.mark.skipif(has_driver(), reason="there is a driver")
def test_without_a_gpu_it_says_so_and_fails_at_once():
    began = time.perf_counter()
    done = subprocess.run([sys.executable, PROGRAM], cwd=PROGRAM.parents[1], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs an NVIDIA GPU: no NVIDIA driver" in done.stderr
    assert time.perf_counter() - began < 10


def test_every_measurement_runs_and_has_its_line_in_the_table(check, capsys):
    bench = check.Bench(EmulatedDevice())
    bench.noise = bench.noise[:4096]
    rows = [
        check.Row("copy", 0.5, 1e12), check.norms(bench, 2, 64), check.gates(bench, 2, 64), check.decode(bench, 2, 64),
        check.decode(bench, 2, 64, "fp8"), check.prefill(bench, 33), check.product(bench, "Q4_K", 2, 64, 256),
        check.product(bench, "BF16", 20, 64, 256),
    ]  # fmt: skip
    bench.forget()
    check.print_table(rows, 700.0)
    said = capsys.readouterr().out
    assert all(row.seconds > 0 and f"\n{row.name} " in said for row in rows)
