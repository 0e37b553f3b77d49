"""Rope from config.json: rope_parameters as transformers 5 writes it, or rope_theta and rope_scaling as 4 did.

Formulas of the defaults: transformers' modeling_rope_utils.py.
"""

from math import log, sqrt

from engine.errors import UnsupportedModel
from engine.model.families.bounds import MAX_CONTEXT
from engine.model.families.config_json import ConfigJson, ConfigTable
from engine.model.spec import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, RopeScaling, YarnScaling

__all__ = ["config_rope"]

MAX_FACTOR = 1e6


def config_rope(config: ConfigJson, head_size: int, *, interleaved: bool, rotary_share: float | None) -> Rope:
    """rotary_share: the part of each head that is rotated, unless the config states it; None: the whole, always."""
    table = _table(config)
    theta = table.number("rope_theta", 1.001, 1e15, default=config.number("rope_theta", 1.001, 1e15, default=10_000.0))
    if rotary_share is None:
        config.must_be("partial_rotary_factor", 1.0)
        table.must_be("partial_rotary_factor", 1.0)
        rotary_size = head_size
    else:
        stated = config.number("partial_rotary_factor", 1e-3, 1.0, default=rotary_share)
        rotary_size = int(head_size * table.number("partial_rotary_factor", 1e-3, 1.0, default=stated))
    if rotary_size % 2 or not rotary_size:
        raise config.bad("head_dim", head_size, f"such that an even number of it is rotated, not {rotary_size}")
    scaling = _scaling(config, table, rotary_size)
    return Rope(theta=theta, rotary_size=rotary_size, interleaved=interleaved, scaling=scaling)


def _table(config: ConfigJson) -> ConfigTable:
    new, old = config.has("rope_parameters"), config.has("rope_scaling")
    if new and old and config.values["rope_parameters"] != config.values["rope_scaling"]:
        raise UnsupportedModel(
            f"{config.file}: rope_parameters and rope_scaling contradict each other: delete the one that is wrong"
        )
    return config.table("rope_parameters" if new else "rope_scaling")


def _scaling(config: ConfigJson, table: ConfigTable, rotary_size: int) -> RopeScaling | None:
    table.ignore("finetuned")
    kind = table.text("rope_type", table.text("type", "default"))
    match kind:
        case "default" | "none":
            return None
        case "linear":
            factor = table.number("factor", 1e-3, MAX_FACTOR)
            return None if factor == 1.0 else LinearScaling(factor)
        case "dynamic":
            # NTK's base grows with what a sequence is longer than max_position_embeddings. No sequence here ever is: that
            # is the context length. Up to there it is plain rope, exactly.
            table.number("factor", 1.0, MAX_FACTOR)
            _original_length(config, table)
            return None
        case "yarn":
            return _yarn(config, table)
        case "longrope" | "su":
            return _longrope(config, table, rotary_size)
        case "llama3":
            return _llama3(config, table)
        case _:
            raise UnsupportedModel(
                f"{config.file}: its rope_type is {kind[:80]!r}, Rillet supports default, linear, dynamic, yarn, longrope "
                "and llama3: take another model"
            )


def _original_length(config: ConfigJson, table: ConfigTable) -> int:
    """Tokens before stretching. Some write it beside the table, and there it counts more, as in transformers."""
    stated = table.integer("original_max_position_embeddings", 2, MAX_CONTEXT, default=_context_length(config))
    return config.integer("original_max_position_embeddings", 2, MAX_CONTEXT, default=stated)


def _context_length(config: ConfigJson) -> int:
    return config.integer("max_position_embeddings", 1, MAX_CONTEXT)


def _yarn(config: ConfigJson, table: ConfigTable) -> YarnScaling:
    original = _original_length(config, table)
    factor = table.number("factor", 1.0, MAX_FACTOR, default=_context_length(config) / original)
    attention_factor = table.optional_number("attention_factor", 1e-6, MAX_FACTOR)
    mscale = table.number("mscale", 0.0, MAX_FACTOR, default=0.0)
    mscale_all_dim = table.number("mscale_all_dim", 0.0, MAX_FACTOR, default=0.0)
    if attention_factor is None and mscale and mscale_all_dim:       # one of the two alone means nothing
        attention_factor = (0.1 * mscale * log(factor) + 1.0) / (0.1 * mscale_all_dim * log(factor) + 1.0)
    return YarnScaling(
        factor=factor,
        original_context_length=original,
        beta_fast=table.number("beta_fast", 1e-3, MAX_FACTOR, default=32.0),
        beta_slow=table.number("beta_slow", 1e-3, MAX_FACTOR, default=1.0),
        attention_factor=attention_factor,
        truncate=table.boolean("truncate", True),
    )


def _longrope(config: ConfigJson, table: ConfigTable, rotary_size: int) -> LongRopeScaling:
    original = _original_length(config, table)
    factor = table.number("factor", 1e-3, MAX_FACTOR, default=_context_length(config) / original)
    temperature = sqrt(1.0 + log(factor) / log(original)) if factor > 1.0 else 1.0
    return LongRopeScaling(
        short=table.numbers("short_factor", rotary_size // 2, 1e-6, MAX_FACTOR),
        long=table.numbers("long_factor", rotary_size // 2, 1e-6, MAX_FACTOR),
        original_context_length=original,
        attention_factor=table.number("attention_factor", 1e-6, MAX_FACTOR, default=temperature),
    )


def _llama3(config: ConfigJson, table: ConfigTable) -> Llama3Scaling:
    low = table.number("low_freq_factor", 1e-3, MAX_FACTOR)
    high = table.number("high_freq_factor", 1e-3, MAX_FACTOR)
    if high <= low:
        raise table.bad("high_freq_factor", high, f"more than low_freq_factor {low}")
    return Llama3Scaling(
        factor=table.number("factor", 1.0, MAX_FACTOR),
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_context_length=_original_length(config, table),
    )
