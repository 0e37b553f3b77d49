"""GgufFile against bytes written by tests/support/gguf_bytes.py and against gguf's own reader."""

import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from engine.errors import BadModelFile, ModelNotFound
from engine.weights.gguf_file import GgufFile
from engine.weights.hub import demo_model
from engine.weights.tensors import to_float32
from tests.support.gguf_bytes import GgufBytes, encode_gguf, matrix
from tests.support.tiny_gguf import write_tiny_gguf

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def small(tmp_path: Path, metadata: dict | None = None, tensors: dict | None = None, **options) -> Path:
    path = tmp_path / "small.gguf"
    chosen = {"w": matrix(ROWS)} if tensors is None else tensors
    path.write_bytes(encode_gguf({"a.b": 7} if metadata is None else metadata, chosen, **options).data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadModelFile) as caught:
        GgufFile(path)
    assert caught.value.file == str(path)
    return str(caught.value)


def test_metadata_of_every_kind_is_read_as_written(tmp_path: Path) -> None:
    metadata = {"u": 7, "f": 0.5, "t": True, "s": "größe\0", "big": 1 << 40, "texts": ["a", "", "é"], "numbers": [-1, 2],
                "deep": [[1, 2], [3]], "empty": []}
    assert dict(GgufFile(small(tmp_path, metadata)).metadata) == metadata


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_have_numpy_order_shapes_and_their_bytes(tmp_path: Path, version: int) -> None:
    other = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    file = GgufFile(small(tmp_path, tensors={"w": matrix(ROWS), "v": matrix(other)}, version=version))
    assert list(file.tensors) == ["w", "v"]
    assert file.tensors["w"].shape == (3, 4)
    np.testing.assert_array_equal(to_float32(file.tensors["w"]), ROWS)
    np.testing.assert_array_equal(to_float32(file.tensors["v"]), other)


def test_a_larger_alignment_is_honoured(tmp_path: Path) -> None:
    path = small(tmp_path, {"general.alignment": 256}, {"v": matrix(ROWS), "w": matrix(ROWS + 1)}, alignment=256)
    np.testing.assert_array_equal(to_float32(GgufFile(path).tensors["w"]), ROWS + 1)


def test_every_storage_type_that_gguf_writes_agrees_with_its_own_reader(tmp_path: Path) -> None:
    for storage in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        path = write_tiny_gguf(tmp_path / f"{storage}.gguf", storage=storage)
        file, theirs = GgufFile(path), GGUFReader(path)
        assert [(tensor.name, tuple(int(size) for size in tensor.shape[::-1])) for tensor in theirs.tensors] == [
            (name, tensor.shape) for name, tensor in file.tensors.items()
        ]
        for tensor in theirs.tensors:
            np.testing.assert_array_equal(file.tensors[tensor.name].data, tensor.data.view(np.uint8).reshape(-1))


@pytest.mark.skipif(demo_model() is None, reason="the demo model's wheel is not installed")
def test_the_demo_model_opens_fast_and_agrees_with_ggufs_reader() -> None:
    path = demo_model()
    assert path is not None
    began = time.perf_counter()
    file = GgufFile(path)
    took_s = time.perf_counter() - began
    theirs = GGUFReader(path)
    assert took_s < 2.0                    # measured 0.08 s; gguf's reader takes 2 s
    assert file.metadata["tokenizer.ggml.merges"] == theirs.fields["tokenizer.ggml.merges"].contents()
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(file.tensors[tensor.name].data, tensor.data.view(np.uint8).reshape(-1))


def test_a_vocabulary_of_300_000_texts_opens_within_a_second(tmp_path: Path) -> None:
    path = small(tmp_path, {"texts": [f"token {i}" for i in range(300_000)]})
    began = time.perf_counter()
    assert len(GgufFile(path).metadata["texts"]) == 300_000   # type: ignore[arg-type]
    assert time.perf_counter() - began < 1.0                  # measured 0.15 s


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nothing\.gguf: no such file: check the path"):
        GgufFile(tmp_path / "nothing.gguf")


def test_a_folder_is_not_found_rather_than_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="cannot be read"):
        GgufFile(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\3\4" + bytes(60)])
def test_what_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "no.gguf"
    path.write_bytes(content)
    assert "GGUF" in refusal(path)


def test_big_endian_and_version_1_are_named(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    path.write_bytes(struct.pack(">4sIQQ", b"GGUF", 3, 0, 0))
    assert "big-endian" in refusal(path)
    assert "version 1" in refusal(small(tmp_path, version=1))
    assert "version 4" in refusal(small(tmp_path, version=4))


def test_a_key_or_tensor_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = small(tmp_path, {"key.a": 1, "key.b": 2}, {"tensor.a": matrix(ROWS), "tensor.b": matrix(ROWS)})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"key.b", b"key.a"))
    assert "'key.a' stands twice" in refusal(path)
    path.write_bytes(whole.replace(b"tensor.b", b"tensor.a"))
    assert "tensor tensor.a: the tensor is listed twice" in refusal(path)


def test_an_unknown_storage_type_names_the_tensor_and_the_number(tmp_path: Path) -> None:
    message = refusal(small(tmp_path, tensors={"blk.0.w": ((3, 4), 999, bytes(48))}))
    assert "tensor blk.0.w" in message
    assert "999" in message


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    assert "Q8_0 needs a multiple of 32" in refusal(small(tmp_path, tensors={"w": ((2, 33), 8, bytes(136))}))


@pytest.mark.parametrize("alignment", [0, 3, 4, 33, 1 << 21, "32"])
def test_an_impossible_alignment_is_refused(tmp_path: Path, alignment: object) -> None:
    assert "general.alignment" in refusal(small(tmp_path, {"general.alignment": alignment}))


def test_tensors_that_overlap_or_leave_the_file_are_refused(tmp_path: Path) -> None:
    built = encode_gguf({}, {"v": matrix(ROWS), "w": matrix(ROWS)})
    (place,) = [offset for name, offset, _ in built.marks if name == "offset of w"]
    path = tmp_path / "moved.gguf"
    wrong = ((0, "overlap"), (32, "overlap"), (65, "alignment"), (1 << 20, "the file has"), (1 << 63, "the file has"))
    for offset, words in wrong:
        moved = bytearray(built.data)
        struct.pack_into("<Q", moved, place, offset)
        path.write_bytes(moved)
        assert words in refusal(path)
    path.write_bytes(built.data[:-1])
    assert "tensor w" in refusal(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = encode_gguf({"s": "text", "list": ["a", "b"], "n": [1, 2]}, {"w": matrix(ROWS)}).data
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(path)


def test_arrays_nested_deeper_than_two_are_refused(tmp_path: Path) -> None:
    assert "nested" in refusal(small(tmp_path, {"deep": [[[1]]]}))


def test_sizes_whose_product_overflows_64_bits_are_refused(tmp_path: Path) -> None:
    for shape in ((1 << 32, 1 << 32), (1 << 63, 2), (0, 4), (1 << 16,) * 4):
        assert "cannot be in a file" in refusal(small(tmp_path, tensors={"w": (shape, 0, bytes(64))}))


def test_a_huge_count_costs_nothing(tmp_path: Path) -> None:
    # facts: gguf's own reader loops and eats memory for ever on a 49-byte file like this one
    for kind in (4, 8, 9):
        out = GgufBytes()
        for code, value in (("<4s", b"GGUF"), ("<I", 3), ("<Q", 0), ("<Q", 1)):
            out.data += struct.pack(code, value)
        out.text("k", "key")
        out.data += struct.pack("<IIQ", 9, kind, 1 << 62)
        path = tmp_path / "huge.gguf"
        path.write_bytes(out.data)
        assert f"{1 << 62:,} array elements are announced" in refusal(path)


def test_more_array_elements_than_any_vocabulary_has_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    half = (1 << 21) + 1                                     # a byte in the file takes eight as a list, a short one forty
    path = tmp_path / "long.gguf"
    keys = b"".join(struct.pack("<Q1sIIQ", 1, name, 9, 0, half) + bytes(half) for name in (b"a", b"b"))
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + keys)
    assert f"metadata key 'b': {half:,} array elements are announced, there can be {half - 2:,} at most" in refusal(path)


def test_closing_unmaps_when_the_last_view_is_gone(tmp_path: Path) -> None:
    file = GgufFile(small(tmp_path))
    view = file.tensors["w"].data
    file.close()
    file.close()
    assert view[4:8].view(np.float32)[0] == 1.0            # still readable: the mapping lives as long as the view
    assert not file.tensors
    unseen = GgufFile(small(tmp_path))
    unseen.close()
    assert unseen._map.closed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_release_lets_pages_leave_memory_and_the_bytes_stay_readable(tmp_path: Path) -> None:
    values = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    file = GgufFile(small(tmp_path, tensors={"a": matrix(values), "b": matrix(values + 1)}))
    tensor = file.tensors["a"]
    assert int(tensor.data.sum(dtype=np.uint64)) == int(values.view(np.uint8).sum(dtype=np.uint64))
    before = resident_kib(str(file.path))
    file.release(tensor)
    assert before - resident_kib(str(file.path)) >= 4096 - 8
    np.testing.assert_array_equal(to_float32(tensor), values)


def resident_kib(path: str) -> int:
    """Resident memory of the mapping of `path`, from the kernel."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.endswith(path))
    return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))
