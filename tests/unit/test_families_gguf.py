"""Specs read from GGUF metadata for the families with experts, GLM-4 and Qwen3, and LongRoPE; the rest: test_families.py."""

import numpy as np
import pytest

from engine.errors import BadModelFile, UnsupportedModel
from engine.model.families import spec_from_gguf
from engine.model.spec import Attention, Dense, Layer, LongRopeScaling, Mixture, ModelSpec, Rope
from engine.weights.tensors import STORAGE, RawTensor


def tensor(name: str, values: np.ndarray) -> RawTensor:
    values = np.ascontiguousarray(values, np.float32)
    return RawTensor(name, values.shape, STORAGE["F32"], values.reshape(-1).view(np.uint8), "model.gguf")


def read(architecture: str, tensors: dict[str, np.ndarray] | None = None, **changes: object) -> ModelSpec:
    """The spec of a file with these keys; in `changes`, __ stands for a dot and None leaves a key out."""
    keys: dict[str, object] = {
        "block_count": 2, "context_length": 512, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32, "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6,
    }  # fmt: skip
    if architecture.endswith("moe"):
        keys |= {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 24}
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    values = {f"{architecture}.{key}": value for key, value in keys.items() if value is not None}
    given = {"token_embd.weight": np.zeros((10, 64)), "output.weight": np.zeros((10, 64)), **(tensors or {})}
    return spec_from_gguf(
        {"general.architecture": architecture, **values}, {name: tensor(name, each) for name, each in given.items()}, "m.gguf"
    )


def attention(interleaved: bool, rotary_size: int = 32, **features: object) -> Attention:
    return Attention(4, 2, 32, 32**-0.5, Rope(1e6, rotary_size, interleaved), **features)


BIAS = {"blk.0.attn_q.bias": np.zeros(128)}
SHARED = {"expert_shared_feed_forward_length": 40}


def test_every_family_has_its_layer() -> None:
    def layer(*arguments: object, **changes: object) -> Layer:
        spec = read(*arguments, **changes)
        assert spec.layers[0] == spec.layers[1]
        assert (spec.family, len(spec.layers)) == (arguments[0], 2)
        return spec.layers[0]

    assert layer("qwen2") == Layer(attention(False, qkv_bias=True), Dense(96))
    assert layer("qwen3") == Layer(attention(False, qk_norm=True), Dense(96))
    assert layer("qwen3moe") == Layer(attention(False, qk_norm=True), Mixture(8, 2, 24, True))
    assert layer("qwen2moe", BIAS, **SHARED) == Layer(attention(False, qkv_bias=True), Mixture(8, 2, 24, False, 40))
    glm4 = layer("glm4", BIAS, rope__dimension_count=16)
    assert glm4 == Layer(attention(True, 16, qkv_bias=True), Dense(96), post_norms=True)
    for name in ("llama", "llama2", "llama3", "mistral"):
        assert layer(name) == Layer(attention(True), Dense(96))


def test_the_widths_of_experts_follow_from_feed_forward_length_in_old_files() -> None:
    mixture = read("qwen2moe", expert_feed_forward_length=None).layers[0].feed_forward
    assert mixture == Mixture(8, 2, 48, False, 96)


@pytest.mark.parametrize("architecture", ["qwen2moe", "qwen3moe"])
@pytest.mark.parametrize(
    "changes",
    [{"expert_weights_scale": 2.5}, {"expert_gating_func": 2}, {"expert_group_count": 4}, {"leading_dense_block_count": 1},
     {"expert_shared_count": 2}, {"rope__dimension_sections": [8, 8, 0, 0]}, {"nextn_predict_layers": 1}],
    ids=str,
)  # fmt: skip
def test_experts_of_another_kind_are_refused_by_name(architecture: str, changes: dict) -> None:
    with pytest.raises(UnsupportedModel, match=next(iter(changes)).replace("__", r"\.")):
        read(architecture, **changes)


def test_keys_that_say_what_the_family_does_anyway_are_accepted() -> None:
    same = {"expert_weights_scale": 1.0, "expert_gating_func": 1}
    assert read("qwen3moe", **same, expert_weights_norm=True) == read("qwen3moe")
    assert read("qwen2moe", **same, expert_weights_norm=False) == read("qwen2moe")
    for architecture, norm in (("qwen3moe", False), ("qwen2moe", True)):
        with pytest.raises(UnsupportedModel, match="expert_weights_norm"):
            read(architecture, expert_weights_norm=norm)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expert_count": 0}, "expert_count"),
        ({"expert_count": None}, "expert_count is missing"),
        ({"expert_count": 1 << 20}, "expert_count"),
        ({"expert_count": 4096, "block_count": 1024}, "131,072 experts"),
        ({"expert_used_count": 9}, "expert_used_count is 9, it must be an integer from 1 to 8"),
        ({"expert_used_count": None}, "expert_used_count"),
        ({"expert_feed_forward_length": 0}, "expert_feed_forward_length"),
        ({"expert_feed_forward_length": None, "feed_forward_length": 0}, "expert_feed_forward_length"),
    ],
)
def test_impossible_experts_are_a_damaged_file(changes: dict, words: str) -> None:
    with pytest.raises(BadModelFile, match=words):
        read("qwen3moe", **changes)


SHORT, LONG = np.linspace(1, 2, 16), np.linspace(2, 32, 16)
FACTORS = {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}


def longrope(tensors: dict[str, np.ndarray], **keys: object) -> object:
    spec = read("llama", tensors, **{f"rope__scaling__{key}": value for key, value in keys.items()})
    return spec.layers[0].attention.rope.scaling


def test_longrope_is_two_tensors_and_need_not_be_named() -> None:
    short, long = (tuple(values.astype(np.float32).tolist()) for values in (SHORT, LONG))
    named = longrope(FACTORS, type="longrope", original_context_length=128, attn_factor=1.19)
    assert named == LongRopeScaling(short, long, 128, 1.19)
    assert longrope(FACTORS) == LongRopeScaling(short, long, 512, 1.0)


def test_longrope_without_its_tensors_is_a_damaged_file() -> None:
    with pytest.raises(BadModelFile, match=r"rope_factors_short\.weight.*\(16,\)"):
        longrope({}, type="longrope")
    with pytest.raises(BadModelFile, match=r"rope_factors_long\.weight"):
        longrope({"rope_factors_short.weight": SHORT})
    for values in (LONG[:15], LONG * 0, LONG * np.nan):
        with pytest.raises(BadModelFile, match=r"rope_factors_long\.weight"):
            longrope(FACTORS | {"rope_factors_long.weight": values})


def test_two_scalings_at_once_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="rope_factors_long"):
        longrope(FACTORS, type="linear", factor=2.0)
    with pytest.raises(UnsupportedModel, match="rope_freqs"):
        longrope(FACTORS | {"rope_freqs.weight": SHORT})
