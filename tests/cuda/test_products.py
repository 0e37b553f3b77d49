"""Products with packed weights on the emulated device, against float64 with gguf's weights rounded to bfloat16."""

import numpy as np
import pytest

from backends.cuda import products
from backends.cuda.matrices import PACKINGS
from engine.errors import StepFailed
from engine.weights.tensors import STORAGE, to_float32
from tests.cuda.packed import CLOSE, Bench, far, kernels_of, rounded, to_bfloat16, tokens_of

full = pytest.mark.full
WITH_MINIMA = 1e-4                                      # a weight in some hundreds is rounded to its other neighbour
SOME = ["Q4_1", "Q8_0", "Q4_K", "Q6_K", "BF16"]
QUICK = {(name, 8) for name in SOME}
QUICK |= {("Q4_K", 16), ("Q4_1", 16), ("Q6_K", 32), ("Q8_0", 64), ("BF16", 96), ("Q4_K", 96)}
TILES = products.EXPERT_TILES
EACH = [pytest.param(name, tile, marks=[] if (name, tile) in QUICK else full) for name in PACKINGS for tile in TILES]


def some_columns(name, most):
    """Near `most`, and odd: the last tile is cut wherever the type's blocks allow it."""
    block = STORAGE[name].block
    return {1: most - 40, 32: most - 32, 256: most}[block]


def near(name):
    return WITH_MINIMA if name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K") else CLOSE


# ---- what a product is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tile"), EACH)
def test_every_type_and_tile_is_close_to_float64(name, tile):
    """Rows and tokens that fill no tile; columns for every group of warps, and an odd end."""
    columns, tokens = some_columns(name, 1280), tile + 5 if tile > 8 else 7
    bench = Bench(name, 150 if tile == 128 else 87, columns, most_tokens=tile, seed=3)
    x = tokens_of(tokens, columns)
    assert far(bench.product(x, tile=tile), bench.wanted(x)) < near(name)


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
def test_few_tokens_of_few_rows(tokens):
    bench = Bench("Q6_K", 5, 256, seed=tokens)
    x = tokens_of(tokens, 256)
    assert far(bench.product(x), bench.wanted(x)) < CLOSE


@pytest.mark.parametrize("columns", [8, 24, 64, 72, 256, 264, 2056, 4104])
def test_columns_that_fill_no_tile(columns):
    """Nothing beyond a row's end is read: beside the arrays, memory faults, and padding is not multiplied by NaNs."""
    for seed in (0, 1):
        bench = Bench("BF16", 18, columns, seed=seed)
        x = tokens_of(3, columns)
        assert far(bench.product(x), bench.wanted(x)) < CLOSE


@pytest.mark.parametrize("tile", [8, 16, pytest.param(96, marks=full)])
@pytest.mark.parametrize("columns", [1, 7, 90, 259])
def test_columns_of_any_count(columns, tile):
    bench = Bench("BF16", 18, columns, most_tokens=tile, seed=1)
    x = tokens_of(tile - 3, columns)
    assert far(bench.product(x, tile=tile), bench.wanted(x)) < CLOSE


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", pytest.param("Q3_K", marks=full), pytest.param("IQ4_XS", marks=full)])
def test_weights_are_gguf_rounded_once(name):
    """Tokens that are rows of the identity bring the weights out, as the tensor cores get them."""
    bench = Bench(name, 32, 256)
    for start in range(0, 256, 8):
        x = np.eye(256, dtype=np.float32)[start : start + 8]
        assert np.array_equal(bench.product(x), rounded(to_float32(bench.raws[0]))[:, start : start + 8].T)


@pytest.mark.parametrize("name", ["Q4_K", "Q4_1", pytest.param("Q2_K", marks=full), pytest.param("Q5_K", marks=full)])
def test_minima_move_a_weight_by_one_rounding_at_most_and_hardly_ever(name):
    bench = Bench(name, 32, 256)
    got = np.concatenate([bench.product(np.eye(256, dtype=np.float32)[start : start + 8]) for start in range(0, 256, 8)]).T
    exact = to_float32(bench.raws[0])
    assert np.mean(got != rounded(exact)) < 0.01
    assert np.all(np.abs(got - exact) <= 2**-8 * np.abs(exact) + 1e-6)


def test_bfloat16_results_are_the_float32_ones_rounded():
    for tile in (8, 16):
        bench = Bench("Q4_K", 40, 512, most_tokens=tile)
        x = tokens_of(tile, 512)
        assert np.array_equal(bench.product(x, "bf16", tile), rounded(bench.product(x, "f32", tile)))


@pytest.mark.parametrize("tile", [8, 16])
def test_only_the_matrix_own_columns_are_written(tile):
    bench = Bench("Q6_K", 40, 256, most_tokens=tile)
    x = tokens_of(tile - 2, 256)
    out = bench.device.put(np.full((tile, 60), 7.0, np.float32))
    products.product(bench.stream, bench.device.put(to_bfloat16(x)), bench.matrix, out, 11)
    got = bench.device.get(out)
    assert far(got[: tile - 2, 11:51], bench.wanted(x)) < CLOSE
    got[: tile - 2, 11:51] = 7
    assert np.all(got == 7)


@pytest.mark.parametrize("tile", [8, 16])
def test_a_token_gets_the_same_bits_whatever_is_beside_it(tile):
    x = tokens_of(tile, 1024)
    alone = Bench("Q4_K", 40, 1024, most_tokens=tile).product(x[2:3], tile=tile)
    for seed in (0, 1, 6):
        among = Bench("Q4_K", 40, 1024, most_tokens=tile, seed=seed).product(x, tile=tile)
        assert np.array_equal(among[2:3], alone)


def test_large_activations_and_zeros_stay_what_they_are():
    bench = Bench("BF16", 16, 64)
    x = np.zeros((3, 64), np.float32)
    x[1, 5], x[2, 6] = rounded([3e38, np.inf])
    got = bench.product(x)
    assert not got[0].any()
    assert np.allclose(got[1], bench.wanted(x[1:2])[0], rtol=1e-6)
    assert np.all(np.isinf(got[2]))


# ---- which kernel ---------------------------------------------------------------------------------------------------------


def test_tiles_grow_with_tokens_as_far_as_every_multiprocessor_has_a_block():
    tall, low = 100_000, 1024
    for tokens, tile in ((1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 96), (1000, 96)):
        assert products.tile_of(tokens, tall) == tile
    assert [products.tile_of(tokens, low) for tokens in (8, 64, 128, 512, 4096)] == [8, 16, 16, 32, 96]


def test_everything_that_a_count_of_tokens_may_launch_is_in_its_list():
    bench = Bench("BF16", 16, 64)
    for most in (1, 8, 9, 16, 40, 200, 4096):
        ready = {kernel.name for kernel in products.kernels_for([bench.matrix], most)}
        for tokens in range(1, most + 1):
            for rows in (16, 5000, 300_000):
                assert kernels_of(bench.matrix, products.tile_of(tokens, rows))[0].name in ready
    assert {kernel.name for kernel in products.all_kernels()} >= ready


def test_tiles_of_experts_have_room_for_an_average_share():
    assert products.tile_tokens(1, 8, 128) == products.LEAST_TILE_TOKENS
    assert products.tile_tokens(64, 8, 128) == 8
    assert products.tile_tokens(512, 8, 128) == 64
    assert products.tile_tokens(4096, 8, 8) == 96


def test_rows_beyond_what_one_launch_has_in_shared_memory_are_no_matter():
    for tiling in products.TILINGS.values():
        assert tiling.shared_bytes <= 99 << 10


# ---- broken copies are found out ------------------------------------------------------------------------------------------

BREAKS = {
    "a warp's sums are read before all are written": ("product_few.cu", 8, "    __syncthreads();\n", ""),
    "a stage is read before it is there": ("product_many.cu", 32, "copies_wait<STAGES - 2>();", "copies_wait<STAGES - 1>();"),
    "a stage is overwritten while it is read": (
        "product_many.cu", 32, "copies_wait<STAGES - 2>();\n                __syncthreads();", "copies_wait<STAGES - 2>();",
    ),
    "groups' sums are read before they are written": (
        "product_many.cu", 32, "__syncthreads();\n        if (k_warp > 0) return;", "if (k_warp > 0) return;",
    ),
    "sums overwrite stages that are read": (
        "product_many.cu", 32, "__syncthreads();\n        if (k_warp > 0)\n#pragma", "if (k_warp > 0)\n#pragma",
    ),
    "tokens' places are read before they are written": (
        "product_many.cu", 32, "offset_of(i);\n    __syncthreads();", "offset_of(i);",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_a_missing_wait_or_barrier_is_seen(what):
    file, tile, text, instead = BREAKS[what]
    columns = 1016                                      # the last stage is the first one's place
    x = tokens_of(tile, columns)

    def wrong(seed):
        try:
            edits = {file: lambda whole: whole.replace(text, instead)}
            bench = Bench("BF16", 40, columns, most_tokens=tile, seed=seed, edits=edits)
            return not far(bench.product(x, tile=tile), bench.wanted(x)) < CLOSE
        except StepFailed:
            return True

    assert any(wrong(seed) for seed in (0, 1, 2, 3, 4))
