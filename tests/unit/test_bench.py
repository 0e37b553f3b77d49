"""The bench's parts that are not speed: workloads, synthetic models, refusals, and one row from end to end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.bench import __main__ as bench
from engine.bench import peer as peer_module
from engine.bench.figures import Figure
from engine.bench.synthetic import MODELS, TYPES, synthetic_checkpoint
from engine.bench.tables import TABLES
from engine.bench.workloads import WORKLOADS, workload
from engine.weights.tensors import to_float32


def test_nv256_is_random_lengths_within_its_bounds_and_always_the_same() -> None:
    work = workload("NV256", 256, 1.0)
    assert len(work.prompts) == len(work.answers) == 256
    assert all(100 <= len(prompt) <= 1024 for prompt in work.prompts)
    assert all(100 <= answer <= 1024 for answer in work.answers)
    assert len(set(work.answers)) > 100
    assert workload("NV256", 256, 1.0) == work


def test_vr256_is_the_same_prompt_of_sixteen_tokens() -> None:
    work = workload("VR256", 256, 1.0)
    assert len(set(work.prompts)) == 1
    assert len(work.prompts[0]) == 16
    assert set(work.answers) == {1024}


@pytest.mark.parametrize("name", WORKLOADS)
def test_another_seed_keeps_the_shape_and_changes_the_tokens(name: str) -> None:
    work = workload(name, 8, 0.1)
    other = work.with_seed(3)
    assert [len(prompt) for prompt in other.prompts] == [len(prompt) for prompt in work.prompts]
    assert other.answers == work.answers
    assert other.prompts != work.prompts


@pytest.mark.parametrize(
    ("name", "kind"), [*(("qwen3-0.6b", kind) for kind in TYPES), *((name, "q4_k_m") for name in MODELS)]
)
def test_a_synthetic_layer_has_the_spec_s_shapes_and_sane_weights(name: str, kind: str) -> None:
    checkpoint = synthetic_checkpoint(f"{name}:{kind}")
    shapes = checkpoint.spec.shapes()
    for part in ("query", "value", "attention_norm", "down", "experts.3.down", "router"):
        full = f"layers.0.{part}"
        if full not in shapes:
            continue
        tensor = checkpoint.tensors.tensor(full)
        assert tensor.shape == shapes[full]
        assert tensor.data.nbytes == tensor.rows * tensor.row_bytes
        if len(tensor.shape) == 2:
            few = tensor.data[: 8 * tensor.row_bytes]
            values = to_float32(type(tensor)(full, (8, tensor.shape[1]), tensor.storage, few, "test"))
            assert 0.02 < values.std() < 0.06
            assert np.isfinite(values).all()


def test_q4_k_m_gives_more_bits_to_some_layers_and_falls_back_where_blocks_do_not_fit() -> None:
    kinds = {synthetic_checkpoint("qwen3-8b:q4_k_m").tensors.tensor(f"layers.{i}.value").storage.name for i in range(8)}
    assert kinds == {"Q4_K", "Q6_K"}
    assert synthetic_checkpoint("qwen2.5-0.5b:q4_k_m").tensors.tensor("layers.5.query").storage.name == "Q5_0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "B2"], "there are core, start"),
        (["--rows", "B1,b1"], "B1 twice"),
        (["--rounds", "0"], "--rounds 0: it is above 0"),
        (["--scale", "nan"], "it is above 0"),
        (["--json", "/no/such/folder/x.json"], "a folder that exists"),
        (["--synthetic", "gpt-5:q4_k_m"], "write NAME:TYPE"),
        (["--table", "leaf"], "there is seed"),
        (["--table", "seed", "--rows", "B1"], "leave --rows"),
        (["--peer", "vllm"], "give llama.cpp, or the path"),
        (["--rows", "NV256", "--peer", sys.executable], "leave it out of --rows"),
        (["--rows", "B1", "--backend", "null", "--peer", sys.executable], "is it llama-batched-bench"),
        (["--peer", "llama.cpp", "--synthetic", "qwen3-0.6b:bf16"], "a file that both read"),
        (["--rows", "B1", "--bandwidth", "3000"], "give both"),
        (["--rows", "SRV", "--synthetic", "qwen3-0.6b:bf16"], "needs a real model"),
        (["--rows", "B1", "--peer", "llama.cpp", "--peer-python", "/no/python"], "name a Python interpreter"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_cure(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure_machine", lambda threads: bench.Machine(threads, 1e10, 1e10))
    assert bench.main(arguments) == 2
    assert message in " ".join(capsys.readouterr().out.split())


PEERS = {
    "garbage": ("echo no json", "it says 'no json'"),
    "another object": ("echo '{}'", "it says '{}'"),
    "an end": ("echo out of memory >&2; exit 3", "out of memory"),
    "silence": ("sleep 600", "it says nothing"),
    "noise and silence": ("head -c 300000 /dev/zero | tr '\\0' x >&2; sleep 600", "it says nothing|xxx"),
    "an end after the greeting": ("echo '{\"version\": 1}'; exit 0", "it ended with 0|does not listen"),
    "no rates": ("echo '{\"version\": 1}'; read line; echo '{\"prompt\": null}'; sleep 600", "it says"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="the peer is a shell script")
@pytest.mark.parametrize("kind", PEERS)
def test_a_peer_that_misbehaves_is_told_and_ended(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, message = PEERS[kind]
    peer = tmp_path / "python"
    peer.write_text(f"#!/bin/sh\n{script}\n")
    peer.chmod(0o700)
    started = []

    class Remembered(subprocess.Popen):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(peer_module, "PATIENCE_S", 1.0)
    monkeypatch.setattr(peer_module.subprocess, "Popen", Remembered)
    monkeypatch.setattr(bench, "measure_machine", lambda threads: bench.Machine(threads, 1e10, 1e10))
    arguments = ["--rows", "B1", "--rounds", "1", "--backend", "null", "--peer", "llama.cpp", "--peer-python", str(peer)]
    assert bench.main(arguments) == 2
    assert re.search(message, "".join(capsys.readouterr().out.split("\n")))
    assert [child.poll() is not None for child in started] == [True]


def test_a_row_is_measured_and_written_with_its_settings(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    arguments = ["--rows", "VR256", "--sequences", "2", "--scale", "0.01", "--rounds", "1", "--backend", "null"]
    assert bench.main([*arguments, "--json", str(target)]) == 0
    written = json.loads(target.read_text())
    assert written["machine"]["bandwidth"] > 1e8
    (figure,) = written["figures"]
    assert figure["name"] == "VR256"
    assert figure["value"] > 0
    assert figure["settings"] == "2 x the same prompt of 16, 10 tokens"


def test_every_row_of_a_table_has_its_model_and_workload() -> None:
    for row in TABLES["seed"]:
        assert synthetic_checkpoint(row.synthetic).spec.hidden_size >= 1024
        assert row.workload in WORKLOADS


def test_a_figure_shows_its_ratios() -> None:
    figure = Figure("B1", 50.0, "tok/s", "", limit=200.0, peer=40.0)
    assert (figure.of_limit, figure.times_peer) == ("25%", "1.25 x")
