"""Writes checkpoints/ and checkpoints.json: a tiny random model of each family as transformers saves it, and its logits.

Run in an environment with transformers and torch: python tests/golden/make_tiny_checkpoints.py
A case is a checkpoint with some keys of its config changed; log-softmax of the logits is float32, at some positions.
For models with experts the chosen ones are kept too, per layer (T, k), the heaviest first.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).with_name("checkpoints")
TOKENS = [3, 17, 42, 5, 61, 8, 8, 29, 50, 11, 2, 37, 44, 60, 13, 13] * 3
POSITIONS = [0, 1, 14, 15, 16, 31, 47]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# folder -> model_type, dtype, what differs from SIZES, the size of a shard
CHECKPOINTS = {
    "llama": ("llama", "bfloat16", {"head_dim": 16, "rope_parameters": PLAIN}, "25KB"),
    "llama_bias": ("llama", "bfloat16", {"head_dim": 8, "attention_bias": True, "num_hidden_layers": 1,
                                         "num_key_value_heads": 4, "tie_word_embeddings": True}, "1GB"),
    "mistral": ("mistral", "float16", {"head_dim": 12, "sliding_window": 9}, "1GB"),
    "qwen2": ("qwen2", "bfloat16", {"tie_word_embeddings": True, "rope_parameters": PLAIN | {"rope_theta": 1e6}}, "1GB"),
    "qwen3": ("qwen3", "float32", {"head_dim": 16, "rope_parameters": PLAIN | {"rope_theta": 1e6}}, "1GB"),
    "glm4": ("glm4", "bfloat16", {"head_dim": 16, "attention_bias": True,
                                  "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "1GB"),
    "qwen2_moe": ("qwen2_moe", "bfloat16", {**EXPERTS, "shared_expert_intermediate_size": 24}, "1GB"),
    "qwen3_moe": ("qwen3_moe", "bfloat16", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}, "1GB"),
    "qwen3_moe_mixed": ("qwen3_moe", "bfloat16", {**EXPERTS, "head_dim": 8, "num_hidden_layers": 3, "mlp_only_layers": [0],
                                                  "decoder_sparse_step": 1, "norm_topk_prob": False}, "1GB"),
}  # fmt: skip
SHORT, LONG = [1.0, 1.0, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0], [1.0, 1.3, 2.0, 3.5, 6.0, 9.0, 14.0, 20.0]
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn_mscale": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.5,
                    "mscale_all_dim": 0.5, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn_untruncated": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
    "yarn_factor": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.25},
    "longrope": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 4.0,
                 "original_max_position_embeddings": 16},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
}  # fmt: skip
# case -> checkpoint, changes of its config, number of tokens
CASES = {name: (name, {}, 48) for name in CHECKPOINTS}
CASES |= {f"llama_{name}": ("llama", {"rope_parameters": PLAIN | rope}, 48) for name, rope in ROPES.items()}
CASES |= {
    "llama_longrope_short": ("llama", {"rope_parameters": PLAIN | ROPES["longrope"]}, 16),
    "glm4_yarn": ("glm4", {"rope_parameters": PLAIN | ROPES["yarn"] | {"partial_rotary_factor": 0.5}}, 48),
    "qwen3_yarn": ("qwen3", {"rope_parameters": PLAIN | ROPES["yarn"]}, 48),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1,
                                "layer_types": ["full_attention", "sliding_attention"]}, 48),
    "mistral_full": ("mistral", {"sliding_window": None}, 48),
}  # fmt: skip


def write_checkpoint(folder: str) -> None:
    """Random weights, rounded to the checkpoint's dtype; norms around 1, biases large enough to matter."""
    model_type, dtype, changes, shard = CHECKPOINTS[folder]
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    rng = np.random.default_rng([*folder.encode()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = rng.standard_normal(parameter.shape)
            if "norm" in name:
                values = 1 + values / 4
            elif name.endswith("bias"):
                values /= 2
            elif "embed" not in name:
                values *= 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.from_numpy(values))
    model.to(getattr(torch, dtype)).save_pretrained(FOLDER / folder, max_shard_size=shard)


def golden(folder: str, changes: dict[str, object], length: int) -> dict[str, object]:
    config = transformers.AutoConfig.from_pretrained(FOLDER / folder, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER / folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    routers = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
    chosen: list[list[list[int]]] = []

    def remember(_: object, __: object, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        logits, _, indices = output
        shares = logits.softmax(-1).sort(-1, descending=True).values
        assert (shares[:, :2] - shares[:, 1:3]).min() > 2e-5, "two experts are as good as equal: take another seed"
        chosen.append(indices.tolist())

    for router in routers:
        router.register_forward_hook(remember)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS[:length]])).logits[0].double().log_softmax(-1)
    positions = [position for position in POSITIONS if position < length]
    rows = [[round(value, 6) for value in logits[position].tolist()] for position in positions]
    case = {"checkpoint": folder, "changes": changes, "tokens": TOKENS[:length], "positions": positions, "logprobs": rows}
    return case | {"experts": chosen} if chosen else case


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for folder in CHECKPOINTS:
        write_checkpoint(folder)
    found: dict[str, object] = {"transformers": transformers.__version__}
    for name, (folder, changes, length) in CASES.items():
        found[name] = golden(folder, changes, length)
        print(name)
    FOLDER.with_suffix(".json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
