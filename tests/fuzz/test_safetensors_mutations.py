"""Damaged folders of safetensors: whatever the bytes, opening ends soon, takes little memory, and fails with a ModelError."""

import json
import random
import time
import tracemalloc
from pathlib import Path

import pytest

from engine.errors import ModelError
from engine.weights.checkpoint import open_checkpoint
from engine.weights.safetensors_file import SafetensorsFile
from engine.weights.tensors import to_float32
from tests.support.tiny_folder import decode_safetensors, join_safetensors, write_tiny_folder

SLOW_S = 5.0                               # a healthy one takes 3 ms; this only tells a hang
LARGE_BYTES = 64 << 20
RANDOM_FILES = 3_000
BUDGET_S = 15.0
NUMBERS = [0, 1, -1, 7, 255, 4096, 1 << 31, 1 << 47, 1 << 63, 10**30]
OTHERS = [None, "", "x", "../x", 0.0, -1.0, 1e300, float("nan"), float("inf"), True, [], [1], ["a"], [[1]], {}, {"a": 1}]
VALUES = [*NUMBERS, *OTHERS]


def opens(path: Path) -> bool:
    """Whether the checkpoint opened after all, every byte of it readable; a ModelError is the only error that may come."""
    began = time.perf_counter()
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors.names():
            tensor = checkpoint.tensors.tensor(name)
            assert to_float32(tensor).shape == checkpoint.spec.shapes()[name]
        checkpoint.close()
        opened = True
    except ModelError:
        opened = False
    assert time.perf_counter() - began < SLOW_S
    return opened


def header_opens(path: Path) -> bool:
    """Like opens(), for the file of tensors alone, which is faster."""
    began = time.perf_counter()
    try:
        file = SafetensorsFile(path)
        assert sum(tensor.data.size for tensor in file.tensors.values()) <= path.stat().st_size
        file.close()
        opened = True
    except ModelError:
        opened = False
    assert time.perf_counter() - began < SLOW_S
    return opened


def paths_of(value: object, here: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The places of a JSON value, its own first."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, member in members for place in paths_of(member, (*here, key)))]


def replaced(value: object, place: tuple[object, ...], new: object) -> object:
    if not place:
        return new
    copy = json.loads(json.dumps(value))
    at = copy
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = new
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generation = {"eos_token_id": [2, 0], "temperature": 0.5, "top_k": 20, "top_p": 0.9}
    return write_tiny_folder(tmp_path_factory.mktemp("fuzz") / "tiny", shards=2, generation=generation)


def test_the_undamaged_folder_opens(folder: Path) -> None:
    assert opens(folder)


def test_every_value_of_a_header_can_be_any_other(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model-00001-of-00002.safetensors").read_bytes()
    header, data = decode_safetensors(whole)
    path = tmp_path / "model.safetensors"
    opened = done = 0
    tracemalloc.start()
    try:
        for place in paths_of(header)[:400]:
            for value in VALUES:
                path.write_bytes(join_safetensors(replaced(header, place, value), data))
                tracemalloc.reset_peak()
                opened += header_opens(path)
                done += 1
                assert tracemalloc.get_traced_memory()[1] < LARGE_BYTES, (place, value)
    finally:
        tracemalloc.stop()
    assert opened < done / 10              # dtype and shape of a tensor may be such that the bytes fit


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, 1 << 16, 100_000_000, 1 << 32, (1 << 63) - 1, (1 << 64) - 1])
def test_the_headers_length_can_be_any_number(folder: Path, tmp_path: Path, length: int) -> None:
    whole = (folder / "model-00001-of-00002.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + whole[8:])
    assert not header_opens(path)


def test_random_damage_is_a_typed_error_or_a_file(folder: Path, tmp_path: Path) -> None:
    whole = join_safetensors(*norms((folder / "model-00001-of-00002.safetensors").read_bytes()))
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    path = tmp_path / "model.safetensors"
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
                    damaged[draw.randrange(min(header, len(damaged)))] = draw.choice(b'0123456789[]{},:" \\-eu')
                case 3:
                    del damaged[draw.randrange(8, len(damaged)) :]
                case 4:
                    place = draw.randrange(len(damaged))
                    del damaged[place : place + draw.randrange(1, 40)]
                case 5:
                    place = draw.randrange(len(damaged))
                    damaged[place:place] = draw.randbytes(draw.randrange(1, 40))
            if len(damaged) < 20:
                break
        path.write_bytes(damaged)
        opened += header_opens(path)
        done += 1
    assert done > 300
    assert 0 < opened < done


def norms(whole: bytes) -> tuple[dict[str, dict], bytes]:
    """The norms of a file alone, so that most of its bytes are header."""
    header, data = decode_safetensors(whole)
    kept: dict[str, dict] = {}
    packed = b""
    for name, head in header.items():
        if name.endswith("norm.weight"):
            start, end = head["data_offsets"]
            kept[name] = {**head, "data_offsets": [len(packed), len(packed) + end - start]}
            packed += data[start:end]
    return kept, packed


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_every_value_of_a_json_file_can_be_any_other(folder: Path, name: str) -> None:
    path = folder / name
    before = path.read_bytes()
    value = json.loads(before)
    opened = done = 0
    try:
        for place in paths_of(value)[:40]:
            for new in VALUES:
                path.write_text(json.dumps(replaced(value, place, new)))
                opened += opens(folder)
                done += 1
    finally:
        path.write_bytes(before)
    assert 0 < opened < done


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_json_file_can_be_cut_or_damaged_anywhere(folder: Path, name: str) -> None:
    path = folder / name
    before = path.read_bytes()
    draw = random.Random(1)
    try:
        for _ in range(150):
            damaged = bytearray(before)
            place = draw.randrange(len(damaged))
            match draw.randrange(3):
                case 0:
                    del damaged[place:]
                case 1:
                    damaged[place] = draw.randrange(256)
                case 2:
                    damaged[place:place] = draw.choice((b"[" * 5000, b"9" * 5000, b"\0", b'"', b"{}"))
            path.write_bytes(damaged)
            opens(folder)
    finally:
        path.write_bytes(before)
