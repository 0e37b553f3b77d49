"""Products with every kind of matrix, rows of it, and experts, against NumPy in float32 with gguf's dequantized weights."""

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

import mlx.core as mx
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from backends.mlx.dequantize import DEQUANTIZERS, dequantize_blocks
from backends.mlx.experts import SORTED_CHOICES, AffineExperts, BlockExperts, DenseExperts, ExpertStack, Mxfp4Experts
from backends.mlx.matrices import Affine, Blocks, Dense, Groups, Mxfp4
from backends.mlx.packing import Packer
from backends.mlx.repack import REPACKS
from engine.errors import BadModelFile, OutOfDeviceMemory
from engine.weights.tensors import STORAGE, RawTensor
from tests.mlx.blocks import float_tensor, random_tensor, weights_of

ROWS, COLUMNS = 35, 512
FLOATS = ("F32", "F16", "BF16")


def ignore(raw):
    """Nobody counts."""


def inputs(tokens, columns=COLUMNS, seed=3):
    return np.random.default_rng(seed).standard_normal((tokens, columns), dtype=np.float32)


def close(found, meant, tolerance=1e-5):
    """Relative to the largest result: single ones may cancel out."""
    assert found.dtype == mx.float32
    error = np.abs(np.array(found) - meant).max() / np.abs(meant).max()
    assert error <= tolerance, error


def exact_product(x, weights):
    return (x.astype(np.float64) @ weights.astype(np.float64).T).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("kind", [*REPACKS, *FLOATS, "Q2_K", "Q6_K", "IQ2_XXS", "IQ3_S"])
def test_a_product_is_numpys_with_the_weights_of_gguf(kind, tokens):
    raw, x = random_tensor(kind, ROWS, COLUMNS), inputs(tokens)
    matrix = Packer(mx.float32).matrix([raw], ignore)
    assert (matrix.rows, matrix.columns) == (ROWS, COLUMNS)
    close(matrix(mx.array(x)), exact_product(x, weights_of(raw)))


@pytest.mark.parametrize("kind", [*REPACKS, *FLOATS, "Q2_K", "Q6_K", "IQ2_XXS"])
@pytest.mark.parametrize("columns_first", [False, True])
def test_rows_are_looked_up_bit_by_bit(kind, columns_first):
    raw, ids = random_tensor(kind, ROWS, COLUMNS), np.array([34, 0, 7, 7], np.int32)
    matrix = Packer(mx.float32, columns_first=columns_first).matrix([raw], ignore, gathered=not columns_first)
    np.testing.assert_array_equal(np.array(matrix.gather(mx.array(ids))), weights_of(raw)[ids])


@pytest.mark.parametrize("kind", ["Q2_K", "Q6_K", "IQ2_XXS", "IQ3_S"])
def test_what_has_no_layout_rests_dequantized_where_no_kernel_reads_it(kind):
    raw = random_tensor(kind, ROWS, COLUMNS)
    matrix = Packer(mx.float32).matrix([raw], ignore)
    assert isinstance(matrix, Dense)
    np.testing.assert_array_equal(np.array(matrix.weight), weights_of(raw))


@pytest.mark.parametrize("columns_first", [False, True])
def test_floats_that_rest_by_columns_give_the_same_products(columns_first):
    raws = [random_tensor("BF16", rows, 96, seed=rows) for rows in (5, 40)]
    matrix = Packer(mx.float32, columns_first=columns_first).matrix(raws, ignore)
    x = inputs(3, 96)
    close(matrix(mx.array(x)), exact_product(x, np.concatenate([weights_of(raw) for raw in raws])))
    assert (matrix.rows, matrix.columns, matrix.nbytes) == (45, 96, 4 * 45 * 96)


@pytest.mark.parametrize(("bits", "group"), [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)])
def test_groups_of_every_size_and_bits_multiply(bits, group):
    weight = inputs(24, 256, seed=bits)
    parts = mx.quantize(mx.array(weight), group_size=group, bits=bits)
    meant, x = np.array(mx.dequantize(*parts, group_size=group, bits=bits)), inputs(2, 256)
    matrix = Affine(Groups(*parts, bits, group, "affine"), mx.float32)
    close(matrix(mx.array(x)), exact_product(x, meant))
    np.testing.assert_array_equal(np.array(matrix.gather(mx.array([3, 23]))), meant[[3, 23]])


@pytest.mark.parametrize("kind", DEQUANTIZERS)
def test_blocks_are_dequantized_on_the_device_as_gguf_does(kind):
    raw = random_tensor(kind, 5, COLUMNS)
    found = dequantize_blocks(kind, mx.array(raw.data.reshape(5, -1)), raw.storage.bytes)
    np.testing.assert_array_equal(np.array(found), weights_of(raw))


class RecordingProduct:
    """What a kernel on Metal would be: the product from the blocks, and how many tokens it was called with."""

    def __init__(self, kind):
        self.kind, self.tokens = kind, []

    def __call__(self, x, blocks):
        self.tokens.append(x.shape[0])
        return x @ dequantize_blocks(self.kind, blocks, STORAGE[self.kind].bytes).astype(x.dtype).T

    def by_choice(self, x, blocks, chosen):
        each = x[:, None] if x.ndim == 2 else x
        self.tokens.append(x.shape[0])
        weights = dequantize_blocks(self.kind, blocks, STORAGE[self.kind].bytes)[chosen]                 # (T, k, N, K)
        return (weights @ each[..., None]).squeeze(-1)


@pytest.mark.parametrize("kind", DEQUANTIZERS)
def test_types_that_kernels_read_rest_in_their_blocks(kind):
    raw, kernel = random_tensor(kind, ROWS, COLUMNS), RecordingProduct(kind)
    matrix = Packer(mx.float32, native={kind: kernel}).matrix([raw], ignore)
    assert isinstance(matrix, Blocks)
    assert (matrix.rows, matrix.columns, matrix.nbytes) == (ROWS, COLUMNS, raw.data.nbytes)
    for tokens in (1, 8, 9, 40):
        x = inputs(tokens)
        close(matrix(mx.array(x)), exact_product(x, weights_of(raw)))
    assert kernel.tokens == [1, 8, 9, 40]
    np.testing.assert_array_equal(np.array(matrix.gather(mx.array([34, 2]))), weights_of(raw)[[34, 2]])


def expert_tensors(kind, count, rows, columns):
    return [random_tensor(kind, rows, columns, seed=number) for number in range(count)]


def experts_meant(x, chosen, weights):
    """(T, k, N) by a loop over tokens and choices."""
    return np.stack([
        np.stack([
            exact_product(x[token, number] if x.ndim == 3 else x[token], weights[expert])
            for number, expert in enumerate(row)
        ])
        for token, row in enumerate(chosen)
    ])  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(("kind", "made"), [
    ("Q4_K", AffineExperts), ("Q8_0", AffineExperts), ("MXFP4", Mxfp4Experts), ("BF16", DenseExperts), ("Q6_K", BlockExperts),
])  # fmt: skip
def test_each_choice_meets_its_own_expert(kind, made, tokens):
    raws = expert_tensors(kind, 6, 20, 256)
    experts = Packer(mx.float32, native={"Q6_K": RecordingProduct("Q6_K")}).experts(raws, 6, ignore)
    assert isinstance(experts, made)
    assert experts.rows == 20
    chosen = np.random.default_rng(tokens).integers(0, 6, (tokens, 2)).astype(np.int32)
    assert (chosen.size >= SORTED_CHOICES) == (tokens == 40)
    weights = np.stack([weights_of(raw) for raw in raws])
    for x in (inputs(tokens, 256), inputs(2 * tokens, 256).reshape(tokens, 2, 256)):
        found = experts(mx.array(x), mx.array(chosen))
        assert found.shape == (tokens, 2, 20)
        close(found, experts_meant(x, chosen, weights))


def test_two_tensors_per_expert_become_the_rows_of_one():
    gates, ups = expert_tensors("Q4_0", 3, 8, 64), [random_tensor("Q4_0", 8, 64, seed=10 + number) for number in range(3)]
    experts = Packer(mx.float32).experts([raw for pair in zip(gates, ups, strict=True) for raw in pair], 3, ignore)
    chosen, x = np.array([[2, 0]], np.int32), inputs(1, 64)
    weights = np.stack([np.concatenate([weights_of(gate), weights_of(up)]) for gate, up in zip(gates, ups, strict=True)])
    close(experts(mx.array(x), mx.array(chosen)), experts_meant(x, chosen, weights))


def test_experts_that_rest_in_different_ways_stand_side_by_side():
    parts = [expert_tensors(kind, 3, rows, 256) for kind, rows in (("Q4_0", 8), ("F16", 4))]
    packer = Packer(mx.float32)
    stack = ExpertStack(tuple(packer.experts(raws, 3, ignore) for raws in parts))
    chosen, x = np.array([[2, 0], [1, 1]], np.int32), inputs(2, 256)
    weights = np.concatenate([np.stack([weights_of(raw) for raw in raws]) for raws in parts], axis=1)
    close(stack(mx.array(x), mx.array(chosen)), experts_meant(x, chosen, weights))
    assert (stack.rows, stack.nbytes) == (12, packer.nbytes)


def test_experts_of_several_types_become_floats():
    raws = [random_tensor(kind, 6, 256) for kind in ("Q4_0", "Q6_K", "Q4_0")]
    experts = Packer(mx.float32).experts(raws, 3, ignore)
    np.testing.assert_array_equal(np.array(experts.weight), np.stack([weights_of(raw) for raw in raws]))


def by_gguf(kind, values, name="w"):
    data = quantize(values, GGMLQuantizationType[kind])
    return RawTensor(name, values.shape, STORAGE[kind], np.ascontiguousarray(data).view(np.uint8).reshape(-1), "memory")


@pytest.mark.parametrize(("dtype", "kind", "scales"), [
    (mx.float16, "Q8_0", mx.float16), (mx.float16, "Q4_0", mx.float16), (mx.float16, "Q4_K", mx.float32),
    (mx.bfloat16, "Q8_0", mx.float32), (mx.bfloat16, "Q5_K", mx.float32), (mx.float32, "Q8_0", mx.float32),
])  # fmt: skip
def test_scales_have_the_activations_type_if_that_holds_them_exactly(dtype, kind, scales):
    raw = random_tensor(kind, ROWS, COLUMNS)
    matrix = Packer(dtype).matrix([raw], ignore)
    assert isinstance(matrix, Affine)
    assert matrix.groups.scales.dtype == matrix.groups.biases.dtype == scales
    x = mx.array(inputs(2)).astype(dtype)
    assert matrix(x).dtype == matrix.gather(mx.array([1])).dtype == dtype
    if scales == mx.float32:
        meant = exact_product(np.array(x.astype(mx.float32)), weights_of(raw))
        close(matrix(x).astype(mx.float32), meant, 1e-5 if dtype == mx.float32 else 5e-3)


def test_scales_that_bfloat16_holds_rest_in_it():
    raw = random_tensor("Q5_0", 3, 64)
    data = raw.data.reshape(-1, 22).copy()
    data[:, :2] = np.array([0.0625], np.float16).view(np.uint8)
    matrix = Packer(mx.bfloat16).matrix([RawTensor("w", raw.shape, raw.storage, data.reshape(-1), "memory")], ignore)
    assert matrix.groups.scales.dtype == mx.bfloat16


def test_a_scale_that_float16_does_not_reach_stays_float32():
    raw = random_tensor("Q8_0", 2, 64)
    data = raw.data.reshape(-1, 34).copy()
    data[:, :2] = np.array([60000], np.float16).view(np.uint8)                   # times -128: the bias
    matrix = Packer(mx.float16).matrix([RawTensor("w", raw.shape, raw.storage, data.reshape(-1), "memory")], ignore)
    assert matrix.groups.biases.dtype == mx.float32


@pytest.mark.parametrize(("dtype", "kind", "forced", "rests"), [
    (mx.bfloat16, "BF16", False, mx.bfloat16), (mx.float16, "F16", False, mx.float16),
    (mx.bfloat16, "F32", False, mx.float32), (mx.bfloat16, "F32", True, mx.bfloat16),
    (mx.bfloat16, "F16", False, mx.float32), (mx.float16, "IQ3_S", False, mx.float16),
])  # fmt: skip
def test_floats_are_rounded_only_if_the_user_or_a_wider_type_asks_for_it(dtype, kind, forced, rests):
    raw = random_tensor(kind, 3, 256)
    matrix = Packer(dtype, forced=forced).matrix([raw], ignore)
    assert isinstance(matrix, Dense)
    assert matrix.weight.dtype == rests
    meant = mx.array(weights_of(raw)).astype(rests)
    assert mx.array_equal(matrix.weight, meant)
    assert matrix(mx.ones((1, 256), dtype)).dtype == matrix.gather(mx.array([0])).dtype == dtype


def test_float32_whose_numbers_are_of_the_activations_type_rest_in_it():
    raw = float_tensor("F32", weights_of(random_tensor("BF16", 3, 64)))
    assert Packer(mx.bfloat16).matrix([raw], ignore).weight.dtype == mx.bfloat16


def test_mxfp4_keeps_its_scales_whatever_the_activations_are():
    matrix = Packer(mx.bfloat16).matrix([random_tensor("MXFP4", 4, 64)], ignore)
    assert isinstance(matrix, Mxfp4)
    assert matrix(mx.ones((1, 64), mx.bfloat16)).dtype == mx.bfloat16


def test_what_does_not_fit_is_refused_before_it_is_made():
    packer = Packer(mx.float32, limit_bytes=50_000)
    packer.matrix([random_tensor("Q8_0", 64, 256, name="first")], ignore)
    with pytest.raises(OutOfDeviceMemory, match=r"tensor second.*smaller quantization"):
        packer.matrix([random_tensor("F16", 64, 256, name="second")], ignore)


@pytest.mark.parametrize("kind", ["Q4_0", "BF16", "IQ3_S", "Q6_K"])
def test_a_truncated_tensor_is_refused_however_it_would_rest(kind):
    raw = random_tensor(kind, 2, 256)
    short = RawTensor("w", raw.shape, raw.storage, raw.data[:-2], "memory")
    for call in (lambda: Packer(mx.float32).matrix([short], ignore), lambda: Packer(mx.float32).experts([short], 1, ignore)):
        with pytest.raises(BadModelFile, match="the file is damaged"):
            call()
    with pytest.raises(BadModelFile, match="the file is damaged"):
        Packer(mx.float32, native={"Q6_K": RecordingProduct("Q6_K")}).matrix([short], ignore)


def test_a_quantized_tensor_without_numbers_gives_no_numbers_and_no_crash():
    values = inputs(4, 64)
    raw = by_gguf("Q8_0", values)
    data = raw.data.reshape(-1, 34).copy()
    data[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    matrix = Packer(mx.float32).matrix([RawTensor("w", raw.shape, raw.storage, data.reshape(-1), "memory")], ignore)
    found = np.isfinite(np.array(matrix(mx.array(inputs(2, 64)))))
    assert found.tolist() == [[True, False, True, True]] * 2
