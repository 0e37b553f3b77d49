"""References to what the ticket before drew, put in on the device: in tokens and in history."""

import numpy as np
import pytest

from backends.cuda.device import make_array
from backends.cuda.sampling import SamplingFields, check_references, resolve_history
from engine.errors import StepFailed
from engine.step import History
from tests.cuda.sampling_reference import on_device, ready, resolved
from tests.support.sampling_steps import make_step, normal, on_cpu, random_step

FILES = ("resolve.cu", "sampling.cu")


@pytest.fixture(scope="module")
def device():
    return ready(FILES)


def history_of(*places):
    """Places: lists of (token, count, in prompt)."""
    entries = [entry for place in places for entry in place]
    return History(
        np.cumsum([0, *map(len, places)]).astype(np.int32), np.int32([e[0] for e in entries]),
        np.int32([e[1] for e in entries]), np.array([e[2] for e in entries], bool),
    )  # fmt: skip


def history_after(device, history, previous):
    """[place][entry]: (token, count, in prompt) after resolve_history()."""
    fields = SamplingFields(make_step(len(history.starts) - 1, history=history))
    words = np.zeros(fields.words, np.uint32)
    fields.pack(words)
    memory = make_array(device, "u32", fields.words)
    stream = device.stream()
    stream.copy_in(memory.address, words)
    resolve_history(stream, fields.at(memory.address), device.put(np.int32(previous)))
    words = device.get(memory)
    tokens, counts = (words[words[at] :][: len(history.tokens)].astype(int) for at in (1, 2))
    entries = [(token, count >> 1, bool(count & 1)) for token, count in zip(tokens.tolist(), counts.tolist(), strict=True)]
    return [entries[a:b] for a, b in zip(history.starts, history.starts[1:], strict=False)]


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_tokens_are_replaced_where_they_are_references(device, count):
    rng = np.random.default_rng(count)
    newest = rng.integers(0, 100_000, 300).astype(np.int32)
    known, places = rng.integers(0, 100_000, count), rng.integers(0, 300, count)
    tokens = np.where(rng.random(count) < 0.5, known, -1 - places).astype(np.int32)
    expected = np.where(tokens < 0, newest[np.maximum(0, -1 - tokens)], tokens)
    np.testing.assert_array_equal(resolved(device, tokens, newest), expected)


def test_a_reference_joins_the_entry_of_its_token(device):
    history = history_of(
        [(5, 2, True), (-1, 1, False), (9, 0, True)],          # place 0 drew 9
        [(-2, 1, False), (7, 3, True)],                        # place 1 drew 7: the reference stands first
        [],
        [(-3, 1, False)],                                      # place 2 drew 7
        [(-1, 1, False), (-4, 1, False), (9, 4, False)],       # both drew 9
        [(1, 1, True)],
    )
    assert history_after(device, history, [9, 7, 7, 9]) == [
        [(5, 2, True), (9, 1, True), (9, 0, False)], [(7, 4, True), (7, 0, False)], [], [(7, 1, False)],
        [(9, 6, False), (9, 0, False), (9, 0, False)], [(1, 1, True)],
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 3, 4])
def test_histories_longer_than_a_block_are_merged_wherever_the_entries_stand(seed):
    rng = np.random.default_rng(seed)
    places, previous = [], rng.integers(0, 3000, 40).astype(np.int32)
    for _ in range(12):
        tokens = rng.choice(3000, rng.integers(1, 1500), replace=False)
        counts = rng.integers(0, 5, len(tokens))
        for at in rng.choice(len(tokens), min(3, len(tokens)), replace=False):
            tokens[at], counts[at] = -1 - rng.integers(40), 1
        places.append([(int(t), int(c), bool(rng.random() < 0.5) and t >= 0) for t, c in zip(tokens, counts, strict=True)])
    after = history_after(ready(FILES, seed=seed), history_of(*places), previous)
    for before, mine in zip(places, after, strict=True):
        sums: dict[int, list] = {}
        for token, count, in_prompt in before:
            entry = sums.setdefault(int(previous[-1 - token]) if token < 0 else token, [0, False])
            entry[0], entry[1] = entry[0] + count, entry[1] or in_prompt
        counted = {token: [count, in_prompt] for token, count, in_prompt in mine if count or in_prompt}
        assert counted == {token: entry for token, entry in sums.items() if entry != [0, False]}
        assert sum(1 for _, count, in_prompt in mine if count or in_prompt) == len(counted)


@pytest.mark.parametrize("seed", [0, 1, 6])
def test_penalties_with_references_give_the_cpus_tokens(seed):
    rng = np.random.default_rng(seed)
    logits = normal(rng, 60, 60, 1)
    step = random_step(rng, 60, 60, previous=30)
    previous = rng.integers(0, 60, 30).astype(np.int32)
    assert (step.history.tokens < 0).sum() > 5
    drawn = on_device(ready(FILES, seed=seed), logits, step, previous, head_rows=16)
    np.testing.assert_array_equal(drawn.tokens, on_cpu(logits, step, previous).tokens)


def test_a_reference_to_a_place_that_was_not_drawn_is_refused():
    check_references(make_step(1, tokens=[4, -3], history=history_of([(-3, 1, False)])), 3)
    for step in (make_step(1, tokens=[4, -4]), make_step(1, history=history_of([(-4, 1, False)]))):
        with pytest.raises(StepFailed, match="a token refers to place 3 of a step that drew 3 tokens"):
            check_references(step, 3)


@pytest.mark.parametrize("number", range(4))
def test_a_removed_barrier_is_found_out(number):
    def without(text):
        parts = text.split("__syncthreads();")
        return "__syncthreads();".join(parts[: number + 1]) + "__syncthreads();".join(parts[number + 1 :])

    history = history_of(*[[(t, 1, True) for t in range(1, 400)] + [(-1, 1, False), (-2, 1, False), (0, 1, True)]] * 3)
    expected = history_after(ready(FILES), history, [7, 399])
    found = 0
    for seed in (0, 1, 2, 3):
        try:
            broken = ready(("resolve.cu",), seed=seed, edits={"resolve.cu": without})
            found += history_after(broken, history, [7, 399]) != expected
        except (StepFailed, IndexError):
            found += 1
    assert found > 0
