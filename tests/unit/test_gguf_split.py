"""Split GGUF models: any part opens all of them; parts that are missing or do not belong together are refused by name."""

import gc
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.errors import BadModelFile, ModelError
from engine.weights.checkpoint import open_checkpoint
from engine.weights.gguf_file import GgufFile
from tests.support.gguf_bytes import encode_gguf
from tests.support.tiny_gguf import write_tiny_gguf

COUNT = 3


def split(folder: Path, count: int = COUNT, changes: dict[int, dict[str, object]] | None = None) -> list[Path]:
    """The tiny model in `count` parts as llama-gguf-split lays them out; the first has the metadata and no tensors.

    changes: part -> metadata to replace in it.
    """
    whole = write_tiny_gguf(folder / "whole.gguf", "qwen2")
    file = GgufFile(whole)
    tensors = [(name, (t.shape, t.storage.gguf_id, t.data.tobytes())) for name, t in file.tensors.items()]
    paths = [folder / f"tiny-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]
    for number, path in enumerate(paths):
        metadata = dict(file.metadata) if number == 0 else {}
        metadata |= {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)}
        metadata |= (changes or {}).get(number, {})
        held = dict(tensors[number - 1 :: count - 1]) if number else {}
        kept = {key: value for key, value in metadata.items() if value is not None}
        path.write_bytes(encode_gguf(kept, held).data)
    file.close()
    return paths


def refusal(path: Path) -> BadModelFile:
    with pytest.raises(BadModelFile) as caught:
        open_checkpoint(path)
    return caught.value


@pytest.mark.parametrize("number", range(COUNT))
def test_any_part_opens_the_whole_model(tmp_path: Path, number: int) -> None:
    checkpoint = open_checkpoint(split(tmp_path)[number])
    whole = open_checkpoint(tmp_path / "whole.gguf")
    assert checkpoint.name == "tiny"
    assert checkpoint.spec == whole.spec
    assert checkpoint.template is not None
    assert set(checkpoint.tensors.names()) == set(whole.tensors.names()) == set(whole.spec.shapes())
    for name in whole.tensors.names():
        np.testing.assert_array_equal(checkpoint.tensors.tensor(name).data, whole.tensors.tensor(name).data)
        checkpoint.tensors.release(name)
    checkpoint.close()
    whole.close()


def test_parts_that_are_links_into_a_cache_are_found_by_the_links_names(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(split(tmp_path)):
        path.rename(tmp_path / "blobs" / f"{number:064x}")
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number:064x}")
    open_checkpoint(tmp_path / "snapshot" / "tiny-00001-of-00003.gguf").close()


@pytest.mark.parametrize("missing", range(COUNT))
def test_a_missing_part_is_named(tmp_path: Path, missing: int) -> None:
    paths = split(tmp_path)
    paths[missing].unlink()
    error = refusal(paths[(missing + 1) % COUNT])
    assert error.file == str(paths[missing])
    assert "this part of 3 is missing: download it" in str(error)


@pytest.mark.parametrize(
    ("number", "change", "words"),
    [
        (1, {"split.no": 2}, "split.no is 2, its name says 1"),
        (1, {"split.count": 4}, "split.count is 4, its name says 3"),
        (2, {"split.no": None}, "split.no is None"),
        (0, {"split.count": 2}, "it is one of 2 parts"),
        (0, {"split.count": 1 << 40}, "split.count is"),
        (0, {"split.count": -3}, "split.count is"),
        (0, {"split.count": "3"}, "split.count is"),
        (0, {"split.count": True}, "split.count is"),
        (0, {"split.tensors.count": 4}, "split.tensors.count is 4, its 3 parts have 27"),
        (0, {"split.tensors.count": None}, "split.tensors.count is None"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path: Path, number: int, change: dict, words: str) -> None:
    paths = split(tmp_path, changes={number: change})
    error = refusal(paths[0])
    assert words in str(error)
    assert error.file == str(paths[number])


def test_a_part_of_another_split_of_the_same_name_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    assert "split.no is 1, its name says 2" in str(refusal(paths[0]))


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    file = GgufFile(paths[1])
    tensors = {name: (t.shape, t.storage.gguf_id, t.data.tobytes()) for name, t in file.tensors.items()}
    metadata = {"split.no": 2, "split.count": COUNT}
    paths[2].write_bytes(encode_gguf(metadata, tensors).data)
    error = refusal(paths[0])
    assert error.tensor in tensors
    assert str(paths[1]) in str(error)


def test_a_part_that_was_renamed_says_how_it_must_be_called(tmp_path: Path) -> None:
    paths = split(tmp_path)
    renamed = paths[0].rename(tmp_path / "other.gguf")
    assert "call it as it was called, such as other-00001-of-00003.gguf" in str(refusal(renamed))


def test_a_whole_model_may_be_named_like_a_part(tmp_path: Path) -> None:
    for change in ({}, {"split.count": 1}, {"split.count": 0}):
        path = write_tiny_gguf(tmp_path / "tiny-00001-of-00001.gguf", metadata=dict(change))
        checkpoint = open_checkpoint(path)
        assert checkpoint.name == "tiny"
        checkpoint.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_error_in_the_last_part_closes_them_all(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    with pytest.raises(ModelError):
        open_checkpoint(paths[0])
    gc.collect()                           # the error's own frames may look into the files
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
