"""Writes llama_cpp_logits.json: llama.cpp's next token at 200 positions of a text, for the demo model.

Run in an environment with llama-cpp-python (the test environment has none):
    python tests/golden/make_llama_cpp_logits.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

TEXT = """The lighthouse keeper had lived alone on the rock for eleven years. Every evening, before the sun went down, he
climbed the one hundred and twelve steps to the lamp and wound the clockwork that turned the great lens. In winter
the sea broke over the lower windows, and he would read aloud to himself so that he did not forget the sound of a
voice. One morning in March a small boat came round the point with its sail torn and nobody at the helm. He went
down to the landing with a rope and a hook. Water boils at 100 degrees Celsius at sea level. def fibonacci(n):
return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2). The capital of Italy is Rome, the capital of Spain is
Madrid, and the capital of Portugal is Lisbon. Photosynthesis turns carbon dioxide and water into sugar and
oxygen, using the energy of light. Every green leaf does this work, all day long, in silence."""
POSITIONS = 200


def main() -> None:
    model = llama_cpp.Llama(sys.argv[1], n_ctx=512, logits_all=True, n_threads=2, verbose=False)
    tokens = model.tokenize(TEXT.replace("\n", " ").encode(), add_bos=True)[:POSITIONS]
    model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)], np.float64)
    top = np.sort(logits, axis=1)[:, -2:]
    golden = {
        "llama_cpp_python": llama_cpp.__version__,
        "tokens": [int(token) for token in tokens],
        "argmax": logits.argmax(1).tolist(),
        "gap": np.round(top[:, 1] - top[:, 0], 4).tolist(),
    }
    Path(__file__).with_name("llama_cpp_logits.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
