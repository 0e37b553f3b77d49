"""Products with the weights of experts on the emulated device: tiles in device memory say who is multiplied by what."""

import numpy as np
import pytest

from backends.cuda import products
from backends.cuda.device import Array, make_array
from backends.cuda.matrices import Packer
from tests.cuda.devices import make_device
from tests.cuda.packed import CLOSE, Bench, far, kernels_of, random_weights, to_bfloat16, tokens_of, wanted

full = pytest.mark.full


@pytest.mark.parametrize("tile", [8, 16, *(pytest.param(tile, marks=full) for tile in (32, 64, 96))])
def test_tiles_of_experts(tile):
    """Positions in the order of experts; tiles that are full, partly full, and not there."""
    counts, experts, rows, columns = {0: tile + 3, 2: 1, 3: tile}, 4, 40, 320
    bench = Bench("Q8_0", rows, columns, most_tokens=tile, seed=2, experts=experts)
    x = tokens_of(10, columns)
    source = np.random.default_rng(0).integers(0, 10, 2 * tile + 4).astype(np.int32)
    tiles, of, first = [[-1, 0, 5]], [], 0
    for expert, count in counts.items():
        tiles += [[expert, first + at, min(tile, count - at)] for at in range(0, count, tile)] + [[expert, 0, 0]]
        of += [expert] * count
        first += count
    device, stream = bench.device, bench.stream
    out = device.put(np.full((first + 2, 50), 7.0, np.float32))
    arguments = device.put(to_bfloat16(x)), device.put(source), bench.matrix, device.put(np.array(tiles, np.int32)), out, tile
    products.product_of_experts(stream, *arguments, column=5)
    got = device.get(out)
    assert len(of) == len(source)
    reference = np.stack([wanted(x[source[at : at + 1]], bench.raws[expert])[0] for at, expert in enumerate(of)])
    assert far(got[:first, 5:45], reference) < CLOSE
    got[:first, 5:45] = 7
    assert np.all(got == 7)


@pytest.mark.parametrize("tile", [8, 16])
def test_positions_without_a_source_are_their_own_rows(tile):
    bench = Bench("Q8_0", 24, 64, most_tokens=tile, experts=2)
    x = tokens_of(tile + 2, 64)
    tiles = bench.device.put(np.array([[1, 0, tile], [0, tile, 2]], np.int32))
    out = make_array(bench.device, "bf16", tile + 2, 24)
    products.product_of_experts(bench.stream, bench.device.put(to_bfloat16(x)), None, bench.matrix, tiles, out, tile)
    reference = np.concatenate([wanted(x[:tile], bench.raws[1]), wanted(x[tile:], bench.raws[0])])
    assert far(bench.device.get(out), reference) < 5e-3


def test_a_captured_launch_reads_tiles_from_memory():
    bench = Bench("Q8_0", 24, 64, experts=2)
    device, stream = bench.device, bench.stream
    x = tokens_of(4, 64)
    there, tiles, out = device.put(to_bfloat16(x)), make_array(device, "i32", 1, 3), make_array(device, "f32", 4, 24)
    graph = stream.capture(lambda: products.product_of_experts(stream, there, None, bench.matrix, tiles, out, 8))
    for expert, count in ((1, 4), (0, 3)):
        stream.fill(out.address, out.nbytes, 0)
        stream.copy_in(tiles.address, np.array([[expert, 0, count]], np.int32))
        stream.replay(graph)
        got = device.get(out)
        assert far(got[:count], wanted(x[:count], bench.raws[expert])) < CLOSE
        assert not got[count:].any()


@pytest.mark.parametrize("tile", [8, 16])
def test_experts_beyond_four_gigabytes(tile):
    device = make_device(memory_bytes=16 << 30)
    stream = device.stream()
    packer, experts, raw = Packer(device, stream, piece_bytes=1 << 12), 2_200_000, random_weights("BF16", 16, 64)
    matrix = packer.empty("BF16", 16, 64, experts)
    assert matrix.nbytes > 1 << 32
    packer.fill(matrix, raw, 0, experts - 1)
    packer.close()
    device.prepare(kernels_of(matrix, tile))
    x = tokens_of(4, 64)
    out = make_array(device, "f32", 4, 16)
    tiles = device.put(np.array([[experts - 1, 0, 4]], np.int32))
    products.product_of_experts(stream, device.put(to_bfloat16(x)), None, matrix, tiles, out, tile)
    assert far(device.get(out), wanted(x, raw)) < CLOSE


@pytest.mark.parametrize("tile", [8, 16])
def test_tokens_and_results_beyond_four_gigabytes(tile):
    """One tile far behind in x and out; what lies between is never touched."""
    columns, rows = 64, 16
    bench = Bench("BF16", rows, columns, most_tokens=tile)
    device, stream = bench.device, bench.stream
    last = (1 << 32) // (2 * columns) + 8
    x = tokens_of(3, columns)
    there = make_array(device, "bf16", last + 3, columns)
    stream.copy_in(there.row(last).address, to_bfloat16(x))
    out = make_array(device, "f32", last + 3, rows)
    tiles = device.put(np.array([[0, last, 3]], np.int32))
    products.product_of_experts(stream, there, None, bench.matrix, tiles, out, tile)
    assert far(device.get(Array(out.row(last).address, (3, rows), "f32")), bench.wanted(x)) < CLOSE
