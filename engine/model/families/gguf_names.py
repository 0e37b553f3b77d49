"""Canonical tensor names -> where llama.cpp's conversions put them in a GGUF file.

One table for all families, as llama.cpp has it: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py
"""

from engine.model.families.places import Place, fused, whole
from engine.model.spec import Mixture, ModelSpec
from engine.weights.tensors import Part

__all__ = ["READ_WITH_THE_SPEC", "gguf_places"]

MODEL_NAMES = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "output": "output.weight"}
LAYER_NAMES = {
    "attention_norm": "attn_norm.weight",
    "query": "attn_q.weight",
    "key": "attn_k.weight",
    "value": "attn_v.weight",
    "query_bias": "attn_q.bias",
    "key_bias": "attn_k.bias",
    "value_bias": "attn_v.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "attention_output": "attn_output.weight",
    "attention_output_bias": "attn_output.bias",
    "attention_post_norm": "post_attention_norm.weight",
    "feed_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "feed_post_norm": "post_ffw_norm.weight",
    "router": "ffn_gate_inp.weight",
    "shared_gate": "ffn_gate_shexp.weight",
    "shared_up": "ffn_up_shexp.weight",
    "shared_down": "ffn_down_shexp.weight",
}
# Their values are in the spec, no backend asks for them.
READ_WITH_THE_SPEC = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})

GATE_UP = ("gate", "up")                   # the order in which fused tensors hold the two
FUSED = frozenset({"glm4"})                # families whose ffn_up is both


def gguf_places(spec: ModelSpec, canonical: str, shape: tuple[int, ...]) -> tuple[Place, ...]:
    """Where the tensor may lie; `shape` is the one that the spec wants for it."""
    if canonical in MODEL_NAMES:
        return (whole(MODEL_NAMES[canonical], shape),)
    _, index, name = canonical.split(".", 2)
    block = f"blk.{index}."
    if name.startswith("experts."):
        _, expert, kind = name.split(".")
        return _expert(spec, int(index), block, int(expert), kind, shape)
    if name == "shared_router":            # llama.cpp squeezes it to (D,)
        return (Place(Part(f"{block}ffn_gate_inp_shexp.weight", 0, 1), (shape[1:], shape)),)
    if name in GATE_UP and spec.family in FUSED:
        return (fused(f"{block}ffn_up.weight", GATE_UP.index(name), shape),)
    return (whole(block + LAYER_NAMES[name], shape),)


def _expert(
    spec: ModelSpec, index: int, block: str, expert: int, kind: str, shape: tuple[int, ...]
) -> tuple[Place, ...]:
    """All experts of a layer are one tensor (E, rows, columns); a converter may fuse gate and up: (E, 2 rows, columns)."""
    mixture = spec.layers[index].feed_forward
    assert isinstance(mixture, Mixture), block
    rows, columns = shape
    alone = Place(Part(f"{block}ffn_{kind}_exps.weight", expert * rows, rows), ((mixture.experts, rows, columns),))
    if kind not in GATE_UP:
        return (alone,)
    first = (2 * expert + GATE_UP.index(kind)) * rows
    return alone, Place(Part(f"{block}ffn_gate_up_exps.weight", first, rows), ((mixture.experts, 2 * rows, columns),))
