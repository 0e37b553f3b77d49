"""Runs workloads on llama.cpp, in the environment that has llama-cpp-python. peer.py starts it; nothing here is imported.

    python llama_cpp_side.py MODEL THREADS CONTEXT SEQUENCES

One JSON object per line on standard input ({"prompts": [[ids]], "answers": [n]}), one with the three rates on standard
output. Continuous batching as llama-batched-bench does it: prompts in batches of 512, then one token of every sequence per
step, greedily. Only the standard library, NumPy and llama_cpp: the file runs where Rillet is not installed.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np

BATCH = 512
SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)      # kept: C code calls it as long as it runs


class Side:
    def __init__(self, path: str, threads: int, context: int, sequences: int) -> None:
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_load_model_from_file(path.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self.context = llama_cpp.llama_new_context_with_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        """Entries are (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        if llama_cpp.llama_decode(self.context, batch):
            sys.exit("llama_decode failed")

    def best(self, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, place)
        values = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))
        return int(values.argmax())

    def run(self, prompts: list[list[int]], answers: list[int]) -> dict[str, float]:
        llama_cpp.llama_memory_clear(self.memory, True)
        newest, counts = [0] * len(prompts), [0] * len(prompts)
        began = time.perf_counter()
        entries: list[tuple[int, int, int, bool]] = []
        flat = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(flat), BATCH):
            entries = flat[start : start + BATCH]
            self.decode(entries)
            for place, (_, _, sequence, wanted) in enumerate(entries):
                if wanted:
                    newest[sequence], counts[sequence] = self.best(place), 1
        last_first, at_first = time.perf_counter(), sum(counts)
        while running := [s for s in range(len(prompts)) if counts[s] < answers[s]]:
            for start in range(0, len(running), BATCH):
                some = running[start : start + BATCH]
                self.decode([(newest[s], len(prompts[s]) + counts[s] - 1, s, True) for s in some])
                for place, s in enumerate(some):
                    newest[s] = self.best(place)
                    counts[s] += 1
        ended = time.perf_counter()
        return {
            "prompt": sum(map(len, prompts)) / (last_first - began),
            "decode": (sum(counts) - at_first) / max(ended - last_first, 1e-9),
            "output": sum(counts) / (ended - began),
        }


def main() -> None:
    path, threads, context, sequences = sys.argv[1], *map(int, sys.argv[2:5])
    llama_cpp.llama_log_set(SILENT, None)
    side = Side(path, threads, context, sequences)
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        print(json.dumps(side.run(wanted["prompts"], wanted["answers"])), flush=True)


if __name__ == "__main__":
    main()
