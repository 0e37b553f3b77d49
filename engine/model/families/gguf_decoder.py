"""What every decoder shares in GGUF: the keys of its sizes, its attention and its feed-forward.

A family file calls gguf_decoder() with what is peculiar to it, so that it stays a screen long. llama.cpp writes the same
keys for all of them; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md lists them.
"""

from collections.abc import Mapping

from engine.errors import BadModelFile, UnsupportedModel
from engine.model.families.bounds import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    check_experts,
)
from engine.model.families.gguf_metadata import GgufMetadata
from engine.model.families.gguf_rope import gguf_rope
from engine.model.spec import Attention, Dense, FeedForward, Layer, Mixture, ModelSpec
from engine.weights.tensors import RawTensor

__all__ = ["gguf_decoder", "gguf_mixture"]

SOFTMAX = 1                                # llama.cpp's number of the gating function; 0: not stated


def gguf_decoder(
    metadata: GgufMetadata,
    tensors: Mapping[str, RawTensor],
    *,
    interleaved: bool,
    qkv_bias: bool | None = None,
    qk_norm: bool = False,
    post_norms: bool = False,
    feed_forward: FeedForward | None = None,
) -> ModelSpec:
    """A decoder of equal layers. Raises BadModelFile and UnsupportedModel; refuses keys that it does not know.

    qkv_bias: None, if the file's tensors tell. feed_forward: None for a dense one of feed_forward_length.
    """
    layers = metadata.integer("block_count", 1, MAX_LAYERS)
    hidden = metadata.integer("embedding_length", 1, MAX_WIDTH)
    if feed_forward is None:
        feed_forward = Dense(metadata.integer("feed_forward_length", 1, MAX_WIDTH))
        metadata.must_be("expert_count", 0)
        metadata.must_be("expert_used_count", 0)
    attention = _attention(metadata, tensors, hidden, interleaved=interleaved, qkv_bias=qkv_bias, qk_norm=qk_norm)
    spec = ModelSpec(
        family=metadata.architecture,
        vocabulary_size=_vocabulary_size(metadata, tensors),
        hidden_size=hidden,
        layers=(Layer(attention, feed_forward, post_norms),) * layers,
        norm_epsilon=metadata.number("attention.layer_norm_rms_epsilon", 1e-12, 0.1),
        tied_output="output.weight" not in tensors,
        context_length=metadata.integer("context_length", 1, MAX_CONTEXT),
    )
    metadata.must_be("attention.causal", True)
    metadata.must_be("use_parallel_residual", False)
    metadata.refuse_unread()
    return spec


def gguf_mixture(metadata: GgufMetadata, *, normalize_top_k: bool, shared: bool) -> Mixture:
    """The experts of each layer. normalize_top_k is llama.cpp's for the family: its files hardly ever state it."""
    experts = metadata.integer("expert_count", 1, MAX_EXPERTS)
    check_experts(metadata.integer("block_count", 1, MAX_LAYERS), experts, metadata.file)
    per_token = metadata.integer("expert_used_count", 1, experts)
    dense = metadata.integer("feed_forward_length", 0, MAX_WIDTH, default=0)     # widths were derived from it before 2024-04
    width = metadata.integer("expert_feed_forward_length", 1, MAX_WIDTH, default=dense // per_token)
    shared_width = None
    if shared:
        shared_width = metadata.integer("expert_shared_feed_forward_length", 1, MAX_WIDTH, default=dense)
    metadata.must_be("expert_weights_norm", normalize_top_k)
    metadata.must_be("expert_weights_scale", 0.0, 1.0)
    metadata.must_be("expert_gating_func", 0, SOFTMAX)
    metadata.must_be("expert_group_count", 0, 1)
    metadata.must_be("expert_group_used_count", 0, 1)
    metadata.must_be("expert_shared_count", 1 if shared else 0)
    metadata.must_be("leading_dense_block_count", 0)
    metadata.must_be("interleave_moe_layer_step", 0, 1)
    return Mixture(experts, per_token, width, normalize_top_k, shared_width)


def _vocabulary_size(metadata: GgufMetadata, tensors: Mapping[str, RawTensor]) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BadModelFile("token_embd.weight is missing or no matrix: download the file again", file=metadata.file)
    rows = embedding.shape[0]
    stated = metadata.integer("vocab_size", 1, MAX_VOCABULARY, default=rows)
    if stated != rows:
        raise metadata.bad("vocab_size", stated, f"{rows:,}, the rows of token_embd.weight")
    return rows


def _attention(
    metadata: GgufMetadata,
    tensors: Mapping[str, RawTensor],
    hidden: int,
    *,
    interleaved: bool,
    qkv_bias: bool | None,
    qk_norm: bool,
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
        rope=gguf_rope(metadata, tensors, head_size, interleaved),
        qkv_bias="blk.0.attn_q.bias" in tensors if qkv_bias is None else qkv_bias,
        output_bias="blk.0.attn_output.bias" in tensors,
        qk_norm=qk_norm,
        sliding_window=_sliding_window(metadata),
    )


def _sliding_window(metadata: GgufMetadata) -> int | None:
    """None where the window is never shorter than the context."""
    window = metadata.integer("attention.sliding_window", 0, MAX_CONTEXT, default=0)
    return window if 0 < window < metadata.integer("context_length", 1, MAX_CONTEXT) else None
