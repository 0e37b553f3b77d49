"""ModelSpec: the one place of architecture facts. Families write it, backends read it; it knows no file and no device.

Frozen dataclasses all the way down. A feature that a model does not have is None, and a backend `match`es on the type,
so that a new feature is a type error in every backend that forgot it.
"""

from dataclasses import dataclass, replace
from typing import Literal

__all__ = [
    "Activation",
    "Attention",
    "Dense",
    "FeedForward",
    "FrequencyFactors",
    "Layer",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Mixture",
    "ModelSpec",
    "Rope",
    "RopeScaling",
    "YarnScaling",
]

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's smooth rescaling of low frequencies (transformers `rope_type: llama3`)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context_length: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): per-frequency interpolation and an attention temperature; None: 0.1 ln(factor) + 1."""

    factor: float
    original_context_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True                # the two border frequencies are rounded to whole pairs


@dataclass(frozen=True, slots=True)
class FrequencyFactors:
    """One divisor per frequency, (rotary_size / 2,): what GGUF stores as `rope_freqs.weight`.

    attention_factor: what cosines and sines are multiplied by.
    """

    divisors: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE (Ding et al. 2024): two sets of divisors, (rotary_size / 2,) each; the long one holds for contexts beyond
    the original. ModelSpec.at_context chooses, so that no backend meets this type."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_context_length: int
    attention_factor: float = 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors | LongRopeScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding on the first `rotary_size` numbers of each head.

    interleaved: pairs are (2i, 2i + 1) (GPT-J style); else (i, i + rotary_size / 2) (NeoX style).
    """

    theta: float
    rotary_size: int
    interleaved: bool
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention; head h reads key/value head h // (heads // kv_heads)."""

    heads: int
    kv_heads: int
    head_size: int
    scale: float                         # softmax(scale q k)
    rope: Rope
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False                # rms norm of each query and key head, before rope
    sliding_window: int | None = None    # a token sees itself and the window - 1 tokens before it
    soft_cap: float | None = None        # scores = cap tanh(scores / cap)


@dataclass(frozen=True, slots=True)
class Dense:
    """down(activation(gate x) * up x)"""

    width: int
    activation: Activation = "silu"


@dataclass(frozen=True, slots=True)
class Mixture:
    """Top-k mixture of `experts` gated feed-forwards of `width`, softmax over all router logits before the choice."""

    experts: int
    experts_per_token: int
    width: int
    normalize_top_k: bool
    shared_width: int | None = None      # a shared expert, weighed by sigmoid(shared_gate x)
    activation: Activation = "silu"


FeedForward = Dense | Mixture


@dataclass(frozen=True, slots=True)
class Layer:
    """x += attention(norm x); x += feed_forward(norm x); with post_norms each branch is normed once more before +=."""

    attention: Attention
    feed_forward: FeedForward
    post_norms: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer. Tensors it wants, by canonical name, shape (rows, columns):

    embedding (V, D); norm (D,); output (V, D) unless tied_output; and per layer i, after `layers.{i}.`:
    attention_norm (D,); query (H hs, D), key, value (KV hs, D); query_bias, key_bias, value_bias; query_norm, key_norm
    (hs,); attention_output (D, H hs), attention_output_bias; attention_post_norm (D,); feed_norm (D,); gate, up (F, D),
    down (D, F); feed_post_norm (D,); router (E, D); per expert e experts.{e}.gate, experts.{e}.up (F, D) and
    experts.{e}.down (D, F); shared_gate, shared_up (S, D), shared_down (D, S), shared_router (1, D).
    """

    family: str
    vocabulary_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm_epsilon: float
    tied_output: bool
    context_length: int

    def at_context(self, context_length: int) -> "ModelSpec":
        """The same model for sequences of at most `context_length` tokens: LongRoPE's divisors are chosen."""
        return replace(self, layers=tuple(_layer_at_context(layer, context_length) for layer in self.layers))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape, for every tensor that this model must have."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embedding": (self.vocabulary_size, hidden), "norm": (hidden,)}
        if not self.tied_output:
            shapes["output"] = (self.vocabulary_size, hidden)
        for index, layer in enumerate(self.layers):
            for name, shape in _layer_shapes(layer, hidden).items():
                shapes[f"layers.{index}.{name}"] = shape
        return shapes


def _layer_at_context(layer: Layer, context_length: int) -> Layer:
    match layer.attention.rope.scaling:
        case LongRopeScaling(short, long, original, attention_factor):
            divisors = long if context_length > original else short
            rope = replace(layer.attention.rope, scaling=FrequencyFactors(divisors, attention_factor))
            return replace(layer, attention=replace(layer.attention, rope=rope))
        case _:
            return layer


def _layer_shapes(layer: Layer, hidden: int) -> dict[str, tuple[int, ...]]:
    a = layer.attention
    q, kv = a.heads * a.head_size, a.kv_heads * a.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,),
        "query": (q, hidden),
        "key": (kv, hidden),
        "value": (kv, hidden),
        "attention_output": (hidden, q),
        "feed_norm": (hidden,),
    }
    if a.qkv_bias:
        shapes |= {"query_bias": (q,), "key_bias": (kv,), "value_bias": (kv,)}
    if a.output_bias:
        shapes["attention_output_bias"] = (hidden,)
    if a.qk_norm:
        shapes |= {"query_norm": (a.head_size,), "key_norm": (a.head_size,)}
    if layer.post_norms:
        shapes |= {"attention_post_norm": (hidden,), "feed_post_norm": (hidden,)}
    match layer.feed_forward:
        case Dense(width=width):
            shapes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        case Mixture(experts=experts, width=width, shared_width=shared):
            shapes["router"] = (experts, hidden)
            for expert in range(experts):
                shapes |= {
                    f"experts.{expert}.gate": (width, hidden),
                    f"experts.{expert}.up": (width, hidden),
                    f"experts.{expert}.down": (hidden, width),
                }
            if shared is not None:
                shapes |= {
                    "shared_gate": (shared, hidden),
                    "shared_up": (shared, hidden),
                    "shared_down": (hidden, shared),
                    "shared_router": (1, hidden),
                }
    return shapes
