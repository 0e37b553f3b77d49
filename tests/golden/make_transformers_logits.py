"""Writes transformers_logits.json: the logprobs of transformers in float32, for the demo model dequantized.

The tokens are those of llama_cpp_logits.json. Run in an environment with transformers, torch and gguf:
    python tests/golden/make_transformers_logits.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
import sys
from pathlib import Path

import torch
import transformers

TOP = 3


def main() -> None:
    here, model_file = Path(__file__).parent, Path(sys.argv[1])
    tokens = json.loads((here / "llama_cpp_logits.json").read_text())["tokens"]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_file.parent, gguf_file=model_file.name, dtype=torch.float32
    )
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    top = logprobs.topk(TOP)
    golden = {
        "transformers": transformers.__version__,
        "tokens": tokens,
        "top_ids": top.indices.tolist(),
        "top_logprobs": [[round(value, 6) for value in row] for row in top.values.tolist()],
    }
    (here / "transformers_logits.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
