"""Runs workloads on mlx-lm, in the environment that has it. ci/mac_check.py starts it; nothing here is imported.

    python mac_peer.py FOLDER | JSON     a folder that mlx-lm reads, or {"config": {...}, "bits": 4 or null}: random weights

One JSON object per line on standard input ({"prompts": [[ids]], "answers": [n]}), one with the three rates on standard
output, as engine/bench/llama_cpp_side.py has it: greedily, end tokens ignored. One prompt goes through generate_step, many
through BatchGenerator. Only the standard library and mlx-lm: the file runs where Rillet is not installed.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

generate = importlib.import_module("mlx_lm.generate")        # the package has a function of this name
GROUP = 64
MOST_TOGETHER = 128


def load(wanted: str) -> Any:
    if not wanted.startswith("{"):
        return importlib.import_module("mlx_lm.utils").load_model(Path(wanted))[0]
    about = json.loads(wanted)
    kind = importlib.import_module(f"mlx_lm.models.{about['config']['model_type']}")
    model = kind.Model(kind.ModelArgs.from_dict(about["config"]))
    model.set_dtype(mx.bfloat16)
    if about["bits"]:
        nn.quantize(model, group_size=GROUP, bits=about["bits"])
    mx.eval(model.parameters())
    return model


def one(model: Any, prompt: list[int], answer: int) -> list[float]:
    """When each token was there."""
    steps = generate.generate_step(mx.array(prompt), model, max_tokens=answer)
    return [time.perf_counter() for _ in steps]


def many(model: Any, prompts: list[list[int]], answers: list[int]) -> list[list[float]]:
    generator = generate.BatchGenerator(model, completion_batch_size=MOST_TOGETHER)
    try:
        places = {number: place for place, number in enumerate(generator.insert(prompts, answers))}
        times: list[list[float]] = [[] for _ in prompts]
        while responses := generator.next_generated():
            now = time.perf_counter()
            for response in responses:
                times[places[response.uid]].append(now)
        return times
    finally:
        generator.close()


def run(model: Any, prompts: list[list[int]], answers: list[int]) -> dict[str, float]:
    began = time.perf_counter()
    times = many(model, prompts, answers) if len(prompts) > 1 else [one(model, prompts[0], answers[0])]
    ended = time.perf_counter()
    if [len(these) for these in times] != answers:
        sys.exit(f"mlx-lm made {sum(map(len, times))} tokens, {sum(answers)} were asked for")
    last_first = max(these[0] for these in times)
    late = sum(moment > last_first for these in times for moment in these)
    return {
        "prompt": sum(map(len, prompts)) / (last_first - began),
        "decode": late / max(ended - last_first, 1e-9),
        "output": sum(answers) / (ended - began),
    }


def main() -> None:
    model = load(sys.argv[1])
    one(model, [1, 2, 3, 4], 4)                              # compiles
    print(json.dumps({"version": importlib.import_module("mlx_lm").__version__}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(run(model, wanted["prompts"], wanted["answers"])), flush=True)


if __name__ == "__main__":
    main()
