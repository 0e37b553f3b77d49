"""Rope from a GGUF file: its base, its size, and its scaling, which is in keys (linear, yarn) or tensors (factors)."""

from collections.abc import Mapping
from math import isfinite, log

from engine.errors import BadModelFile, UnsupportedModel
from engine.model.families.bounds import MAX_CONTEXT
from engine.model.families.gguf_metadata import GgufMetadata
from engine.model.spec import FrequencyFactors, LinearScaling, LongRopeScaling, Rope, RopeScaling, YarnScaling
from engine.weights.tensors import RawTensor, to_float32

__all__ = ["gguf_rope"]

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


def gguf_rope(metadata: GgufMetadata, tensors: Mapping[str, RawTensor], head_size: int, interleaved: bool) -> Rope:
    """Raises BadModelFile and UnsupportedModel."""
    rotary_size = metadata.integer("rope.dimension_count", 2, head_size, default=head_size)
    if rotary_size % 2:
        raise metadata.bad("rope.dimension_count", rotary_size, "even")
    theta = metadata.number("rope.freq_base", 1.001, 1e15, default=10_000.0)
    scaling = _scaling(metadata, tensors, rotary_size)
    if FACTORS in tensors:
        if scaling is not None:
            raise UnsupportedModel(
                f"{metadata.file}: it has both rope.scaling.type and rope_freqs.weight, Rillet supports one of them: take "
                "another conversion"
            )
        scaling = FrequencyFactors(_divisors(metadata, tensors, FACTORS, rotary_size))
    return Rope(theta=theta, rotary_size=rotary_size, interleaved=interleaved, scaling=scaling)


def _scaling(metadata: GgufMetadata, tensors: Mapping[str, RawTensor], rotary_size: int) -> RopeScaling | None:
    # Before rope.scaling.* there was rope.scale_linear; a factor without a type means linear too, as in llama.cpp.
    old = metadata.number("rope.scale_linear", 0.0, 1e6, default=0.0)
    factor = metadata.number("rope.scaling.factor", 0.0, 1e6, default=old)
    # llama.cpp takes the two tensors wherever they are, so a file that has them need not name the type.
    unnamed = "longrope" if LONG in tensors or SHORT in tensors else "linear" if factor else "none"
    kind = metadata.text("rope.scaling.type", unnamed)
    original = metadata.integer("rope.scaling.original_context_length", 0, MAX_CONTEXT, default=0)
    attention_factor = metadata.optional_number("rope.scaling.attn_factor", 1e-6, 1e6)
    beta_fast, beta_slow, temperature = _yarn_numbers(metadata)
    if kind != "longrope" and unnamed == "longrope":
        raise UnsupportedModel(
            f"{metadata.file}: it has {LONG} or {SHORT} beside rope.scaling.type {kind!r}, Rillet supports one of them: "
            "take another conversion"
        )
    if kind in ("none", "linear"):
        metadata.must_be("rope.scaling.attn_factor", 1.0)      # it would scale every rotation
    match kind:
        case "none":
            return None
        case "linear":
            return LinearScaling(factor) if factor not in (0.0, 1.0) else None
        case "yarn":
            if factor < 1.0 or not original:
                raise metadata.bad("rope.scaling.factor", factor, "at least 1, beside an original_context_length")
            if attention_factor is not None and temperature is None:
                # llama.cpp multiplies this one by YaRN's own temperature; our field replaces that temperature.
                temperature = attention_factor * (0.1 * log(factor) + 1.0)
            return YarnScaling(factor, original, beta_fast, beta_slow, temperature)
        case "longrope":
            return LongRopeScaling(
                short=_divisors(metadata, tensors, SHORT, rotary_size),
                long=_divisors(metadata, tensors, LONG, rotary_size),
                original_context_length=original or metadata.integer("context_length", 1, MAX_CONTEXT),
                attention_factor=1.0 if attention_factor is None else attention_factor,
            )
        case _:
            raise UnsupportedModel(
                f"{metadata.file}: rope.scaling.type is {kind[:80]!r}, Rillet supports none, linear, yarn and longrope: "
                "take another model"
            )


def _yarn_numbers(metadata: GgufMetadata) -> tuple[float, float, float | None]:
    """beta_fast, beta_slow and the temperature that the model's makers state: llama.cpp's converter copies transformers'
    attention_factor to yarn_attn_factor (its runtime does not read that)."""
    metadata.must_be("rope.scaling.yarn_ext_factor", 1.0)
    metadata.must_be("rope.scaling.yarn_log_multiplier", 0.0)
    return (
        metadata.number("rope.scaling.yarn_beta_fast", 1e-3, 1e6, default=32.0),
        metadata.number("rope.scaling.yarn_beta_slow", 1e-3, 1e6, default=1.0),
        metadata.optional_number("rope.scaling.yarn_attn_factor", 1e-6, 1e6),
    )


def _divisors(
    metadata: GgufMetadata, tensors: Mapping[str, RawTensor], name: str, rotary_size: int
) -> tuple[float, ...]:
    wanted = (rotary_size // 2,)
    tensor = tensors.get(name)
    if tensor is None:
        raise BadModelFile(f"it is missing, in shape {wanted}: download the file again", file=metadata.file, tensor=name)
    if tensor.shape != wanted:
        raise BadModelFile(
            f"its shape is {tensor.shape}, it must be {wanted}: download the file again", file=tensor.file, tensor=name
        )
    divisors = tuple(float(value) for value in to_float32(tensor))
    if not all(isfinite(value) and value > 0.0 for value in divisors):
        raise BadModelFile(
            "a frequency factor is not a positive number: download the file again", file=tensor.file, tensor=name
        )
    return divisors
