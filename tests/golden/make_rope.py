"""Writes rope.json: inverse frequencies and attention factors of transformers, for every scaling that Rillet has.

Run in an environment with transformers and torch: python tests/golden/make_rope.py
"""

import json
from pathlib import Path

import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

CASES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_given_factor": {
        "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "attention_factor": 1.5,
        "beta_fast": 16.0, "beta_slow": 2.0,
    },
}  # fmt: skip
THETA, HEAD_SIZE = 500000.0, 128


def main() -> None:
    golden: dict[str, object] = {"transformers": transformers.__version__, "theta": THETA, "head_size": HEAD_SIZE}
    for name, scaling in CASES.items():
        config = LlamaConfig(
            hidden_size=HEAD_SIZE * 4, num_attention_heads=4, max_position_embeddings=131072,
            rope_parameters={**scaling, "rope_theta": THETA},
        )  # fmt: skip
        if name == "default":
            frequencies, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        else:
            frequencies, factor = ROPE_INIT_FUNCTIONS[str(scaling["rope_type"])](config, "cpu")
        golden[name] = {"frequencies": frequencies.tolist(), "attention_factor": float(factor)}
    Path(__file__).with_name("rope.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
