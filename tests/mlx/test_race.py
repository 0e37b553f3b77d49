"""Blocks or groups: what is faster by the clock is taken, and blocks where it is a draw or nothing else holds the weights."""

import logging

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

import mlx.core as mx

from backends.mlx import race, weights
from backends.mlx.metal_products import BlockProduct, ProductKernels
from backends.mlx.race import blocks_are_faster
from engine.weights.tensors import STORAGE, RawTensor
from tests.mlx.backends import loaded, metal_kernel
from tests.mlx.test_families import TOLERANCE, run
from tests.support.random_models import small_model

ROWS, COLUMNS = 24, 512


def tensor(kind):
    storage = STORAGE[kind]
    data = np.random.default_rng(0).integers(0, 100, ROWS * COLUMNS // storage.block * storage.bytes, dtype=np.uint8)
    return RawTensor("x", (ROWS, COLUMNS), storage, data, "test")


class Clock:
    """Moves only by what `costs` says of each product of so many tokens with blocks, and one second for each with groups."""

    def __init__(self, kind, costs):
        self.now, self.costs = 0.0, costs
        self.real = BlockProduct(ProductKernels(metal_kernel()), kind)
        self.seen = []

    def __call__(self):
        return self.now

    def product(self, x, blocks):
        self.now += self.costs[len(x)]
        self.seen.append((len(x), blocks.shape[0]))
        return self.real(x, blocks)

    def groups(self, x):
        self.now += 1.0


@pytest.fixture
def race_of(monkeypatch):
    """(kind, seconds of blocks by tokens) -> whether blocks won, and the clock."""

    def run(kind, costs):
        clock = Clock(kind, costs)
        whole = mx.quantized_matmul

        def timed(*inputs, **options):
            clock.groups(inputs[0])
            return whole(*inputs, **options)

        monkeypatch.setattr(mx, "quantized_matmul", timed)
        return blocks_are_faster(clock.product, tensor(kind), mx.float32, clock), clock

    return run


@pytest.mark.parametrize(
    ("costs", "blocks_win"),
    [
        ({1: 0.5, 256: 0.5}, True),
        ({1: 1.0, 256: 1.0}, True),
        ({1: 1.05, 256: 1.05}, True),          # fewer bytes decide a draw
        ({1: 1.2, 256: 1.0}, False),
        ({1: 0.9, 256: 20.0}, True),           # an answer is many single tokens
        ({1: 0.9, 256: 60.0}, False),          # until a prompt takes far longer
    ],
)
def test_what_takes_a_turn_less_time_is_taken(race_of, costs, blocks_win, caplog):
    with caplog.at_level(logging.INFO, "rillet"):
        won, clock = race_of("Q4_K", costs)
    assert won is blocks_win
    assert {rows for _, rows in clock.seen} == {ROWS}
    assert [record.message.split(":")[0] for record in caplog.records] == ["Q4_K rests in MLX's groups"] * (not blocks_win)


def test_the_round_that_compiles_does_not_count(race_of):
    class Dear(dict):
        """The first products of each size take an hour."""

        def __getitem__(self, tokens):
            dear = self.get(tokens, 0) < race.AT_ONCE
            self[tokens] = self.get(tokens, 0) + 1
            return 3600.0 if dear else 0.9

    won, _ = race_of("Q4_0", Dear())
    assert won


@pytest.mark.parametrize("kind", ["Q2_K", "Q6_K"])
def test_a_type_that_no_groups_hold_is_not_timed(race_of, kind):
    won, clock = race_of(kind, {})
    assert won
    assert clock.now == 0


def test_a_model_whose_groups_are_faster_rests_in_groups_and_says_the_same(monkeypatch):
    asked = []

    def slower(product, raw, dtype):
        asked.append(raw.storage.name)
        return False

    monkeypatch.setattr(weights, "blocks_are_faster", slower)
    monkeypatch.setattr(weights, "TIMED", True)
    spec, tensors = small_model("k-quants")
    with loaded(spec, tensors, make_kernel=metal_kernel()) as (cpu, mlx):
        run(cpu, mlx, TOLERANCE)
        kinds = {type(layer.attention_output).__name__ for layer in mlx.session.weights.layers}
    assert kinds == {"Affine"}
    assert len(asked) == len(set(asked)) > 1           # once for each type
