"""Damaged GGUF files: whatever the bytes, opening ends soon, takes little memory, and fails with a ModelError only."""

import random
import time
import tracemalloc
from math import prod
from pathlib import Path

import pytest

from engine.errors import ModelError
from engine.weights.checkpoint import open_checkpoint
from engine.weights.gguf_file import GgufFile
from tests.support.gguf_bytes import encode_gguf
from tests.support.tiny_gguf import TEMPLATE, model_metadata, tokenizer_metadata, write_tiny_gguf

SLOW_S = 5.0                               # a healthy one takes 3 ms; this only tells a hang
LARGE_BYTES = 64 << 20
RANDOM_FILES = 3_000
BUDGET_S = 30.0


def small_file() -> tuple[bytes, list[tuple[str, int, int]]]:
    """A model of one layer, with every kind of metadata, and the places of its lengths, counts, types and offsets."""
    keys = {
        **model_metadata(layers=1, hidden=4, heads=1, kv_heads=1, head_size=4, width=4),
        **tokenizer_metadata(),
        "extra.deep": [[1, 2], [3]],
        "extra.flag": True,
    }
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    sizes = {"attn_norm": (4,), "ffn_norm": (4,), **dict.fromkeys(matrices, (4, 4))}
    rows = len(keys["tokenizer.ggml.tokens"])   # type: ignore[arg-type]
    tensors = {"token_embd.weight": ((rows, 4), 0, bytes(rows * 16)), "output_norm.weight": ((4,), 0, bytes(16))}
    tensors |= {f"blk.0.{name}.weight": (shape, 0, bytes(4 * prod(shape))) for name, shape in sizes.items()}
    built = encode_gguf(keys, tensors)
    return bytes(built.data), built.marks


def open_damaged(path: Path) -> bool:
    """True if it opened after all; a ModelError is the only error that may come."""
    began = time.perf_counter()
    try:
        open_checkpoint(path).close()
        opened = True
    except ModelError:
        opened = False
    assert time.perf_counter() - began < SLOW_S
    return opened


def test_the_undamaged_file_opens(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file()[0])
    assert open_damaged(path)


def test_every_length_count_type_and_offset_can_be_any_number(tmp_path: Path) -> None:
    whole, marks = small_file()
    seen: set[str] = set()
    path = tmp_path / "model.gguf"
    tracemalloc.start()
    try:
        for name, place, size in marks:
            if name.startswith("length of element") and name in seen:
                continue                   # one element of each list stands for the others
            seen.add(name)
            right = int.from_bytes(whole[place : place + size], "little")
            top = (1 << 8 * size) - 1
            for wrong in {0, 1, right + 1, max(right - 1, 0), 255, 65_536, top >> 1, top, top // 3, len(whole)} - {right}:
                damaged = bytearray(whole)
                damaged[place : place + size] = (wrong & top).to_bytes(size, "little")
                path.write_bytes(damaged)
                tracemalloc.reset_peak()
                open_damaged(path)
                assert tracemalloc.get_traced_memory()[1] < LARGE_BYTES, (name, wrong)
    finally:
        tracemalloc.stop()
    assert len(seen) > 100


def test_random_damage_is_a_typed_error_or_a_model(tmp_path: Path) -> None:
    whole, marks = small_file()
    header = len(whole) - 300
    draw = random.Random(0)
    path = tmp_path / "model.gguf"
    ends = time.perf_counter() + BUDGET_S
    opened = done = 0
    while done < RANDOM_FILES and time.perf_counter() < ends:
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
            match draw.randrange(6):
                case 0:
                    damaged[draw.randrange(len(damaged))] = draw.randrange(256)
                case 1:
                    damaged[draw.randrange(min(header, len(damaged)))] ^= 1 << draw.randrange(8)
                case 2:
                    _, place, size = draw.choice(marks)
                    damaged[place : place + size] = draw.randbytes(size)
                case 3:
                    del damaged[draw.randrange(100, len(damaged)) :]
                case 4:
                    place = draw.randrange(len(damaged))
                    del damaged[place : place + draw.randrange(1, 40)]
                case 5:
                    place = draw.randrange(len(damaged))
                    damaged[place:place] = draw.randbytes(draw.randrange(1, 40))
            if len(damaged) < 200:
                break
        path.write_bytes(damaged)
        opened += open_damaged(path)
        done += 1
    assert done > 300
    assert opened < done


KEY_VALUES = [None, "", "x", -1, 0, 1, 1 << 31, 1 << 40, 0.0, -1.0, float("nan"), float("inf"), True, [], [1], ["a"], [[1]]]


@pytest.mark.parametrize("value", KEY_VALUES, ids=repr)
def test_every_key_can_have_any_value(tmp_path: Path, value: object) -> None:
    path = tmp_path / "model.gguf"
    for key in (*model_metadata(), *tokenizer_metadata()):
        write_tiny_gguf(path, layers=1, metadata={key: value})
        open_damaged(path)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_tensor_can_be_missing_or_misshapen(tmp_path: Path, family: str) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", family, layers=1)
    file = GgufFile(path)
    tensors = {name: (t.shape, t.storage.gguf_id, t.data.tobytes()) for name, t in file.tensors.items()}
    metadata = {**file.metadata, "tokenizer.chat_template": TEMPLATE}
    for name, (shape, type_id, raw) in tensors.items():
        others = {other: tensor for other, tensor in tensors.items() if other != name}
        path.write_bytes(encode_gguf(metadata, others).data)
        assert open_damaged(path) is (name == "output.weight")     # without it the output is tied
        path.write_bytes(encode_gguf(metadata, {**others, name: ((*shape, 1), type_id, raw)}).data)
        assert not open_damaged(path)
