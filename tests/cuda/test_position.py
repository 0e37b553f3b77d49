"""Rotary positions, norms of heads, and keys and values on their way into pages, against NumPy in float64."""

import numpy as np
import pytest

from backends.cpu.rope import Rotation as CpuRotation
from backends.cuda.cache import CacheLayout
from backends.cuda.rope import Rotation, position_kernels, rotate_and_write, rotations
from engine.errors import UnsupportedModel
from engine.model.spec import FrequencyFactors, LinearScaling, Llama3Scaling, Rope, YarnScaling
from tests.cuda.attention_reference import PAGE, device_for, e4m3_values, from_bf16, make_attention, to_bf16, to_e4m3

FILES = ("position.cu",)
SHAPES = {                           # head size, rotary size, interleaved
    "halves": (64, 64, False),
    "neighbours": (128, 128, True),
    "some halves": (80, 20, False),
    "some neighbours": (96, 32, True),
    "large": (256, 256, False),
    "none": (64, 0, False),
}  # fmt: skip


def make_rope(name):
    _, size, interleaved = SHAPES[name]
    return Rope(theta=10_000.0, rotary_size=size, interleaved=interleaved)


USUAL = [make_attention(head_size=size, rope=make_rope(name)) for name, (size, _, _) in SHAPES.items()]


def make_device(seed=0):
    return device_for(USUAL, ("bf16", "fp8"), FILES, seed=seed)


# ---- frequencies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearScaling(4.0),
        FrequencyFactors(tuple(1 + i / 7 for i in range(32)), attention_factor=1.19),
        Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_length=8192),
        Llama3Scaling(factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_context_length=256),
        YarnScaling(factor=4.0, original_context_length=32768),
        YarnScaling(factor=16.0, original_context_length=4096, truncate=False),
        YarnScaling(factor=0.5, original_context_length=4096),
        YarnScaling(factor=40.0, original_context_length=4096, beta_fast=48.0, beta_slow=2.0, attention_factor=0.9),
        YarnScaling(factor=2.0, original_context_length=100_000_000),
    ],
)
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_frequencies_are_those_of_the_cpu_backend(scaling, theta):
    rope = Rope(theta=theta, rotary_size=64, interleaved=False, scaling=scaling)
    mine, other = Rotation.of(rope), CpuRotation.of(rope)
    np.testing.assert_allclose(mine.frequencies, other.frequencies, rtol=1e-12)
    assert mine.frequencies.dtype == np.float64
    assert mine.factor == pytest.approx(other.factor, rel=1e-12)


def test_cosines_and_sines_are_right_up_to_the_last_position():
    rotation = Rotation.of(Rope(theta=10_000.0, rotary_size=64, interleaved=False))
    positions = np.array([0, 1, 2, 1000, 4095, 65_537, 131_071, 200_000, 262_143], np.int32)
    device = make_device()
    out = device.put(np.full((len(positions), 32, 2), np.nan, np.float32))
    rotations(device.stream(), device.put(positions), device.put(rotation.frequencies), 1.25, out)
    angles = np.multiply.outer(positions.astype(np.longdouble), rotation.frequencies.astype(np.longdouble))
    expected = 1.25 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    assert np.abs(device.get(out) - expected).max() < 1e-6


# ---- heads ---------------------------------------------------------------------------------------------------------------


def rotated(x, angles, interleaved):
    """x (T, heads, hs): its first numbers as complex ones, turned by angles (T, pairs)."""
    size = 2 * angles.shape[1]
    pairs = x[..., :size].reshape(*x.shape[:-1], -1, 2) if interleaved else np.stack(np.split(x[..., :size], 2, axis=-1), -1)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
    if interleaved:
        turned = np.stack([turned.real, turned.imag], -1).reshape(*x.shape[:-1], size)
    else:
        turned = np.concatenate([turned.real, turned.imag], -1)
    return np.concatenate([turned, x[..., size:]], -1)


def normed(x, weight, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight


def run(name, item="bf16", *, bias=False, norm=False, heads=4, kv_heads=2, layers=2, layer=1, far=False, seed=0, scale=1.0):
    """What the kernel leaves, and what it should: queries (T, H hs); pages as bits; all in order."""
    size, _, interleaved = SHAPES[name]
    attention = make_attention(heads, kv_heads, size, rope=make_rope(name), qkv_bias=bias, qk_norm=norm)
    layout = CacheLayout(layers, kv_heads, size, item)
    random = np.random.default_rng(7)
    positions = np.array([0, 31, 32, 33, 5000, 262_143, 7], np.int32)
    tokens, all_heads = len(positions), heads + 2 * kv_heads
    far_page = (9 << 30) // layout.page_bytes if far else 0
    places = np.array([0, 31, 32, 33, 95, 70, 64])
    x = to_bf16(random.normal(size=(tokens, all_heads, size)) * scale)
    add = random.normal(size=(all_heads, size)).astype(np.float32)
    weights = random.normal(size=(2, size)).astype(np.float32)
    kind = np.uint16 if item == "bf16" else np.uint8
    pool = np.full((3, layers, 2, kv_heads, PAGE, size), 7, kind)

    device = make_device(seed)
    turn = Rotation.of(attention.rope)
    angles = device.put(np.full((tokens, len(turn.frequencies), 2), np.nan, np.float32))
    stream = device.stream()
    rotations(stream, device.put(positions), device.put(turn.frequencies), turn.factor, angles)
    qkv, there = device.put(x.reshape(tokens, -1)), device.put(pool)
    slots, address = device.put((places + far_page * PAGE).astype(np.int32)), there.address - far_page * layout.page_bytes
    rotate_and_write(
        stream, qkv, device.put(add.reshape(-1)) if bias else None, *(device.put(w) if norm else None for w in weights), 1e-5,
        angles, slots, address, layout, layer, attention,
    )  # fmt: skip
    got = device.get(qkv).reshape(tokens, all_heads, size)[:, :heads]

    full = from_bf16(x).astype(np.float64) + (add if bias else 0)
    queries, keys, values = np.split(full, [heads, heads + kv_heads], axis=1)
    if norm:
        queries, keys = normed(queries, weights[0], 1e-5), normed(keys, weights[1], 1e-5)
    angle = np.multiply.outer(positions, turn.frequencies)
    queries, keys = rotated(queries, angle, interleaved), rotated(keys, angle, interleaved)
    for token, place in enumerate(places):
        for part, numbers in enumerate((keys, values)):
            bits = to_bf16(numbers[token]) if item == "bf16" else to_e4m3(numbers[token])
            pool[place // PAGE, layer, part, :, place % PAGE] = bits
    found = device.get(there)
    found = to_bf16(found) if item == "bf16" else found
    return got, queries, found, pool


def assert_same_pages(found, expected):
    """All but a few bits that the last digits of float32 decide; what was not to be written is as it was."""
    if found.dtype == np.uint16:
        found, expected = from_bf16(found), from_bf16(expected)
        assert (found == expected).mean() > 0.98
        np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-5)
    else:
        assert (found == expected).mean() > 0.98
        found, expected = e4m3_values()[found], e4m3_values()[expected]
        np.testing.assert_allclose(found, expected, rtol=2**-3, atol=2**-9)


@pytest.mark.parametrize("item", ["bf16", "fp8"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_kind_of_rope_into_both_kinds_of_cache(name, item):
    got, queries, found, expected = run(name, item)
    np.testing.assert_allclose(got, queries, rtol=2**-8, atol=1e-5)
    assert_same_pages(found, expected)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("bias", "norm"), [(True, False), (False, True), (True, True)])
def test_bias_and_norms_come_before_the_rotation(name, bias, norm):
    got, queries, found, expected = run(name, bias=bias, norm=norm)
    np.testing.assert_allclose(got, queries, rtol=2**-8, atol=1e-5)
    assert_same_pages(found, expected)


def test_only_the_slots_of_this_layer_are_written():
    _, _, found, _ = run("halves", layers=3, layer=1)
    untouched = np.ones(found.shape, bool)
    for place in (0, 31, 32, 33, 95, 70, 64):
        untouched[place // PAGE, 1, :, :, place % PAGE] = False
    assert (found[untouched] == 7).all()
    assert (found[~untouched] != 7).all()


def test_pages_beyond_four_gigabytes():
    _, _, found, expected = run("halves", far=True)
    assert_same_pages(found, expected)


def test_a_number_too_large_for_e4m3_becomes_the_largest():
    _, _, found, expected = run("halves", "fp8", scale=1000.0)
    assert (expected % 128 == 126).any()
    assert_same_pages(found, expected)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_threads_does_not_matter(seed):
    for mine, other in zip(run("halves", norm=True, seed=seed), run("halves", norm=True), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_one_head_and_many():
    for heads, kv_heads in ((1, 1), (7, 1), (33, 3)):
        got, queries, found, expected = run("halves", heads=heads, kv_heads=kv_heads, norm=True)
        np.testing.assert_allclose(got, queries, rtol=2**-8, atol=1e-5)
        assert_same_pages(found, expected)


@pytest.mark.parametrize("rotary", [6, 30, 68])
def test_a_rotary_size_without_a_kernel_is_refused(rotary):
    with pytest.raises(UnsupportedModel, match=f"rotary size {rotary} of heads of 64: .*multiples of 4"):
        position_kernels(make_attention(head_size=64, rope=Rope(10_000.0, rotary, interleaved=False)), "bf16")


def test_what_a_page_holds():
    layout = CacheLayout(layers=3, kv_heads=2, head_size=64, item="bf16")
    assert layout.page_bytes == 3 * 2 * 2 * 32 * 64 * 2
    assert [layout.keys(layer) for layer in range(3)] == [0, 16384, 32768]
    assert CacheLayout(3, 2, 64, "fp8").page_bytes * 2 == layout.page_bytes
