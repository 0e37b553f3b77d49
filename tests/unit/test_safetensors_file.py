"""SafetensorsFile against files written by the safetensors library, and against every header that it must refuse."""

import json
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from engine.errors import BadModelFile, ModelError, ModelNotFound, UnsupportedModel
from engine.weights.safetensors_file import SafetensorsFile
from engine.weights.tensors import to_float32
from tests.support.tiny_folder import bfloat16, decode_safetensors, encode_safetensors, join_safetensors

DRAW = np.random.default_rng(0)
VALUES = {
    "matrix": DRAW.standard_normal((3, 4)).astype(np.float32),
    "vector": DRAW.standard_normal(5).astype(np.float32),
    "deep": DRAW.standard_normal((2, 3, 4)).astype(np.float32),
}
HEAD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return path


def refusal(tmp_path: Path, data: bytes, kind: type[ModelError] = BadModelFile) -> str:
    path = written(tmp_path, data)
    with pytest.raises(kind) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_tensors_are_those_that_the_library_wrote(tmp_path: Path, dtype: str) -> None:
    path = written(tmp_path, encode_safetensors(VALUES, dtype))
    file = SafetensorsFile(path)
    with safe_open(path, "np") as theirs:
        assert set(file.tensors) == set(theirs.keys())
    for name, values in VALUES.items():
        tensor = file.tensors[name]
        expected = {
            "F32": values,
            "F16": values.astype(np.float16).astype(np.float32),
            "BF16": (bfloat16(values).astype(np.uint32) << 16).view(np.float32),
        }[dtype]
        assert tensor.shape == values.shape
        assert tensor.storage.name == dtype
        np.testing.assert_array_equal(to_float32(tensor), expected)


def test_float64_is_readable_and_other_types_are_only_named(tmp_path: Path) -> None:
    heads = {
        "wide": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]},
        "ids": {"dtype": "I64", "shape": [1], "data_offsets": [16, 24]},
        "tiny": {"dtype": "F8_E4M3", "shape": [2, 4], "data_offsets": [24, 32]},
        "half_bytes": {"dtype": "F4", "shape": [4], "data_offsets": [32, 34]},
        "scale": {"dtype": "F32", "shape": [], "data_offsets": [34, 38]},
        "nothing": {"dtype": "F32", "shape": [0, 7], "data_offsets": [38, 38]},
    }
    data = np.array([1.5, -2.0]).tobytes() + bytes(22)
    file = SafetensorsFile(written(tmp_path, join_safetensors(heads, data)))
    np.testing.assert_array_equal(to_float32(file.tensors["wide"]), [1.5, -2.0])
    assert [tensor.storage.name for tensor in file.tensors.values()] == ["F64", "I64", "F8_E4M3", "F4", "F32", "F32"]
    assert file.tensors["scale"].shape == ()
    assert "'F9', which Rillet does not know" in refusal(tmp_path, join_safetensors(
        {"a": {"dtype": "F9", "shape": [1], "data_offsets": [0, 1]}}, bytes(1)
    ), UnsupportedModel)  # fmt: skip


def test_a_header_that_is_not_aligned_and_its_metadata_are_fine(tmp_path: Path) -> None:
    heads, data = decode_safetensors(encode_safetensors(VALUES))
    for spaces in range(9):
        text = json.dumps({"__metadata__": {"format": "pt"}, **heads}).encode() + b" " * spaces
        file = SafetensorsFile(written(tmp_path, join_safetensors(text, data)))
        assert set(file.tensors) == set(VALUES)
        for name, values in VALUES.items():
            np.testing.assert_array_equal(to_float32(file.tensors[name]), values)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"data_offsets": [0, 9]}, "the file has"),
        ({"data_offsets": [0, 4]}, "does not take the 4 bytes"),
        ({"data_offsets": [8, 16]}, "leave a gap after those of the header"),
        ({"data_offsets": [8, 0]}, "two that rise"),
        ({"data_offsets": [-8, 0]}, "two that rise"),
        ({"data_offsets": [0, 1 << 62]}, "two that rise"),
        ({"data_offsets": [0.0, 8.0]}, "two that rise"),
        ({"data_offsets": [False, 8]}, "two that rise"),
        ({"data_offsets": [0, 8, 8]}, "two that rise"),
        ({"data_offsets": None}, "two that rise"),
        ({"data_offsets": [0, 1 << 40], "shape": [1 << 38]}, "the file has"),
        ({"shape": [3]}, "does not take"),
        ({"shape": [-2, -1]}, "its shape is"),
        ({"shape": [1] * 9}, "its shape is"),
        ({"shape": [2.0]}, "its shape is"),
        ({"shape": "2"}, "its shape is"),
        ({"shape": [1 << 47] * 8}, "does not take"),
        ({"shape": [0, 1 << 63]}, "its shape is"),
        ({"dtype": "BF16"}, "does not take"),
        ({"extra": 1}, "its head must have"),
    ],
)
def test_a_head_that_contradicts_the_file_is_refused(tmp_path: Path, head: dict, words: str) -> None:
    message = refusal(tmp_path, join_safetensors({"lonely": {**HEAD, **head}}, bytes(8)))
    assert words in message
    assert "tensor lonely" in message


@pytest.mark.parametrize("dtype", [7, None, ["F32"], {}])
def test_a_type_that_is_no_text_is_refused(tmp_path: Path, dtype: object) -> None:
    refusal(tmp_path, join_safetensors({"a": {**HEAD, "dtype": dtype}}, bytes(8)), UnsupportedModel)


def test_tensors_that_overlap_or_leave_gaps_or_leftovers_are_refused(tmp_path: Path) -> None:
    def two(first: tuple[int, int], second: tuple[int, int], data: int = 16) -> bytes:
        return join_safetensors({"a": {**HEAD, "data_offsets": first}, "b": {**HEAD, "data_offsets": second}}, bytes(data))

    SafetensorsFile(written(tmp_path, two((8, 16), (0, 8))))
    assert "overlap those of a" in refusal(tmp_path, two((0, 8), (0, 8)))
    assert "overlap those of a" in refusal(tmp_path, two((0, 8), (4, 12)))
    assert "leave a gap after those of a" in refusal(tmp_path, two((0, 8), (12, 20), 20))
    assert "tensors end at byte" in refusal(tmp_path, two((0, 8), (8, 16), 17))
    assert "the file has" in refusal(tmp_path, two((0, 8), (8, 16), 15))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = encode_safetensors(VALUES)
    for length in range(len(whole)):
        refusal(tmp_path, whole[:length])


@pytest.mark.parametrize("length", [9, 1 << 20, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_header_length_beyond_the_file_or_the_format_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    path = written(tmp_path, struct.pack("<Q", length) + b"{}      ")
    if length == 100_000_001:
        with path.open("r+b") as stream:
            stream.truncate(200_000_000)                                 # a sparse file: nothing is on the disk
    tracemalloc.start()
    with pytest.raises(BadModelFile, match="header of"):
        SafetensorsFile(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": %(head)s, "a": %(head)s}',
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b"[]",
        b"null",
        b"",
        b"{",
        b'{"a": 1}',
        b'{"a": []}',
        b'{"__metadata__": {"x": 1}, "a": %(head)s}',
        b'{"__metadata__": [], "a": %(head)s}',
        b'{"\\n": %(head)s}',
        b'{"\\ud800": %(head)s}',
        b'{"%(long)s": %(head)s}',
        b'{"\xff": %(head)s}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
    ],
    ids=lambda header: header[:40].decode("latin-1"),
)
def test_a_header_that_is_no_table_of_tensors_is_refused(tmp_path: Path, header: bytes) -> None:
    for key, value in ((b"%(head)s", json.dumps(HEAD).encode()), (b"%(long)s", b"n" * 1025)):
        header = header.replace(key, value)
    assert len(refusal(tmp_path, join_safetensors(header, bytes(8)))) < 600


def test_a_header_of_countless_empty_values_costs_a_few_times_its_bytes_at_most(tmp_path: Path) -> None:
    header = b'{"a": [' + b"[]," * 8_000_000 + b"[]]}"
    path = written(tmp_path, join_safetensors(header, bytes(8)))
    tracemalloc.start()
    with pytest.raises(BadModelFile, match="values"):
        SafetensorsFile(path)
    assert tracemalloc.get_traced_memory()[1] < 2 * len(header)
    tracemalloc.stop()


def test_a_missing_file_and_a_folder_are_not_found(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(ModelNotFound, match=r"check the path|no file"):
            SafetensorsFile(path)


def test_closing_unmaps_when_the_last_view_is_gone(tmp_path: Path) -> None:
    file = SafetensorsFile(written(tmp_path, encode_safetensors(VALUES)))
    view = file.tensors["vector"].data
    file.close()
    file.close()
    np.testing.assert_array_equal(view.view(np.float32), VALUES["vector"])   # the mapping lives as long as the view
    assert not file.tensors


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_release_lets_pages_leave_memory_and_the_bytes_stay_readable(tmp_path: Path) -> None:
    values = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    file = SafetensorsFile(written(tmp_path, encode_safetensors({"a": values, "b": values + 1})))
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
