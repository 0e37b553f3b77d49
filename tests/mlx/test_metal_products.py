"""Products with native GGUF blocks, for few tokens, many and choices of experts, against gguf's dequantization and NumPy."""

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

import mlx.core as mx

from backends.mlx.experts import BlockExperts
from backends.mlx.metal_products import BLOCK_BYTES, BLOCK_WEIGHTS, BlockProduct, ProductKernels
from engine.errors import ConfigError
from engine.model.spec import Mixture
from tests.mlx.backends import loaded, metal_kernel
from tests.mlx.blocks import random_tensor, weights_of
from tests.mlx.metal_support import TOLERANCES, as_float
from tests.mlx.shim import ShimMetal
from tests.mlx.test_families import TOLERANCE, run
from tests.support.random_models import RandomSource, attention, model

F16, BF16, F32 = mx.float16, mx.bfloat16, mx.float32
SAID = r"the error is|error is|depend on the order|was touched|end of an allocation"
KINDS = tuple(BLOCK_BYTES)


def make_kernels(edits=None):
    if mx.metal.is_available() and not edits:
        return ProductKernels()
    return ProductKernels(ShimMetal((0, 1, 2) if edits else (0, 1), edits).metal_kernel)


def full(cases):
    return (pytest.param(*one, marks=pytest.mark.full) for one in cases)


def numbers(shape, dtype, seed):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def assert_near(out, expected, weights, dtype):
    """Relative to the largest number, or to the deviation of such products: a single one may cancel out."""
    assert out.dtype == dtype
    assert out.shape == expected.shape
    found = as_float(out)
    assert np.isfinite(found).all(), "the error is a number that is none"
    size = max(np.abs(expected).max(), np.linalg.norm(weights, axis=-1).max())
    error = np.abs(found - expected).max() / size
    assert error <= TOLERANCES[dtype], f"the error is {error:.2e} of the largest number"


def check(product, kind, rows, columns, tokens, dtype):
    raw, x = random_tensor(kind, rows, columns, seed=tokens), numbers((tokens, columns), dtype, rows)
    out, weights = product(x, mx.array(raw.data.reshape(rows, -1)), kind), weights_of(raw).astype(np.float64)
    assert_near(out, as_float(x) @ weights.T, weights, dtype)


# ---- few tokens ---------------------------------------------------------------------------------------------------------

FEW = [
    ("Q2_K", 7, 256, 1, F16), ("Q2_K", 9, 2048, 8, BF16), ("Q3_K", 5, 512, 3, F16), ("Q4_K", 21, 1024, 1, F16),
    ("Q4_K", 1, 2560, 4, F32), ("Q5_K", 7, 4096, 2, BF16), ("Q5_K", 3, 768, 7, F16), ("Q6_K", 6, 1280, 5, F16),
    ("Q4_0", 9, 96, 1, F16), ("Q4_1", 7, 576, 2, F32), ("Q5_0", 5, 32, 3, F16), ("Q5_1", 6, 1536, 1, BF16),
    ("Q8_0", 13, 576, 8, F16), ("IQ4_NL", 3, 288, 4, F16), ("IQ4_XS", 5, 1280, 1, F16),
]  # fmt: skip
ALL_FEW = [(kind, rows, columns, tokens, F16) for kind in KINDS for rows in (1, 35)
           for columns in (*((32, 96, 576) if BLOCK_WEIGHTS[kind] == 32 else ()), 256, 768, 4096)
           for tokens in (1, 2, 3, 4, 8)]  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "columns", "tokens", "dtype"), [*FEW, *full(ALL_FEW)])
def test_a_product_is_that_of_the_dequantized_weights(kind, rows, columns, tokens, dtype):
    check(make_kernels().block_matvec, kind, rows, columns, tokens, dtype)


BROKEN = {
    "no barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    "a block too many": ("number < count;", "number <= count + 3;"),
    "the last rows are not held back": ("min(first + row, rows - 1)", "(first + row)"),
    "a row too many is written": ("if (row < rows) out", "out"),
    "no minimum": ("- below[row] * total", ""),
}


@pytest.mark.skipif(mx.metal.is_available(), reason="a native kernel cannot be edited")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_copy_is_found(what):
    right, wrong = BROKEN[what]
    kernels = make_kernels({"block_matvec": lambda text: text.replace(right, wrong)})
    with pytest.raises(AssertionError, match=SAID):
        check(kernels.block_matvec, "Q6_K", 5, 2048, 2, F16)


@pytest.mark.skipif(mx.metal.is_available(), reason="a native kernel cannot be edited")
def test_units_behind_the_end_of_a_row_are_held_back():
    kernels = make_kernels({"block_matvec": lambda text: text.replace("if (UNITS == 1 && unit >= units) continue;", "")})
    with pytest.raises(AssertionError, match=SAID):
        check(kernels.block_matvec, "Q8_0", 5, 576, 2, F16)


# ---- many tokens --------------------------------------------------------------------------------------------------------

MANY = [("Q2_K", 33, 256, 9, F16), ("Q3_K", 5, 512, 31, F16), ("Q4_K", 70, 256, 100, F16), ("Q4_K", 65, 768, 33, F32),
        ("Q5_K", 1, 4096, 32, F16), ("Q6_K", 37, 512, 33, BF16), ("Q4_0", 33, 96, 9, F16), ("Q4_1", 17, 576, 33, F32),
        ("Q5_0", 5, 32, 12, F16), ("Q5_1", 35, 288, 17, F16), ("Q8_0", 9, 1536, 31, BF16), ("IQ4_NL", 40, 64, 9, F16),
        ("IQ4_XS", 3, 512, 32, F16)]  # fmt: skip
ALL_MANY = [(kind, rows, columns, tokens, dtype) for kind in KINDS
            for rows, columns in ((1, 256), (9, 4096), (67, 1024 if BLOCK_WEIGHTS[kind] == 256 else 992))
            for tokens in (9, 31, 33, 100) for dtype in (F16, BF16, F32)]  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "columns", "tokens", "dtype"), [*MANY, *full(ALL_MANY)])
def test_a_product_of_many_tokens_is_that_of_the_dequantized_weights(kind, rows, columns, tokens, dtype):
    check(make_kernels().block_matmul, kind, rows, columns, tokens, dtype)


@pytest.mark.parametrize(("kind", "tokens"), [("Q4_K", 33), *full((kind, tokens) for kind in KINDS for tokens in (9, 100))])
def test_rows_that_fill_the_gpu_come_in_larger_tiles(kind, tokens, monkeypatch):
    monkeypatch.setattr("backends.mlx.metal_products.MANY_GROUPS", 1)
    check(make_kernels().block_matmul, kind, 75, 256, tokens, F16)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
BROKEN_TILES = {
    "no barrier before a step": lambda text: text.replace(BARRIER, "", 1),
    "no barrier after a step": lambda text: "".join(text.rsplit(BARRIER, 1)),
    "a step too many": lambda text: text.replace("step < units;", "step <= units;"),
    "the last rows are not held back": lambda text: text.replace("min(first_row + my_row, rows - 1)", "(first_row + my_row)"),
    "the last tokens are not held back": lambda text: text.replace("min(first + at / 4, behind - 1)", "(first + at / 4)"),
    "a row too many is written": lambda text: text.replace("if (row < rows) out", "out"),
    "a token too many is written": lambda text: text.replace("if (place >= behind) continue;", ""),
    "no minimum": lambda text: text.replace("rillet::code_at(codes, j) - below", "rillet::code_at(codes, j)"),
}


@pytest.mark.skipif(mx.metal.is_available(), reason="a native kernel cannot be edited")
@pytest.mark.parametrize("what", BROKEN_TILES)
def test_a_broken_copy_of_the_tiles_is_found(what):
    kernels = make_kernels({"block_matmul": BROKEN_TILES[what]})
    with pytest.raises(AssertionError, match=SAID):
        check(kernels.block_matmul, "Q6_K", 5, 256, 11, F16)


# ---- experts ------------------------------------------------------------------------------------------------------------


def check_experts(product, kind, experts, rows, columns, chosen, dtype, *, own_inputs=False):
    raw = random_tensor(kind, experts * rows, columns, seed=experts)
    weights = weights_of(raw).reshape(experts, rows, columns).astype(np.float64)
    tokens, k = chosen.shape
    x = numbers((tokens, k, columns) if own_inputs else (tokens, columns), dtype, rows)
    each = as_float(x) if own_inputs else np.repeat(as_float(x)[:, None], k, 1)
    out = product(x, mx.array(raw.data.reshape(experts, rows, -1)), mx.array(chosen.astype(np.int32)), kind)
    assert_near(out, np.einsum("tkc,tknc->tkn", each, weights[chosen]), weights, dtype)


def choices(experts, tokens, k, seed=0):
    return np.random.default_rng(seed).integers(0, experts, (tokens, k))


EXPERT_CASE = ("kind", "experts", "rows", "columns", "tokens", "k", "dtype", "own")
EXPERTS = [
    ("Q4_0", 5, 9, 96, 3, 2, F16, False),
    ("Q4_K", 5, 9, 512, 1, 2, F16, False), ("Q6_K", 3, 18, 256, 7, 2, F32, True), ("Q2_K", 9, 5, 1280, 3, 3, BF16, False)
]  # fmt: skip
ALL_EXPERTS = [(kind, 8, rows, 768, tokens, 3, F16, own) for kind in KINDS for rows in (1, 35) for tokens in (1, 4, 33)
               for own in (False, True)]  # fmt: skip


@pytest.mark.parametrize(EXPERT_CASE, [*EXPERTS, *full(ALL_EXPERTS)])
def test_each_choice_is_multiplied_with_its_expert(kind, experts, rows, columns, tokens, k, dtype, own):
    chosen = choices(experts, tokens, k)
    check_experts(make_kernels().block_expert_matvec, kind, experts, rows, columns, chosen, dtype, own_inputs=own)


SORTED = [
    ("Q8_0", 3, 37, 96, 21, 2, F16, False),
    ("Q4_K", 3, 37, 256, 41, 2, F16, False), ("Q5_K", 9, 5, 512, 20, 3, F32, True), ("Q6_K", 4, 33, 256, 9, 2, BF16, False)
]  # fmt: skip


@pytest.mark.parametrize(EXPERT_CASE, [*SORTED, *full(ALL_EXPERTS)])
def test_choices_in_order_of_their_experts_give_the_same(kind, experts, rows, columns, tokens, k, dtype, own):
    chosen = choices(experts, tokens, k, seed=2)
    check_experts(make_kernels().block_expert_matmul, kind, experts, rows, columns, chosen, dtype, own_inputs=own)


@pytest.mark.parametrize("chosen", [[[1, 1]] * 20, [[0, 3]] * 16, [[3, 3]] * 4, [[2]]])
def test_experts_that_nobody_or_everybody_chose(chosen):
    check_experts(make_kernels().block_expert_matmul, "Q4_K", 4, 3, 256, np.array(chosen), F16)


FAR = 20_000_000
BEHIND = f"{FAR * 3 * 144}ul"            # bytes of so many experts: 3 rows of a block of 144 each
FAR_EDITS = {
    "block_matvec": lambda text: text.replace("= chosen[choice]", f"= chosen[choice] + {FAR}").replace(
        "= blocks + (", f"= blocks - {BEHIND} + ("
    ),
    "block_matmul": lambda text: text.replace("size_t(expert) * rows", f"size_t(expert + {FAR}) * rows").replace(
        "= blocks + line", f"= blocks - {BEHIND} + line"
    ),
}
SHORT = {
    "block_matvec": (f"= blocks - {BEHIND} + (line", f"= blocks - {BEHIND} + int(line"),
    "block_matmul": ("line * row_bytes;", "int(line * row_bytes);"),
}


@pytest.mark.skipif(mx.metal.is_available(), reason="a native kernel cannot be edited")
@pytest.mark.parametrize("name", FAR_EDITS)
def test_an_expert_behind_8_gb_is_reached_and_would_not_be_by_32_bits(name):
    """The first of FAR + 2 experts lie where no memory is."""
    kernels = make_kernels(FAR_EDITS)
    product = kernels.block_expert_matvec if name == "block_matvec" else kernels.block_expert_matmul
    check_experts(product, "Q4_K", 2, 3, 256, choices(2, 2, 2), F16)
    kernels = make_kernels({name: lambda text: FAR_EDITS[name](text).replace(*SHORT[name])})
    product = kernels.block_expert_matvec if name == "block_matvec" else kernels.block_expert_matmul
    with pytest.raises(AssertionError, match=SAID):
        check_experts(product, "Q4_K", 2, 3, 256, choices(2, 2, 2), F16)


@pytest.mark.parametrize(("kind", "tokens"), [("Q4_K", 3), ("Q4_K", 9)])
def test_a_product_takes_the_kernel_for_its_tokens(kind, tokens):
    metal = ShimMetal((0,))
    product = BlockProduct(ProductKernels(metal.metal_kernel), kind)
    check(lambda x, blocks, _: product(x, blocks), kind, 3, 256, tokens, F16)
    check_experts(lambda x, blocks, chosen, _: product.by_choice(x, blocks, chosen), kind, 4, 3, 256,
                  choices(4, tokens, 2), F16)  # fmt: skip
    wanted = "block_matmul" if tokens > 8 else "block_matvec"
    assert all(f"custom_kernel_rillet_{wanted}" in text for text in metal.generated.values())
    assert metal.launches == 2


def test_a_mixture_of_k_types_rests_in_its_blocks_and_says_what_the_oracle_says():
    types = {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"}
    spec = model("qwen3_moe", 256, attention(256, 64), Mixture(8, 2, 256, True))
    with loaded(spec, RandomSource(spec, types), make_kernel=metal_kernel()) as (cpu, mlx):
        for layer in mlx.session.weights.layers:
            assert type(layer.feed.gate_up) is type(layer.feed.down) is BlockExperts
        run(cpu, mlx, TOLERANCE)


# ---- refusals -----------------------------------------------------------------------------------------------------------


def test_what_has_no_kernel_is_refused_with_its_value():
    kernels, blocks = ProductKernels(), mx.zeros((4, 84), mx.uint8)
    with pytest.raises(ConfigError, match="IQ2_XXS has no Metal product"):
        kernels.block_matvec(mx.zeros((1, 256)), blocks, "IQ2_XXS")
    with pytest.raises(ConfigError, match=r"\(9, 256\), it must be"):
        kernels.block_matvec(mx.zeros((9, 256)), blocks, "Q2_K")
    with pytest.raises(ConfigError, match=r"must be \(N, 168\)"):
        kernels.block_matmul(mx.zeros((1, 512)), blocks, "Q2_K")
    with pytest.raises(ConfigError, match=r"\(0, 256\), it must be"):
        kernels.block_matmul(mx.zeros((0, 256)), blocks, "Q2_K")
    with pytest.raises(ConfigError, match=r"must be \(E, N, 84\)"):
        kernels.block_expert_matvec(mx.zeros((1, 256)), blocks, mx.zeros((1, 2), mx.int32), "Q2_K")
    with pytest.raises(ConfigError, match=r"chosen has shape \(3, 2\)"):
        kernels.block_expert_matvec(mx.zeros((1, 256)), blocks[None], mx.zeros((3, 2), mx.int32), "Q2_K")
