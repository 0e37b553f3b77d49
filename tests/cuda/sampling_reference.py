"""What the tests of sampling share: a device's draws from given logits, launched as the runner does."""

from dataclasses import dataclass

import numpy as np

from backends.cuda.device import make_array
from backends.cuda.sampling import (
    KERNELS,
    SamplingFields,
    check_references,
    drawn_tokens,
    make_scratch,
    resolve_history,
    resolve_tokens,
    sample,
    score,
)  # fmt: skip
from tests.cuda.devices import make_device
from tests.support.sampling_steps import NOTHING


def ready(files=("sampling.cu", "resolve.cu", "scoring.cu"), **options):
    device = make_device(**options)
    device.prepare([kernel for kernel in KERNELS if kernel.file in files])
    return device


@dataclass
class Drawn:
    tokens: np.ndarray
    newest: np.ndarray
    status: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def on_device(device, logits, step, previous=NOTHING, *, head_rows=256, most_places=256, check=True):
    """All launches of a step, as the runner makes them."""
    check_references(step, len(previous))
    places, vocabulary = step.place_count, logits.shape[1]
    stream = device.stream()
    fields = SamplingFields(step)
    words = device.host_array(4 * fields.words).view(np.uint32)
    fields.pack(words)
    memory = make_array(device, "u32", fields.words)
    stream.copy_in(memory.address, words)
    there = fields.at(memory.address)
    room = max(places, len(previous), 1)
    newest = make_array(device, "i32", room)
    stream.copy_in(newest.address, np.ascontiguousarray(previous, np.int32))
    tokens, status, logprobs = (make_array(device, item, places) for item in ("i32", "i32", "f32"))
    top_ids = make_array(device, "i32", places, there.alternatives)
    top_logprobs = make_array(device, "f32", places, there.alternatives)
    scratch = make_scratch(device, vocabulary, most_places)
    made = [memory, newest, tokens, status, logprobs, top_ids, top_logprobs, scratch]
    resolve_history(stream, there, newest)
    for chunk in fields.chunks(head_rows):
        at = device.get(there.tokens_of(chunk))
        rows = device.put(logits[at])
        sample(stream, rows, there, chunk, scratch, newest, tokens, status)
        score(stream, rows, there, chunk, tokens, logprobs, top_ids, top_logprobs)
        device.synchronize()
        made.append(rows)
    drawn = Drawn(*(device.get(array) for array in (tokens, newest, status, logprobs, top_ids, top_logprobs)))
    for array in made:
        device.release(array.address)
    if check:
        np.testing.assert_array_equal(drawn_tokens(drawn.tokens, drawn.status), drawn.tokens)
        np.testing.assert_array_equal(drawn.newest[:places], drawn.tokens)
    return drawn


def resolved(device, tokens, newest):
    """tokens after resolve_tokens()."""
    stream = device.stream()
    there = device.put(tokens)
    resolve_tokens(stream, there, device.put(newest))
    return device.get(there)
