"""A second real model, of mixed storage types: Qwen2.5-Coder-0.5B Q4_K_M against llama.cpp at 200 positions.

`sh ci/test full` downloads it (ci/qwen_model.py) and names it in QWEN_TEST_MODEL.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from backends.cpu.runner import CpuBackend
from engine.backend import LoadOptions
from engine.weights.checkpoint import Checkpoint, open_checkpoint

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "qwen_logits.json").read_text())
TOKENS = GOLDEN["tokens"]
PAGES = [7, 3, 9, 1, 12, 5, 8]
FILE = os.environ.get("QWEN_TEST_MODEL", "")

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not FILE, reason="QWEN_TEST_MODEL names no file: see ci/qwen_model.py"),
]


@pytest.fixture(scope="module")
def qwen() -> Iterator[Checkpoint]:
    checkpoint = open_checkpoint(Path(FILE))
    yield checkpoint
    checkpoint.close()


@pytest.fixture(scope="module")
def backend(qwen: Checkpoint) -> Iterator[CpuBackend]:
    made = CpuBackend()
    made.load(qwen.spec, qwen.tensors, LoadOptions(), lambda what, done, of: None)
    made.allocate_cache(64 << 20)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("weights", "clear_gap"),
    [
        ("dequantized", 0.1),       # llama.cpp in float32 on the same weights
        ("as_it_is", 0.1),
    ],
)
def test_next_tokens_are_those_of_llama_cpp(weights: str, clear_gap: float, backend: CpuBackend, make_step) -> None:
    step = make_step([(TOKENS, 0, PAGES)], list(range(len(TOKENS))))
    drawn = backend.wait(backend.submit(step)).tokens
    same = drawn == np.array(GOLDEN[weights]["argmax"])
    clear = np.array(GOLDEN[weights]["gap"]) > clear_gap
    assert same[clear].all(), np.flatnonzero(clear & ~same)
    assert same.mean() >= 0.95


def test_the_tokens_are_those_of_llama_cpp(qwen: Checkpoint) -> None:
    assert qwen.tokenizer.encode(qwen.tokenizer.decode(TOKENS)) == TOKENS


def test_weights_take_little_more_than_the_file(backend: CpuBackend, qwen: Checkpoint) -> None:
    assert backend.memory().weights_bytes < 1.35 * qwen.path.stat().st_size
