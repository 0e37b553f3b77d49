"""Writes rope.json: frequencies, attention factors, cosines and sines of transformers, for every scaling that Rillet has.

Run in an environment with transformers and torch: python tests/golden/make_rope.py
transformers computes in float32, whose angles are wrong by up to 0.01 at position 262,143. Its functions run here with
float64 in the place of float32, so that the data are as exact as its formulas.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

THETA, HEAD_SIZE, CONTEXT = 500000.0, 128, 131072
SHORT = [round(1 + pair / 100, 4) for pair in range(HEAD_SIZE // 2)]
LONG = [round(1 + pair**2 / 60, 4) for pair in range(HEAD_SIZE // 2)]
LONGROPE = {
    "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 32.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
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
    "yarn_mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
        "mscale_all_dim": 0.707,
    },
    "yarn_untruncated": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32768, "truncate": False,
    },
    "longrope_short": LONGROPE,
    "longrope_long": LONGROPE,
}  # fmt: skip
POSITIONS = [0, 1, 4095, 32768, 131071, 262143]
PAIRS = [0, 1, 7, 20, 31, 40, 63]


@contextmanager
def doubles() -> Iterator[None]:
    """float64 wherever transformers says float32."""
    kept = torch.float, torch.float32, torch.Tensor.float
    torch.float = torch.float32 = torch.float64
    torch.Tensor.float = torch.Tensor.double
    yield
    torch.float, torch.float32, torch.Tensor.float = kept


def main() -> None:
    golden: dict[str, object] = {
        "transformers": transformers.__version__, "theta": THETA, "head_size": HEAD_SIZE, "context": CONTEXT,
        "positions": POSITIONS, "pairs": PAIRS,
    }  # fmt: skip
    for name, scaling in CASES.items():
        config = LlamaConfig(
            hidden_size=HEAD_SIZE * 4, num_attention_heads=4, max_position_embeddings=CONTEXT,
            rope_parameters={**scaling, "rope_theta": THETA},
        )  # fmt: skip
        with doubles():
            if name == "default":
                frequencies, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
            else:
                length = CONTEXT if name == "longrope_long" else None
                frequencies, factor = ROPE_INIT_FUNCTIONS[str(scaling["rope_type"])](config, "cpu", seq_len=length)
        assert frequencies.dtype == torch.float64, name
        angles = np.multiply.outer(np.array(POSITIONS), frequencies.numpy())[:, PAIRS]     # (positions, pairs)
        golden[name] = {
            "scaling": scaling,
            "frequencies": frequencies.tolist(),
            "attention_factor": float(factor),
            "cosines": (np.cos(angles) * factor).round(9).tolist(),
            "sines": (np.sin(angles) * factor).round(9).tolist(),
        }
    Path(__file__).with_name("rope.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
