"""Specs read from config.json: of known models, as transformers 4 and 5 write them, and what must be refused."""

import math

import pytest

from engine.errors import BadModelFile, ModelError, UnsupportedModel
from engine.model.families import spec_from_config
from engine.model.spec import (
    Attention,
    Dense,
    FrequencyFactors,
    Layer,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Mixture,
    ModelSpec,
    Rope,
    RopeScaling,
    YarnScaling,
)
from tests.support import real_configs
from tests.support.real_configs import (
    GLM_4_9B_0414,
    LLAMA_3_1_8B,
    MISTRAL_7B_V0_1,
    QWEN1_5_MOE_A2_7B,
    QWEN2_5_0_5B,
    QWEN3_0_6B,
    QWEN3_30B_A3B,
)

SCALE = 128**-0.5


def attention(heads: int, kv_heads: int, theta: float, size: int = 128, **features: object) -> Attention:
    return Attention(heads, kv_heads, size, size**-0.5, Rope(theta, size, interleaved=False), **features)


LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
LLAMA_3_1 = ModelSpec(
    "llama", 128256, 4096,
    (Layer(Attention(32, 8, 128, SCALE, Rope(500000.0, 128, False, LLAMA3)), Dense(14336)),) * 32, 1e-5, False, 131072,
)  # fmt: skip
GLM = Attention(32, 2, 128, SCALE, Rope(10000.0, 64, interleaved=True), qkv_bias=True)
SPECS = {
    "LLAMA_3_1_8B": LLAMA_3_1,
    "DEEPSEEK_R1_DISTILL_LLAMA_8B": LLAMA_3_1,
    "LLAMA_2_7B": ModelSpec(
        "llama", 32000, 4096, (Layer(attention(32, 32, 10000.0), Dense(11008)),) * 32, 1e-5, False, 4096),
    "SMOLLM2_135M": ModelSpec(
        "llama", 49152, 576, (Layer(attention(9, 3, 100000.0, 64), Dense(1536)),) * 30, 1e-5, True, 8192),
    "MISTRAL_7B_V0_1": ModelSpec(
        "mistral", 32000, 4096, (Layer(attention(32, 8, 10000.0, sliding_window=4096), Dense(14336)),) * 32, 1e-5, False,
        32768),
    "MISTRAL_7B_V0_3": ModelSpec(
        "mistral", 32768, 4096, (Layer(attention(32, 8, 1000000.0), Dense(14336)),) * 32, 1e-5, False, 32768),
    "QWEN2_5_0_5B": ModelSpec(
        "qwen2", 151936, 896, (Layer(attention(14, 2, 1000000.0, 64, qkv_bias=True), Dense(4864)),) * 24, 1e-6, True, 32768),
    "DEEPSEEK_R1_DISTILL_QWEN_7B": ModelSpec(
        "qwen2", 152064, 3584, (Layer(attention(28, 4, 10000.0, qkv_bias=True), Dense(18944)),) * 28, 1e-6, False, 131072),
    "QWEN3_0_6B": ModelSpec(
        "qwen3", 151936, 1024, (Layer(attention(16, 8, 1000000.0, qk_norm=True), Dense(3072)),) * 28, 1e-6, True, 40960),
    "QWEN1_5_MOE_A2_7B": ModelSpec(
        "qwen2moe", 151936, 2048,
        (Layer(attention(16, 16, 1000000.0, qkv_bias=True), Mixture(60, 4, 1408, False, 5632)),) * 24, 1e-6, False, 8192),
    "QWEN3_30B_A3B": ModelSpec(
        "qwen3moe", 151936, 2048,
        (Layer(attention(32, 4, 1000000.0, qk_norm=True), Mixture(128, 8, 768, True)),) * 48, 1e-6, False, 40960),
    "GLM_4_9B_0414": ModelSpec("glm4", 151552, 4096, (Layer(GLM, Dense(13696), post_norms=True),) * 40, 1e-5, False, 32768),
}  # fmt: skip


def read(config: dict, **changes: object) -> ModelSpec:
    return spec_from_config(config | changes, "some/config.json")


def first_attention(config: dict, **changes: object) -> Attention:
    return read(config, **changes).layers[0].attention


def as_transformers_5(config: dict) -> dict:
    """What save_pretrained of version 5 makes of it."""
    moved = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    if "partial_rotary_factor" in moved:
        rope["partial_rotary_factor"] = moved.pop("partial_rotary_factor")
    if "num_experts" in moved and config["model_type"] == "qwen3_moe":
        moved["num_local_experts"] = moved.pop("num_experts")
    if "use_sliding_window" in moved:
        moved["sliding_window"] = None
    return moved | {"rope_parameters": rope, "dtype": "bfloat16"}


@pytest.mark.parametrize("name", SPECS)
def test_the_config_of_a_known_model_gives_its_spec(name: str) -> None:
    assert spec_from_config(getattr(real_configs, name), "config.json") == SPECS[name]


@pytest.mark.parametrize("name", SPECS)
def test_transformers_5_says_the_same_in_other_words(name: str) -> None:
    assert spec_from_config(as_transformers_5(getattr(real_configs, name)), "config.json") == SPECS[name]


def scaling(original: int | None = None, context: int = 131072, **table: object) -> RopeScaling | None:
    changes: dict[str, object] = {"rope_scaling": table, "max_position_embeddings": context}
    if original is not None:
        changes["original_max_position_embeddings"] = original
    return first_attention(QWEN2_5_0_5B, **changes).rope.scaling


def test_scalings_that_change_nothing_are_none() -> None:
    assert scaling(rope_type="default") is None
    assert scaling(type="linear", factor=1.0) is None
    assert scaling(rope_type="dynamic", factor=4.0) is None                # up to the context length, which is the limit
    assert scaling() is None


def test_linear_is_read_under_both_names_of_its_type() -> None:
    assert scaling(type="linear", factor=4) == scaling(rope_type="linear", factor=4.0) == LinearScaling(4.0)


def test_yarn_is_read_with_transformers_defaults() -> None:
    qwen = scaling(type="yarn", factor=4.0, original_max_position_embeddings=32768)
    assert qwen == YarnScaling(4.0, 32768, beta_fast=32.0, beta_slow=1.0, attention_factor=None, truncate=True)
    assert scaling(rope_type="yarn", factor=4.0) == YarnScaling(4.0, 131072)
    assert scaling(rope_type="yarn", factor=None, original_max_position_embeddings=32768) == YarnScaling(4.0, 32768)
    assert scaling(rope_type="yarn", factor=4.0, original=32768) == YarnScaling(4.0, 32768)
    full = scaling(
        rope_type="yarn", factor=2.0, original_max_position_embeddings=4096, beta_fast=16, beta_slow=2, truncate=False,
        attention_factor=1.5, mscale=3.0, mscale_all_dim=2.0,
    )  # fmt: skip
    assert full == YarnScaling(2.0, 4096, 16.0, 2.0, 1.5, truncate=False)


def test_mscale_counts_only_with_mscale_all_dim() -> None:
    alone = scaling(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=0.5)
    assert alone == YarnScaling(40.0, 4096)
    both = scaling(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.5)
    assert both == YarnScaling(40.0, 4096, attention_factor=(1 + 0.1 * math.log(40)) / (1 + 0.05 * math.log(40)))


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope_has_two_sets_of_divisors_and_the_context_chooses(kind: str) -> None:
    short, long = [1.0 + i for i in range(32)], [2.0 + i for i in range(32)]
    changes = {"rope_scaling": {"type": kind, "short_factor": short, "long_factor": long},
               "original_max_position_embeddings": 4096, "max_position_embeddings": 131072}
    spec = read(QWEN2_5_0_5B, **changes)
    temperature = math.sqrt(1 + math.log(32) / math.log(4096))
    assert spec.layers[0].attention.rope.scaling == LongRopeScaling(tuple(short), tuple(long), 4096, temperature)
    at = {length: spec.at_context(length).layers[0].attention.rope.scaling for length in (4096, 4097)}
    assert at == {4096: FrequencyFactors(tuple(short), temperature), 4097: FrequencyFactors(tuple(long), temperature)}


def test_longropes_temperature_is_stated_or_follows_from_the_factor() -> None:
    lists = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    for table, expected in (({"attention_factor": 1.25}, 1.25), ({"factor": 0.5}, 1.0),
                            ({"factor": 4.0}, math.sqrt(1 + math.log(4) / math.log(8192)))):
        found = scaling(rope_type="longrope", original_max_position_embeddings=8192, **lists, **table)
        assert isinstance(found, LongRopeScaling)
        assert found.attention_factor == expected


def test_the_context_length_is_as_stated_whatever_the_scaling() -> None:
    for table in ({"type": "dynamic", "factor": 4.0}, {"type": "linear", "factor": 4.0}, {"type": "yarn", "factor": 4.0}):
        assert read(QWEN2_5_0_5B, rope_scaling=table).context_length == 32768


def test_glm4_rotates_half_unless_stated() -> None:
    without = {key: value for key, value in GLM_4_9B_0414.items() if key != "partial_rotary_factor"}
    assert first_attention(without).rope.rotary_size == 64
    assert first_attention(without, partial_rotary_factor=0.25).rope.rotary_size == 32
    assert first_attention(without, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.75}).rope.rotary_size == 96


def test_biases_follow_attention_bias() -> None:
    assert first_attention(LLAMA_3_1_8B, attention_bias=True).output_bias
    assert first_attention(QWEN3_0_6B, attention_bias=True).qkv_bias
    assert not first_attention(GLM_4_9B_0414, attention_bias=False).qkv_bias
    assert not first_attention(QWEN1_5_MOE_A2_7B, qkv_bias=False).qkv_bias


def windows(config: dict, **changes: object) -> list[int | None]:
    return [layer.attention.sliding_window for layer in read(config, num_hidden_layers=4, **changes).layers]


def test_qwen_slides_from_max_window_layers_on_if_it_slides() -> None:
    unused = {"sliding_window": 128, "max_window_layers": 2}
    assert windows(QWEN2_5_0_5B, **unused) == [None] * 4
    assert windows(QWEN2_5_0_5B, **unused, use_sliding_window=True) == [None, None, 128, 128]
    assert windows(QWEN3_0_6B, **unused, use_sliding_window=True) == [None, None, 128, 128]
    types = ["sliding_attention", "full_attention"] * 2
    assert windows(QWEN2_5_0_5B, **unused, use_sliding_window=True, layer_types=types) == [128, None] * 2
    assert windows(QWEN2_5_0_5B, layer_types=["full_attention"] * 4) == [None] * 4


def test_a_window_that_is_never_shorter_than_the_context_is_none() -> None:
    assert first_attention(MISTRAL_7B_V0_1, sliding_window=32767).sliding_window == 32767
    assert first_attention(MISTRAL_7B_V0_1, sliding_window=32768).sliding_window is None


def test_dense_layers_among_experts() -> None:
    def sparse(**changes: object) -> list[bool]:
        layers = read(QWEN3_30B_A3B, num_hidden_layers=5, **changes).layers
        assert all(isinstance(layer.feed_forward, Mixture) or layer.feed_forward == Dense(6144) for layer in layers)
        return [isinstance(layer.feed_forward, Mixture) for layer in layers]

    assert sparse() == [True] * 5
    assert sparse(decoder_sparse_step=2) == [False, True, False, True, False]
    assert sparse(mlp_only_layers=[0, 3]) == [False, True, True, False, True]
    assert sparse(mlp_only_layers=[1], decoder_sparse_step=2) == [False, False, False, True, False]


YARN = {"rope_type": "yarn", "factor": 4.0}
UNSUPPORTED: list[tuple[dict, dict, str]] = [
    (LLAMA_3_1_8B, {"logit_scale": 0.5}, "logit_scale"),
    (LLAMA_3_1_8B, {"attention_multiplier": 0.1, "residual_multiplier": 0.2}, "attention_multiplier, residual_multiplier"),
    (LLAMA_3_1_8B, {"sliding_window": 4096}, "sliding_window"),
    (LLAMA_3_1_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (LLAMA_3_1_8B, {"mlp_bias": True}, "mlp_bias is True"),
    (LLAMA_3_1_8B, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    (LLAMA_3_1_8B, {"pretraining_tp": 2}, "pretraining_tp is 2"),
    (LLAMA_3_1_8B, {"rope_interleaved": True}, "rope_interleaved"),
    (LLAMA_3_1_8B, {"model_type": "mistral"}, "model_type is 'mistral'"),
    (LLAMA_3_1_8B, {"quantization_config": {"quant_method": "gptq"}}, "quantized.*gguf"),
    (LLAMA_3_1_8B, {"rope_scaling": {"rope_type": "martian", "factor": 2}}, "'martian'.*llama3"),
    (LLAMA_3_1_8B, {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "'mrope'"),
    (LLAMA_3_1_8B, {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 1000.0}}, r"rope_scaling\.alpha"),
    (LLAMA_3_1_8B, {"rope_scaling": YARN | {"mrope_section": [1]}}, r"rope_scaling\.mrope_section"),
    (LLAMA_3_1_8B, {"rope_parameters": {"full_attention": YARN}, "rope_scaling": None}, r"rope_parameters\.full_attention"),
    (LLAMA_3_1_8B, {"rope_parameters": YARN}, "contradict"),
    (LLAMA_3_1_8B, {"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM'.*Glm4ForCausalLM"),
    (LLAMA_3_1_8B, {"architectures": ["Qwen3VLForConditionalGeneration"]}, "images"),
    (QWEN2_5_0_5B, {"use_mrope": True}, "use_mrope"),
    (QWEN2_5_0_5B, {"layer_types": ["linear_attention"] * 24}, "linear_attention"),
    (QWEN1_5_MOE_A2_7B, {"use_sliding_window": True}, "use_sliding_window is True"),
    (QWEN3_30B_A3B, {"shared_expert_intermediate_size": 5}, "shared_expert_intermediate_size"),
    (QWEN3_30B_A3B, {"n_group": 4}, "n_group"),
    (MISTRAL_7B_V0_1, {"attention_bias": True}, "attention_bias"),
]


@pytest.mark.parametrize(("config", "changes", "words"), UNSUPPORTED, ids=[str(case[1])[:60] for case in UNSUPPORTED])
def test_what_would_change_the_mathematics_is_refused_by_name(config: dict, changes: dict, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words) as caught:
        read(config, **changes)
    assert "some/config.json" in str(caught.value)


BAD: list[tuple[dict, dict, str]] = [
    (LLAMA_3_1_8B, {key: value}, key)
    for key, values in {
        "num_hidden_layers": (0, 1025, "32", None, True, 32.0, -1, 10**5000),
        "hidden_size": (0, 1 << 40, None, 4097),
        "num_attention_heads": (0, 24, None),
        "num_key_value_heads": (0, 5, 64),
        "head_dim": (0, 127, "128", 1 << 30),
        "intermediate_size": (0, None),
        "vocab_size": (0, None, 1 << 30),
        "max_position_embeddings": (0, None, 1 << 40),
        "rms_norm_eps": (0, None, float("nan"), float("inf"), -1.0, 1.0, "1e-5", 10**400),
        "rope_theta": (0, 1.0, float("inf"), True),
        "rope_scaling": ("yarn", [], 4.0),
        "tie_word_embeddings": ("false", 0),
        "attention_bias": (1,),
        "architectures": (None, [], "LlamaForCausalLM", ["LlamaForCausalLM", "MistralForCausalLM"], [1], {}),
    }.items()
    for value in values
] + [
    (LLAMA_3_1_8B, {"rope_scaling": table}, words)
    for table, words in [
        ({"rope_type": 3}, "rope_type"),
        ({"rope_type": "linear"}, "rope_scaling.factor is missing"),
        ({"rope_type": "linear", "factor": 0.0}, "rope_scaling.factor"),
        ({"rope_type": "yarn", "factor": 0.5}, "rope_scaling.factor"),
        ({"rope_type": "yarn", "factor": float("nan")}, "rope_scaling.factor"),
        (YARN | {"beta_fast": 0.0}, "beta_fast"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        (YARN | {"truncate": 1}, "truncate"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor is missing"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 64}, "long_factor|short_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 63, "long_factor": [1.0] * 64}, "short_factor.*64 numbers"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [0.0] * 64}, "long_factor"),
        ({"rope_type": "longrope", "short_factor": [True] * 64, "long_factor": [1.0] * 64}, "short_factor"),
    ]
] + [
    (MISTRAL_7B_V0_1, {"sliding_window": 0}, "sliding_window"),
    (QWEN2_5_0_5B, {"use_sliding_window": True, "sliding_window": None}, "sliding_window"),
    (QWEN2_5_0_5B, {"layer_types": ["sliding_attention"] * 24}, "sliding_window"),
    (QWEN2_5_0_5B, {"layer_types": ["full_attention"] * 23}, "layer_types"),
    (QWEN3_0_6B, {"head_dim": None}, "head_dim"),
    (GLM_4_9B_0414, {"head_dim": None}, "head_dim"),
    (GLM_4_9B_0414, {"partial_rotary_factor": 0.055}, "even"),
    (GLM_4_9B_0414, {"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
    (QWEN3_30B_A3B, {"num_experts": 0}, "num_experts"),
    (QWEN3_30B_A3B, {"num_experts": None}, "num_experts"),
    (QWEN3_30B_A3B, {"num_experts": 4096}, "131,072 experts"),
    (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "num_experts_per_tok"),
    (QWEN3_30B_A3B, {"mlp_only_layers": [1.5]}, "mlp_only_layers"),
    (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
    (QWEN1_5_MOE_A2_7B, {"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "changes", "words"), BAD, ids=[",".join(changes) for _, changes, _ in BAD])
def test_an_absurd_value_is_a_bad_file_and_the_message_names_it(config: dict, changes: dict, words: str) -> None:
    with pytest.raises(BadModelFile, match=words) as caught:
        read(config, **changes)
    assert "some/config.json" in str(caught.value)
    assert len(str(caught.value)) < 1000


ODD = [
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x" * 100_000,
    [], [1] * 100, [None], [[]], ["sliding_attention"] * 28, {}, {"factor": 2}, {"rope_type": "yarn"}, {"a": {"a": []}},
    {"type": "longrope", "short_factor": [0], "long_factor": "x", "original_max_position_embeddings": 1},
    {"rope_type": "llama3", "factor": 1, "low_freq_factor": 1, "high_freq_factor": 1e999},
]  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_no_value_of_any_key_does_worse_than_a_typed_error(name: str) -> None:
    config = getattr(real_configs, name)
    for key in [*config, "rope_parameters", "layer_types", "mlp_only_layers", "num_local_experts", "partial_rotary_factor"]:
        for value in ODD:
            message = ""
            try:
                read(config, **{key: value})
            except ModelError as error:
                message = str(error)
            assert len(message) < 1000, key


def test_what_training_and_programs_left_in_a_config_is_no_obstacle() -> None:
    leftovers = {
        "_name_or_path": "/home/me", "auto_map": {"AutoModel": "x.Y"}, "output_attentions": False, "use_cache": False,
        "max_length": 20, "temperature": 0.6, "id2label": {"0": "LABEL_0"}, "unsloth_fixed": True, "is_decoder": True,
        "tie_encoder_decoder": False, "pruned_heads": {}, "something_that_is_null": None, "attention_dropout": 0.1,
    }  # fmt: skip
    assert read(LLAMA_3_1_8B, **leftovers) == LLAMA_3_1
