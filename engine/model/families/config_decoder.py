"""What every decoder shares in config.json: its sizes, its attention, and which layers slide or have experts.

A family file calls config_decoder() with what is peculiar to it, so that it stays a screen long.
"""

from collections.abc import Sequence

from engine.errors import UnsupportedModel
from engine.model.families.bounds import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    check_experts,
)
from engine.model.families.config_json import ConfigJson
from engine.model.families.config_rope import config_rope
from engine.model.spec import Attention, Dense, FeedForward, Layer, Mixture, ModelSpec

__all__ = ["config_decoder", "layer_types_windows", "mixtures", "qwen_windows"]


def config_decoder(
    config: ConfigJson,
    family: str,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: bool = False,
    head_size_stated: bool = False,
    interleaved: bool = False,
    rotary_share: float | None = None,
    post_norms: bool = False,
    windows: Sequence[int | None] | None = None,
    feed_forwards: Sequence[FeedForward] | None = None,
) -> ModelSpec:
    """A decoder. Raises BadModelFile and UnsupportedModel; refuses keys that it does not know.

    head_size_stated: head_dim must be there, because its default is none that follows from the other sizes.
    windows, feed_forwards: one per layer; None: no window, and a dense feed-forward of intermediate_size, everywhere.
    """
    layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    hidden = config.integer("hidden_size", 1, MAX_WIDTH)
    config.must_be("hidden_act", "silu")
    heads = config.integer("num_attention_heads", 1, MAX_HEADS)
    kv_heads = config.integer("num_key_value_heads", 1, MAX_HEADS, default=heads)
    if heads % kv_heads:
        raise config.bad("num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
    if not head_size_stated and not config.has("head_dim") and hidden % heads:
        raise config.bad("num_attention_heads", heads, f"a divisor of hidden_size {hidden}")
    head_size = config.integer("head_dim", 1, MAX_WIDTH, default=None if head_size_stated else hidden // heads)
    rope = config_rope(config, head_size, interleaved=interleaved, rotary_share=rotary_share)
    context_length = config.integer("max_position_embeddings", 1, MAX_CONTEXT)
    if feed_forwards is None:
        feed_forwards = (Dense(config.integer("intermediate_size", 1, MAX_WIDTH)),) * layers

    def attention(window: int | None) -> Attention:
        return Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            scale=head_size**-0.5,
            rope=rope,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            qk_norm=qk_norm,
            sliding_window=window if window is not None and window < context_length else None,
        )

    spec = ModelSpec(
        family=family,
        vocabulary_size=config.integer("vocab_size", 1, MAX_VOCABULARY),
        hidden_size=hidden,
        layers=tuple(
            Layer(attention(window), feed_forward, post_norms)
            for window, feed_forward in zip(windows or (None,) * layers, feed_forwards, strict=True)
        ),
        norm_epsilon=config.number("rms_norm_eps", 1e-12, 0.1),
        tied_output=config.boolean("tie_word_embeddings", False),
        context_length=context_length,
    )
    config.refuse_unread()
    return spec


def layer_types_windows(config: ConfigJson, window: int | None, unless_stated: Sequence[bool]) -> list[int | None]:
    """The window of each layer, by layer_types or else where unless_stated has True."""
    layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    types = config.texts("layer_types", layers)
    if types is None:
        slides = list(unless_stated)
    else:
        if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
            raise UnsupportedModel(
                f"{config.file}: layer_types has {unknown[0][:80]!r}, Rillet supports full_attention and sliding_attention: "
                "take another model"
            )
        slides = [kind == "sliding_attention" for kind in types]
    if any(slides) and window is None:
        raise config.bad("sliding_window", None, "stated and used, because layer_types has sliding_attention")
    return [window if slide else None for slide in slides]


def qwen_windows(config: ConfigJson) -> list[int | None]:
    """Qwen's window: sliding_window from layer max_window_layers on, if use_sliding_window is true."""
    layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    config.ignore("sliding_window", "max_window_layers")
    if not config.boolean("use_sliding_window", False):
        return layer_types_windows(config, None, [False] * layers)
    window = config.integer("sliding_window", 1, MAX_CONTEXT)
    first = layers if config.has("layer_types") else config.integer("max_window_layers", 0, MAX_CONTEXT)
    return layer_types_windows(config, window, [layer >= first for layer in range(layers)])


def mixtures(config: ConfigJson, *, shared: bool) -> list[FeedForward]:
    """Qwen's feed-forwards: experts in every decoder_sparse_step-th layer that mlp_only_layers does not name."""
    layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    other = config.optional_integer("num_local_experts", 1, MAX_EXPERTS)          # what transformers 5 writes for Qwen3
    experts = config.integer("num_experts", 1, MAX_EXPERTS, default=other)
    check_experts(layers, experts, config.file)
    shared_width = config.integer("shared_expert_intermediate_size", 1, MAX_WIDTH) if shared else None
    mixture = Mixture(
        experts=experts,
        experts_per_token=config.integer("num_experts_per_tok", 1, experts),
        width=config.integer("moe_intermediate_size", 1, MAX_WIDTH),
        normalize_top_k=config.boolean("norm_topk_prob", False),
        shared_width=shared_width,
    )
    step = config.integer("decoder_sparse_step", 1, MAX_LAYERS, default=1)
    dense_layers = set(config.integers("mlp_only_layers", 0, MAX_LAYERS))
    sparse = [layer not in dense_layers and (layer + 1) % step == 0 for layer in range(layers)]
    if all(sparse):
        config.ignore("intermediate_size")
        return [mixture] * layers
    dense = Dense(config.integer("intermediate_size", 1, MAX_WIDTH))
    return [mixture if each else dense for each in sparse]
