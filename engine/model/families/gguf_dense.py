"""What every dense decoder shares in GGUF: the keys of its sizes, its rope, and the names of its tensors.

A family file calls dense_spec() with what is peculiar to it, so that it stays a screen long. llama.cpp writes the same
key and tensor names for all of them; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md lists the keys.
"""

from collections.abc import Mapping
from math import isfinite, log

from engine.errors import BadModelFile, UnsupportedModel
from engine.model.families.gguf_metadata import GgufMetadata
from engine.model.spec import (
    Attention,
    Dense,
    FrequencyFactors,
    Layer,
    LinearScaling,
    ModelSpec,
    Rope,
    RopeScaling,
    YarnScaling,
)
from engine.weights.tensors import RawTensor, to_float32

__all__ = ["LAYER_NAMES", "MODEL_NAMES", "READ_WITH_THE_SPEC", "dense_spec"]

MODEL_NAMES = {"token_embd.weight": "embedding", "output_norm.weight": "norm", "output.weight": "output"}
LAYER_NAMES = {
    "attn_norm.weight": "attention_norm",
    "attn_q.weight": "query",
    "attn_k.weight": "key",
    "attn_v.weight": "value",
    "attn_q.bias": "query_bias",
    "attn_k.bias": "key_bias",
    "attn_v.bias": "value_bias",
    "attn_q_norm.weight": "query_norm",
    "attn_k_norm.weight": "key_norm",
    "attn_output.weight": "attention_output",
    "attn_output.bias": "attention_output_bias",
    "ffn_norm.weight": "feed_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
}
READ_WITH_THE_SPEC = frozenset({"rope_freqs.weight"})      # its values are in the spec, no backend asks for it

MAX_LAYERS, MAX_HEADS, MAX_WIDTH, MAX_CONTEXT = 1024, 1 << 14, 1 << 22, 1 << 28


def dense_spec(
    metadata: GgufMetadata, tensors: Mapping[str, RawTensor], *, interleaved: bool, qk_norm: bool = False
) -> ModelSpec:
    """A decoder of equal dense layers. Raises BadModelFile and UnsupportedModel; refuses keys that it does not know."""
    layers = metadata.integer("block_count", 1, MAX_LAYERS)
    hidden = metadata.integer("embedding_length", 1, MAX_WIDTH)
    feed_forward = Dense(metadata.integer("feed_forward_length", 1, MAX_WIDTH))
    attention = _attention(metadata, tensors, hidden, interleaved=interleaved, qk_norm=qk_norm)
    spec = ModelSpec(
        family=metadata.architecture,
        vocabulary_size=_vocabulary_size(metadata, tensors),
        hidden_size=hidden,
        layers=(Layer(attention, feed_forward),) * layers,
        norm_epsilon=metadata.number("attention.layer_norm_rms_epsilon", 1e-12, 0.1),
        tied_output="output.weight" not in tensors,
        context_length=metadata.integer("context_length", 1, MAX_CONTEXT),
    )
    metadata.must_be("expert_count", 0)
    metadata.must_be("expert_used_count", 0)
    metadata.must_be("attention.causal", True)
    metadata.must_be("use_parallel_residual", False)
    metadata.refuse_unread()
    return spec


def _vocabulary_size(metadata: GgufMetadata, tensors: Mapping[str, RawTensor]) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BadModelFile("token_embd.weight is missing or no matrix: download the file again", file=metadata.file)
    rows = embedding.shape[0]
    stated = metadata.integer("vocab_size", 1, 1 << 24, default=rows)
    if stated != rows:
        raise metadata.bad("vocab_size", stated, f"{rows:,}, the rows of token_embd.weight")
    return rows


def _attention(
    metadata: GgufMetadata, tensors: Mapping[str, RawTensor], hidden: int, *, interleaved: bool, qk_norm: bool
) -> Attention:
    heads = metadata.integer("attention.head_count", 1, MAX_HEADS)
    kv_heads = metadata.integer("attention.head_count_kv", 1, MAX_HEADS, default=heads)
    if heads % kv_heads:
        raise metadata.bad("attention.head_count_kv", kv_heads, f"a divisor of the {heads} heads")
    if hidden % heads and not metadata.has("attention.key_length"):
        raise metadata.bad("attention.head_count", heads, f"a divisor of embedding_length {hidden}")
    head_size = metadata.integer("attention.key_length", 1, MAX_WIDTH, default=hidden // heads)
    value_size = metadata.integer("attention.value_length", 1, MAX_WIDTH, default=head_size)
    if value_size != head_size:
        raise UnsupportedModel(
            f"{metadata.file}: its keys have {head_size} numbers per head and its values {value_size}; Rillet wants them "
            "equal: take another model"
        )
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        scale=head_size**-0.5,
        rope=_rope(metadata, tensors, head_size, interleaved),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        qk_norm=qk_norm,
        sliding_window=_sliding_window(metadata),
    )


def _sliding_window(metadata: GgufMetadata) -> int | None:
    """None where the window is never shorter than the context."""
    window = metadata.integer("attention.sliding_window", 0, MAX_CONTEXT, default=0)
    return window if 0 < window < metadata.integer("context_length", 1, MAX_CONTEXT) else None


def _rope(metadata: GgufMetadata, tensors: Mapping[str, RawTensor], head_size: int, interleaved: bool) -> Rope:
    rotary_size = metadata.integer("rope.dimension_count", 2, head_size, default=head_size)
    if rotary_size % 2:
        raise metadata.bad("rope.dimension_count", rotary_size, "even")
    scaling = _scaling(metadata)
    if (factors := tensors.get("rope_freqs.weight")) is not None:
        if scaling is not None:
            raise UnsupportedModel(
                f"{metadata.file}: it has both rope.scaling.type and rope_freqs.weight, Rillet supports one of them: take "
                "another conversion"
            )
        scaling = _frequency_factors(factors, rotary_size)
    theta = metadata.number("rope.freq_base", 1.001, 1e15, default=10_000.0)
    return Rope(theta=theta, rotary_size=rotary_size, interleaved=interleaved, scaling=scaling)


def _scaling(metadata: GgufMetadata) -> RopeScaling | None:
    # Before rope.scaling.* there was rope.scale_linear; a factor without a type means linear too, as in llama.cpp.
    old = metadata.number("rope.scale_linear", 0.0, 1e6, default=0.0)
    factor = metadata.number("rope.scaling.factor", 0.0, 1e6, default=old)
    kind = metadata.text("rope.scaling.type", "linear" if factor else "none")
    original = metadata.integer("rope.scaling.original_context_length", 0, MAX_CONTEXT, default=0)
    extra = _yarn_numbers(metadata)
    match kind:
        case "none":
            return None
        case "linear":
            return LinearScaling(factor) if factor not in (0.0, 1.0) else None
        case "yarn":
            if factor < 1.0 or not original:
                raise metadata.bad("rope.scaling.factor", factor, "at least 1, beside an original_context_length")
            beta_fast, beta_slow, attention_factor = extra
            # llama.cpp multiplies its attn_factor by YaRN's own temperature; our field replaces that temperature.
            temperature = None if attention_factor is None else attention_factor * (0.1 * log(factor) + 1.0)
            return YarnScaling(factor, original, beta_fast, beta_slow, temperature)
        case _:
            raise UnsupportedModel(
                f"{metadata.file}: rope.scaling.type is {kind!r}, Rillet supports none, linear and yarn: take another model"
            )


def _yarn_numbers(metadata: GgufMetadata) -> tuple[float, float, float | None]:
    """beta_fast, beta_slow and the attention factor, which llama.cpp has written under two names."""
    metadata.must_be("rope.scaling.yarn_ext_factor", 1.0)
    metadata.must_be("rope.scaling.yarn_log_multiplier", 0.0)
    factors = [metadata.optional_number(f"rope.scaling.{key}", 1e-6, 1e6) for key in ("yarn_attn_factor", "attn_factor")]
    given = [factor for factor in factors if factor is not None and factor != 1.0]
    attention_factor = given[0] if given else None
    return (
        metadata.number("rope.scaling.yarn_beta_fast", 1e-3, 1e6, default=32.0),
        metadata.number("rope.scaling.yarn_beta_slow", 1e-3, 1e6, default=1.0),
        attention_factor,
    )


def _frequency_factors(tensor: RawTensor, rotary_size: int) -> FrequencyFactors:
    if tensor.shape != (rotary_size // 2,):
        raise BadModelFile(
            f"its shape is {tensor.shape}, it must be ({rotary_size // 2},): download the file again",
            file=tensor.file,
            tensor=tensor.name,
        )
    divisors = tuple(float(value) for value in to_float32(tensor))
    if not all(isfinite(value) and value > 0.0 for value in divisors):
        raise BadModelFile(
            "a frequency factor is not a positive number: download the file again", file=tensor.file, tensor=tensor.name
        )
    return FrequencyFactors(divisors)
