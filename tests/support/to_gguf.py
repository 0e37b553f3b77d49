"""write_gguf(): a tiny Hugging Face checkpoint as llama.cpp's converter would write it, without a tokenizer.

Written from what the converter does (conversion/*.py of llama.cpp), not from engine.model.families: names, the permutation
of llama's query and key, stacked experts, rope's scaling in keys or tensors.
"""

from collections.abc import Mapping
from math import log, pi, sqrt
from pathlib import Path

import numpy as np

from engine.weights.tensors import STORAGE, RawTensor, to_float32
from tests.support.gguf_bytes import encode_gguf

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe", "glm4": "glm4",
}  # fmt: skip
MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm", "post_mlp_layernorm": "post_ffw_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
Encoded = tuple[tuple[int, ...], int, bytes]


def write_gguf(path: Path, config: Mapping, tensors: Mapping[str, RawTensor]) -> Path:
    """`tensors` by their Hugging Face names; matrices keep their type, vectors become float32 as in llama.cpp."""
    metadata, factors = metadata_of(config)
    encoded: dict[str, Encoded] = {name: encode(np.array(values, np.float32)) for name, values in factors.items()}
    experts: dict[str, dict[int, RawTensor]] = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if stem in MODEL:
            encoded[f"{MODEL[stem]}.{suffix}"] = encode(tensor)
            continue
        _, _, layer, part = stem.split(".", 3)
        if part.startswith("mlp.experts."):
            _, _, expert, kind = part.split(".")
            stacked = f"blk.{layer}.ffn_{kind.removesuffix('_proj')}_exps.weight"
            experts.setdefault(stacked, {})[int(expert)] = tensor
            continue
        if metadata["general.architecture"] == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
            tensor = permuted(tensor, heads)
        if part == "mlp.shared_expert_gate":
            tensor = RawTensor(name, tensor.shape[1:], tensor.storage, tensor.data, "")
        encoded[f"blk.{layer}.{LAYER[part]}.{suffix}"] = encode(tensor)
    for name, each in experts.items():
        first, data = each[0], b"".join(each[expert].data.tobytes() for expert in range(len(each)))
        encoded[name] = ((len(each), *first.shape), first.storage.gguf_id, data)
    path.write_bytes(encode_gguf(metadata, encoded).data)
    return path


def encode(values: np.ndarray | RawTensor) -> Encoded:
    if isinstance(values, RawTensor):
        if len(values.shape) > 1:
            return values.shape, values.storage.gguf_id, values.data.tobytes()
        values = to_float32(values)
    return values.shape, STORAGE["F32"].gguf_id, values.tobytes()


def permuted(tensor: RawTensor, heads: int) -> RawTensor:
    """Rows of a head, first half then second half, become pairs of neighbours."""
    rows = tensor.data.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
    return RawTensor(tensor.name, tensor.shape, tensor.storage, rows.swapaxes(1, 2).reshape(-1).copy(), "")


def metadata_of(config: Mapping) -> tuple[dict[str, object], dict[str, list[float]]]:
    """Metadata, and rope's tensors."""
    arch = ARCHITECTURES[config["model_type"]]
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config["rope_parameters"]
    rotary = int(head_size * rope.get("partial_rotary_factor", 1.0))
    keys: dict[str, object] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": rotary,
        "vocab_size": config["vocab_size"],
    }
    if config.get("sliding_window"):
        keys["attention.sliding_window"] = config["sliding_window"]
    if "num_experts_per_tok" in config:
        keys["expert_count"] = config.get("num_experts") or config["num_local_experts"]
        keys["expert_used_count"] = config["num_experts_per_tok"]
        keys["expert_feed_forward_length"] = config["moe_intermediate_size"]
        if "shared_expert_intermediate_size" in config:
            keys["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    scaling, factors = scaling_of(rope, rotary)
    keys |= {f"rope.scaling.{key}": value for key, value in scaling.items()}
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in keys.items()}}, factors


def scaling_of(rope: Mapping, rotary: int) -> tuple[dict[str, object], dict[str, list[float]]]:
    """Keys under rope.scaling, and tensors."""
    factor, original = rope.get("factor", 1.0), rope.get("original_max_position_embeddings", 0)
    match rope["rope_type"]:
        case "linear":
            return {"type": "linear", "factor": factor}, {}
        case "yarn":
            keys = {"type": "yarn", "factor": factor, "original_context_length": original}
            keys |= {f"yarn_{key}": rope[key] for key in ("beta_fast", "beta_slow") if key in rope}
            own = 0.1 * log(factor) + 1.0          # llama.cpp's temperature, which attn_factor multiplies
            if "mscale" in rope:
                above, below = (0.1 * rope[key] * log(factor) + 1.0 for key in ("mscale", "mscale_all_dim"))
                keys["attn_factor"] = above / below / own
            if "attention_factor" in rope:
                keys["yarn_attn_factor"] = rope["attention_factor"]
            return keys, {}
        case "longrope":
            keys = {"type": "longrope", "original_context_length": original}
            keys["attn_factor"] = sqrt(1 + log(factor) / log(original))
            tensors = {f"rope_factors_{which}.weight": rope[f"{which}_factor"] for which in ("short", "long")}
            return keys, tensors
        case "llama3":
            return {}, {"rope_freqs.weight": [llama3_divisor(rope, pair, rotary) for pair in range(rotary // 2)]}
        case _:
            return {}, {}


def llama3_divisor(rope: Mapping, pair: int, rotary: int) -> float:
    """By wavelength, as the converter's generate_extra_tensors."""
    wavelength = 2 * pi * rope["rope_theta"] ** (2 * pair / rotary)
    original, low, high = (rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    if wavelength < original / high:
        return 1.0
    if wavelength > original / low:
        return rope["factor"]
    smooth = (original / wavelength - low) / (high - low)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)
