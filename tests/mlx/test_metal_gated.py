"""activation(gate) * up as one kernel, against NumPy in float64; and that the model's operations use it."""

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install rillet[mlx]")

import mlx.core as mx

from backends.mlx.metal_norms import NormKernels
from backends.mlx.ops import Ops
from engine.errors import ConfigError
from tests.mlx.metal_support import TOLERANCES, as_float
from tests.mlx.shim import ShimMetal

F16, BF16, F32 = mx.float16, mx.bfloat16, mx.float32


def make_kernels(edits=None):
    if mx.metal.is_available() and not edits:
        return NormKernels()
    return NormKernels(ShimMetal((0,) if edits else (0, 1), edits).metal_kernel)


def expected(gate_up, activation):
    """The definitions, as they stand in the papers."""
    gate, up = np.split(as_float(gate_up), 2, axis=-1)
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


def check(kernels, shape, dtype, activation, spread=3.0):
    numbers = np.random.default_rng(shape[-1]).normal(size=shape) * spread
    gate_up = mx.array(numbers.astype(np.float32)).astype(dtype)
    found = kernels.gated(gate_up, activation)
    assert found.shape == (*shape[:-1], shape[-1] // 2)
    assert found.dtype == dtype
    right = expected(gate_up, activation)
    tolerance = {F16: 2**-11, BF16: 2**-8, F32: 2e-6}[dtype]            # of each number: it is rounded once
    np.testing.assert_allclose(as_float(found), right, rtol=1.01 * tolerance, atol=1e-6 * np.abs(right).max())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 8), F32), ((1, 2 * 131), F16), ((5, 2 * 1028), BF16), ((2, 2 * 516), F16), ((3, 2, 2 * 96), BF16),
     ((4, 2 * 1), F32), ((4, 2 * 7), F32), ((1, 2 * 1025), F32)],
)  # fmt: skip
def test_a_gate_and_its_activation_at_any_width_for_tokens_and_experts(shape, dtype, activation):
    check(make_kernels(), shape, dtype, activation)


@pytest.mark.parametrize("shape", [(2, 9), (1, 6)])
def test_a_shape_without_two_halves_or_too_small_for_a_kernel_is_refused(shape):
    with pytest.raises(ConfigError, match="8 numbers or more"):
        NormKernels().gated(mx.zeros(shape), "silu")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_the_ends_of_a_type_give_no_nan_and_no_overflow(dtype, activation):
    """Far out the activation is the number itself or nothing; cubes of large numbers leave float16, exponentials float."""
    largest = {F16: 6e4, BF16: 3e38, F32: 3e38}[dtype]
    sizes = np.array([0.0, 1e-7, 9.5, 20, 86, 88, 104, 3e4, largest], np.float32)
    gate_up = mx.array(np.concatenate([sizes, -sizes, np.ones(18, np.float32)])[None]).astype(dtype)
    with np.errstate(over="ignore"):
        right = expected(gate_up, activation)
    found = as_float(make_kernels().gated(gate_up, activation))
    np.testing.assert_allclose(found, right, rtol=2 * TOLERANCES[dtype], atol=1e-6)


def test_a_number_that_is_not_one_stays_so():
    gates = np.array([np.nan, 1, 1, 1, 1, 1, 1, 1], np.float32)
    found = np.array(make_kernels().gated(mx.array(gates[None]), "silu"))[0]
    assert np.isnan(found[0])
    assert np.isfinite(found[1:]).all()


BROKEN = {
    "another factor": ("0.044715f", "0.04f", "gelu_tanh"),
    "gate and up change places": ("x * ((u", "ups[i] * ((u", "silu"),
    "the sign is lost": ("u < 0.0f ? power : 1.0f", "1.0f", "silu"),
    "up of another row": ("row * 2 * width + first", "row * width + first", "silu"),
    "a remainder is left out": ("min(4, width - first)", "(width - first) / 4 * 4", "silu"),
}


@pytest.mark.skipif(mx.metal.is_available(), reason="a native kernel cannot be edited")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_copy_is_found(what):
    right, wrong, activation = BROKEN[what]
    with pytest.raises(AssertionError, match=r"Mismatched elements|nan location"):
        check(make_kernels({"gated": lambda text: text.replace(right, wrong)}), (3, 2 * 7), F32, activation)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_model_s_operation_is_the_kernel_where_there_are_kernels(activation):
    shim = None if mx.metal.is_available() else ShimMetal((0,))
    fast, plain = Ops(1e-6, NormKernels(shim and shim.metal_kernel)), Ops(1e-6)
    gate_up = mx.array(np.random.default_rng(0).normal(size=(2, 3, 64)).astype(np.float32))
    found, right = (np.array(ops.gated(gate_up, activation)) for ops in (fast, plain))
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert shim is None or shim.launches == 1
