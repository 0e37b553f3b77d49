"""Writes tiny_models.json: logits of transformers for tiny models whose weights are a formula, one per feature of a spec.

Run in an environment with transformers and torch: python tests/golden/make_tiny_models.py
The test imports `weight` from here, so that no weight is committed; torch is imported in main only.
"""

import json
import zlib
from pathlib import Path

import numpy as np

TOKENS = [3, 17, 42, 5, 61, 8, 8, 29, 50, 11, 2, 37] * 4
COMMON = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "attn_implementation": "eager",
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "llama": {"rope_parameters": LLAMA3},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "qwen3": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                  "original_max_position_embeddings": 32}},
    "mistral": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "sliding_window": 9},
    "glm4": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
             "pad_token_id": 0, "attention_bias": True},
}  # fmt: skip


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random numbers that depend on the name only; norms around 1."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.integers(-1000, 1001, shape).astype(np.float32) / np.float32(1000)
    return 1 + values / 4 if "norm" in name else values / np.float32(np.sqrt(shape[-1]) / 2)


def main() -> None:
    import torch
    import transformers

    golden: dict[str, object] = {"transformers": transformers.__version__}
    for family, settings in MODELS.items():
        config = transformers.AutoConfig.for_model(family, **COMMON, **settings)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
            logits = model(torch.tensor([TOKENS])).logits[0].double().log_softmax(-1)
        golden[family] = [[round(value, 6) for value in row] for row in logits[[0, 13, 47]].tolist()]
        print(family, [name for name, _ in model.named_parameters() if "layers.0" in name])
    Path(__file__).with_name("tiny_models.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
