"""Rows of packed matrices by number on the emulated device: every bit as gguf dequantizes it."""

import numpy as np
import pytest

from backends.cuda import products
from backends.cuda.device import make_array
from backends.cuda.matrices import PACKINGS, Packer
from engine.weights.tensors import STORAGE, to_float32
from tests.cuda.devices import make_device
from tests.cuda.packed import packed, random_weights

full = pytest.mark.full
SOME = ["Q4_1", "Q8_0", "Q4_K", "Q6_K", "BF16"]


def take(device, stream, matrix, ids):
    device.prepare([products.take_kernel(matrix.storage)])
    out = make_array(device, "f32", len(ids), matrix.columns)
    products.take_rows(stream, device.put(np.array(ids, np.int32)), matrix, out)
    return device.get(out)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in SOME else full) for name in PACKINGS])
def test_rows_are_exactly_what_gguf_dequantizes(name):
    columns = {1: 72, 32: 96, 256: 512}[STORAGE[name].block]
    raw = random_weights(name, 55, columns)
    device = make_device(seed=5)
    stream = device.stream()
    ids = [54, 0, 7, 8, 15, 16, 31, 7, 40]
    assert np.array_equal(take(device, stream, packed(device, stream, name, raw), ids), to_float32(raw)[ids])


@pytest.mark.parametrize("columns", [1, 15, 17, 4100])
def test_any_count_of_columns(columns):
    raw = random_weights("BF16", 18, columns)
    device = make_device()
    stream = device.stream()
    assert np.array_equal(take(device, stream, packed(device, stream, "BF16", raw), [17, 3]), to_float32(raw)[[17, 3]])


def test_rows_beyond_four_gigabytes():
    """The matrix is mostly never written: only its last rows are."""
    rows, columns = 1_100_016, 2048
    device = make_device(memory_bytes=16 << 30)
    stream = device.stream()
    packer = Packer(device, stream, piece_bytes=1 << 16)
    matrix = packer.empty("BF16", rows, columns)
    assert matrix.nbytes > 1 << 32
    raw = random_weights("BF16", 16, columns)
    packer.fill(matrix, raw, rows - 16)
    packer.close()
    ids = np.array([0, 9, 15])
    assert np.array_equal(take(device, stream, matrix, rows - 16 + ids), to_float32(raw)[ids])
