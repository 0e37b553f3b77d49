"""Rope frequencies against transformers (golden/rope.json), rotations against complex multiplication."""

import json
from pathlib import Path

import numpy as np
import pytest

from backends.cpu.kernels.position import rotate_and_write
from backends.cpu.rope import Rotation, attention_factor, frequencies
from engine.model.families import spec_from_config
from engine.model.spec import FrequencyFactors, Rope

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rope.json").read_text())
CASES = [name for name, value in GOLDEN.items() if isinstance(value, dict)]
NONE = np.zeros(0, np.float32)


def golden_rope(name: str) -> Rope:
    """The case's Rope, read from a config.json; LongRoPE's for a context within the original one, or beyond it."""
    scaling = GOLDEN[name]["scaling"]
    spec = spec_from_config(
        {
            "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": GOLDEN["head_size"] * 4,
            "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8, "rms_norm_eps": 1e-6,
            "max_position_embeddings": GOLDEN["context"], "rope_parameters": scaling | {"rope_theta": GOLDEN["theta"]},
        },
        "config.json",
    )  # fmt: skip
    original = scaling.get("original_max_position_embeddings", 0)
    return spec.at_context(original if name == "longrope_short" else original + 1).layers[0].attention.rope


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_factor_are_those_of_transformers(name: str) -> None:
    rope = golden_rope(name)
    np.testing.assert_allclose(frequencies(rope), GOLDEN[name]["frequencies"], rtol=1e-12)
    assert attention_factor(rope) == pytest.approx(GOLDEN[name]["attention_factor"], rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_angles_are_exact_up_to_position_262143(name: str) -> None:
    cosines, sines = Rotation.of(golden_rope(name)).at(np.array(GOLDEN["positions"], np.int32))
    np.testing.assert_allclose(cosines[:, GOLDEN["pairs"]], GOLDEN[name]["cosines"], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(sines[:, GOLDEN["pairs"]], GOLDEN[name]["sines"], rtol=1e-6, atol=1e-8)


def test_frequency_factors_divide() -> None:
    plain = frequencies(Rope(1e4, 8, interleaved=False))
    divided = frequencies(Rope(1e4, 8, interleaved=False, scaling=FrequencyFactors((1.0, 2.0, 4.0, 8.0))))
    np.testing.assert_allclose(divided, plain / [1, 2, 4, 8])


def rotated(x: np.ndarray, rope: Rope, position: int, norm: np.ndarray = NONE, bias: np.ndarray = NONE):
    """One token with two query heads and one key/value head through the kernel; the cache's key and value too."""
    size = len(x) // 4
    qkv = np.zeros((4, len(x)), np.float32)
    qkv[0] = x
    keys, values = np.zeros((3, 2, 1, size, 32), np.float32), np.zeros((3, 2, 1, 32, size), np.float32)
    cosine, sine = Rotation.of(rope).at(np.array([position], np.int32))
    rotate_and_write(
        qkv, bias, norm, norm, np.float32(1e-6), cosine, sine, rope.interleaved, np.array([70], np.int64), keys, values, 1
    )
    return qkv[0].reshape(4, size), keys[2, 1, 0, :, 6], values[2, 1, 0, 6]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotary", [16, 8])
def test_rotation_is_a_complex_product_on_the_first_numbers(interleaved: bool, rotary: int) -> None:
    rope, position = Rope(1e4, rotary, interleaved=interleaved), 100_001
    x = np.random.default_rng(0).standard_normal(64)
    out, key, value = rotated(x.astype(np.float32), rope, position)
    heads = x.reshape(4, 16)
    part = heads[:3, :rotary]
    z = part[:, 0::2] + 1j * part[:, 1::2] if interleaved else part[:, : rotary // 2] + 1j * part[:, rotary // 2 :]
    z = z * np.exp(1j * position * frequencies(rope))
    expected = heads.copy()
    expected[:3, :rotary] = np.stack([z.real, z.imag], -1).reshape(3, rotary) if interleaved else np.hstack([z.real, z.imag])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(key, out[2])
    np.testing.assert_array_equal(value, out[3])


def test_bias_comes_before_the_head_norm_and_the_norm_before_the_rotation() -> None:
    rng = np.random.default_rng(1)
    x, bias, norm = (rng.standard_normal(n).astype(np.float32) for n in (64, 64, 16))
    out, _, value = rotated(x, Rope(1e4, 16, interleaved=False), 0, norm, bias)
    heads = (x + bias).reshape(4, 16)
    normed = heads / np.sqrt((heads.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6) * norm
    np.testing.assert_allclose(out[:3], normed[:3], rtol=1e-5)
    np.testing.assert_allclose(value, heads[3])
