"""ci/mac_check.py without a Mac: its arithmetic and table, the whole run in small, and what it says without Metal."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

import mlx.core as mx

from engine.bench.synthetic import synthetic_checkpoint
from engine.bench.workloads import Workload
from engine.model.spec import Dense
from tests.mlx.native import probe, try_kernel, wanted, why_not
from tests.mlx.shim import ShimMetal
from tests.support.tiny_gguf import tiny_vocabulary, write_tiny_gguf

PROJECT = Path(__file__).parents[2]
PROGRAM = PROJECT / "ci" / "mac_check.py"
PEERS = (("mlx-lm", 50.0), ("llama.cpp", "failed: no"))
IDS = 20_001                                  # workloads have ids up to 20,000


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("mac_check", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mac_check"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mac_check"]


@pytest.fixture
def limits(check):
    return check.Limits("a device", 100e9, 2e12)


def test_a_row_has_its_rate_goal_bandwidth_and_peers(check, limits):
    row = check.Row("Qwen", "B1", "prompt 50", 60.0, 1.25e9, 0.75, check.Goal(75, 49), PEERS)
    other = check.Row("Qwen", "VR", "3 x 16", 1500.4, 2.5e6)
    heads, first, second = check.table([row, other], limits)
    assert dict(zip(heads, first, strict=True)) == {
        "model": "Qwen", "row": "B1", "tok/s": "60", "goal (M4)": "75", "vllm.rs (M4)": "49", "MB/token": "1,250",
        "GB/s": "75", "of bandwidth": "75%", "of limit": "75%", "mlx-lm": "50 (1.20 x)", "llama.cpp": "failed: no",
        "settings": "prompt 50",
    }  # fmt: skip
    assert dict(zip(heads, second, strict=True)) == dict.fromkeys(heads, "") | {
        "model": "Qwen", "row": "VR", "tok/s": "1,500", "MB/token": "2.5", "GB/s": "3.75", "of bandwidth": "4%",
        "settings": "3 x 16",
    }  # fmt: skip


def test_a_row_that_failed_says_so_and_keeps_its_peer(check, limits):
    heads, line = check.table([check.Row("Qwen", "B1", "", None, 1e9, peers=(("mlx-lm", 50.0),))], limits)
    found = dict(zip(heads, line, strict=True))
    assert (found["tok/s"], found["GB/s"], found["of bandwidth"], found["mlx-lm"]) == ("FAILED", "", "", "50")


def test_markdown_has_as_many_cells_in_each_line_and_text_is_aligned(check, limits):
    cells = check.table([check.Row("a|b", "B1", "x", 1.0, 1.0), check.Row("c", "PRE", "y", None, 1.0)], limits)
    lines = check.as_markdown(cells, ["about this"]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert lines[1] == "- about this"
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 4
    text = check.as_text(cells).splitlines()
    assert len({line.index(word) for line, word in zip(text, ("row", "B1", "PRE"), strict=True)}) == 1


def test_one_stream_reads_all_weights_and_half_of_the_answer_s_cache(check):
    work = Workload("one", "decode", ((1,) * 50,), (3,), "")
    # each of the three is drawn from 50, 51, 52 tokens, the last of them its own step's, which is written and then read
    assert check.Traffic(1000, 10).per_token(work, 128) == 1000 + 10 * (51 + 1)


def test_many_streams_share_the_weights_of_a_step_up_to_its_places(check):
    work = Workload("many", "output", ((1,) * 10,) * 8, (1,) * 8, "")
    assert check.Traffic(1000, 0).per_token(work, 128) == 125
    assert check.Traffic(1000, 0).per_token(work, 4) == 250


def test_a_prompt_reads_the_weights_once(check):
    work = Workload("prompt", "prompt", ((1,) * 512,), (1,), "")
    assert check.Traffic(512, 3).per_token(work, 1) == 1 + 3


def test_the_bytes_of_a_model_are_its_matrices_and_norms_and_no_embedding_twice(check):
    checkpoint = synthetic_checkpoint("qwen3-0.6b:bf16")                  # tied: the embedding is the output
    found = check.Traffic.of(checkpoint)
    spec = checkpoint.spec
    layer = spec.layers[0]
    a, width, hidden = layer.attention, layer.feed_forward, spec.hidden_size
    assert isinstance(width, Dense)
    numbers = hidden * (2 * a.heads + 2 * a.kv_heads) * a.head_size + 3 * hidden * width.width
    matrices = 2 * (len(spec.layers) * numbers + spec.vocabulary_size * hidden)
    assert 0 <= found.weights - matrices < 2e-3 * matrices                # the norms
    assert found.cache == len(spec.layers) * 2 * a.kv_heads * a.head_size * 2


def test_every_goal_belongs_to_a_row_that_is_measured(check):
    rows = {(model.synthetic, row) for model in check.MODELS for row in model.rows}
    assert set(check.GOALS) <= rows
    assert [(goal.wanted, goal.vllm_rs) for goal in check.GOALS.values()] == [(75, 49), (1500, 764), (40, 32), (26, 16)]
    for model in check.MODELS:
        config = check.mlx_lm_model(model)["config"]
        assert config["hidden_size"] == synthetic_checkpoint(model.synthetic).spec.hidden_size


def test_a_file_that_does_not_open_fails_its_row_alone(check, limits, tmp_path, monkeypatch):
    path = write_tiny_gguf(tmp_path / "tiny.gguf")                        # too few ids for the workloads
    monkeypatch.setenv("RILLET_QWEN3_8B", str(path))
    monkeypatch.setattr(check, "mlx_lm", lambda *given: None)
    monkeypatch.setattr(check, "llama_cpp", lambda *given: [])
    (row,) = check.measure(check.MODELS[2], check.TINY, limits, 4)
    assert (row.row, row.rate) == ("B1", None)
    assert row.bytes_per_token > 0


def test_the_whole_run_in_small_ends_with_a_table_of_what_was_measured(tmp_path):
    vocabulary = [*tiny_vocabulary(), *(f"<{i}>" for i in range(IDS))]
    path = write_tiny_gguf(tmp_path / "tiny.gguf", vocabulary=vocabulary, context=1024, storage="F16", tied=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RILLET_")}
    environment |= {"RILLET_QWEN3_06B": str(path), "RILLET_MAC_TABLE": str(tmp_path / "table.md"), "PYTHONPATH": str(PROJECT)}
    environment |= {"MLX_LM_PYTHON": "no-such-python", "PATH": os.defpath}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "quick", "--tiny"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything passed" in done.stdout
    lines = [line.split("|") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines[2:]]
    assert [line[1:3] for line in rows] == [["Qwen3-0.6B BF16", row] for row in ("B1", "PRE", "VR", "NV256")]
    assert all(float(line[3].replace(",", "")) > 0 for line in rows)
    assert [line[4:6] for line in rows] == [["75", "49"], ["", ""], ["1,500", "764"], ["", ""]]
    assert all(line[8].endswith("%") and line[9].endswith("%") for line in rows)
    assert all("failed" in line[10] for line in rows)                     # mlx-lm, of which there is no Python


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal is there")
def test_without_metal_it_says_what_it_needs():
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "needs MLX with Metal" in done.stderr


def test_ci_device_takes_a_mac_for_one(tmp_path):
    """uname and Python are the device's edge."""
    for name, text in {"uname": "echo Darwin", "python": 'case $1 in -c) ;; *) echo "$@" ;; esac'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    shell = shutil.which("sh")
    for ring in ("all", "quick", "numerics"):
        done = subprocess.run([shell, "ci/device", ring], cwd=PROJECT, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == f"ci/mac_check.py {ring}"
    assert subprocess.run([shell, "ci/device", "other"], cwd=PROJECT, env=environment, capture_output=True).returncode == 2


def test_rillet_metal_is_native_shim_or_unset(monkeypatch):
    monkeypatch.setenv("RILLET_METAL", "native")
    assert wanted() == "native"
    monkeypatch.setenv("RILLET_METAL", "")
    assert wanted() is None
    monkeypatch.setenv("RILLET_METAL", "yes")
    with pytest.raises(ValueError, match="it must be one of native, shim"):
        wanted()


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal is there")
def test_the_small_kernel_gives_what_it_should_and_its_own_process_says_why_it_cannot_run():
    assert try_kernel(ShimMetal((0, 1)).metal_kernel) is None
    assert why_not() == probe() == f"MLX has no Metal here ({sys.platform})"


def test_a_device_that_returns_zeros_is_no_metal():
    def zeros(**arguments):
        return lambda **call: [mx.zeros(call["output_shapes"][0], call["output_dtypes"][0])]

    assert "does not run kernels" in try_kernel(zeros)
