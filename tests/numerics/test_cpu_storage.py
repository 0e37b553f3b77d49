"""Every quantized type that gguf can read: its size in memory, its values, its products, for odd rows and any company."""

import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from backends.cpu.matrices import Grid, Matrix, Planes
from backends.cpu.ops import apply_matrix
from backends.cpu.packing import PACKINGS, pack
from engine.weights.tensors import STORAGE, RawTensor, to_float32
from tests.support.cpu_rows import ARITHMETIC, rows_of

DOCS = Path(__file__).parents[2] / "docs" / "storage-types.md"
COLUMNS = 512
COUNTS = (1, 2, 3, 5, 17)
LIMIT = 1.27                    # bytes here to bytes in the file


def readable(name: str) -> bool:
    kind = STORAGE[name]
    try:
        quants.dequantize(np.zeros((1, kind.bytes), np.uint8), GGMLQuantizationType(kind.gguf_id))
    except NotImplementedError:
        return False
    return kind.quantized


TYPES = sorted(name for name in STORAGE if readable(name))
# where the float16 scales of a block stand, in bytes
HALVES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,),
    "Q4_1": (0, 2), "Q5_1": (0, 2), "IQ1_M": (), "MXFP4": (), "NVFP4": (),
}  # fmt: skip


def random_tensor(storage: str, rows: int, columns: int = COLUMNS, seed: int = 0) -> RawTensor:
    """Random bits under sane scales: every code of the type occurs."""
    draw, kind = np.random.default_rng(seed), STORAGE[storage]
    blocks = draw.integers(0, 256, (rows * columns // kind.block, kind.bytes), dtype=np.uint8)

    def halves() -> np.ndarray:
        return (draw.uniform(0.001, 0.01, (len(blocks), 1)) * draw.choice([-1, 1], (len(blocks), 1))).astype(np.float16)

    for at in HALVES.get(storage, (0,)):
        blocks[:, at : at + 2] = halves().view(np.uint8)
    match storage:
        case "IQ1_M":           # the scale's nibbles are the upper ones of four 16-bit words
            words = np.ascontiguousarray(blocks[:, 48:56]).view(np.uint16)
            words[:] = words & 0xFFF | (halves().view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16)) << 12
            blocks[:, 48:56] = words.view(np.uint8)
        case "MXFP4":
            blocks[:, 0] = draw.integers(110, 125, len(blocks))
    return RawTensor("weights", (rows, columns), kind, blocks.reshape(-1), "memory")


def packed(*tensors: RawTensor) -> Matrix:
    return pack(tensors[0].storage.name, tensors, lambda tensor: None)


def activations(tokens: int, columns: int = COLUMNS) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((max(COUNTS), columns)).astype(np.float32)[:tokens]


def product(x: np.ndarray, matrix: Matrix, *, integer: bool, add: bool = False, first: int = 3) -> np.ndarray:
    """The kernel's x W^T between columns that must stay as they are; the room of a tile is full of other numbers."""
    rows = rows_of(x, integer=integer, padding=1e6)
    out = np.full((len(rows.values), first + matrix.rows + 2), 7, np.float32)
    apply_matrix(rows, matrix, out, first, add=add, workers=2)
    assert (out[:, :first] == 7).all()
    assert (out[:, first + matrix.rows :] == 7).all()
    assert (out[len(x) :] == 7).all()
    return out[: len(x), first : first + matrix.rows]


def table_of_docs() -> dict[str, list[str]]:
    rows = re.findall(r"^\| ([A-Z0-9_]+) \|(.*)\|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def sizes(storage: str) -> tuple[float, float]:
    """Bits of a weight in the file and in a packed matrix."""
    tensor = random_tensor(storage, 64)
    return 8 * tensor.data.nbytes / (64 * COLUMNS), 8 * packed(tensor).nbytes / (64 * COLUMNS)


def test_every_type_that_gguf_reads_has_a_packing() -> None:
    assert set(TYPES) <= PACKINGS
    assert len(TYPES) >= 23


@pytest.mark.parametrize("storage", TYPES)
def test_weights_rest_at_about_the_size_that_they_have_in_the_file(storage: str) -> None:
    file_bits, bits = sizes(storage)
    assert bits <= LIMIT * file_bits


@pytest.mark.parametrize("storage", TYPES)
def test_the_documentation_has_the_sizes_of_packed_matrices(storage: str) -> None:
    file_bits, bits = sizes(storage)
    shape = {Planes: "planes", Grid: "grid"}[type(packed(random_tensor(storage, 32)))]
    file_cell, cell, ratio, how = table_of_docs()[storage]
    assert (file_cell, cell, ratio) == (f"{file_bits:.4g}", f"{bits:.4g}", f"{bits / file_bits:.2f}")
    assert how.startswith(shape)


@pytest.mark.parametrize("storage", TYPES)
def test_looked_up_rows_are_exactly_those_of_the_reference(storage: str) -> None:
    tensor = random_tensor(storage, 70)
    rows = np.array([69, 0, 31, 32, 33, 0], np.int32)
    np.testing.assert_array_equal(packed(tensor).take(rows), to_float32(tensor)[rows])


@pytest.mark.parametrize("storage", TYPES)
@pytest.mark.parametrize("rows", [33, 70])
@ARITHMETIC
def test_a_product_is_that_of_the_reference_weights(storage: str, rows: int, integer: bool) -> None:
    tensor = random_tensor(storage, rows)
    x = activations(17)
    exact = x.astype(np.float64) @ to_float32(tensor).T.astype(np.float64)
    error = np.linalg.norm(product(x, packed(tensor), integer=integer) - exact) / np.linalg.norm(exact)
    assert error < 2e-6


@pytest.mark.parametrize("storage", TYPES)
@ARITHMETIC
def test_a_token_gives_the_same_bits_alone_and_in_any_company(storage: str, integer: bool) -> None:
    matrix, x = packed(random_tensor(storage, 70)), activations(17)
    alone = np.vstack([product(x[i : i + 1], matrix, integer=integer) for i in range(17)])
    for count in COUNTS:
        np.testing.assert_array_equal(product(x[:count], matrix, integer=integer), alone[:count])


@pytest.mark.parametrize("storage", ["Q5_0", "Q6_K", "IQ4_XS", "IQ2_S", "TQ1_0"])
@ARITHMETIC
def test_more_than_a_tile_of_tokens_and_adding_to_what_is_there(storage: str, integer: bool) -> None:
    matrix = packed(random_tensor(storage, 40))
    x = np.random.default_rng(1).standard_normal((45, COLUMNS)).astype(np.float32)
    plain = product(x, matrix, integer=integer)
    np.testing.assert_array_equal(plain[40:41], product(x[40:41], matrix, integer=integer))
    np.testing.assert_array_equal(product(x, matrix, add=True, integer=integer), plain + np.float32(7))


@pytest.mark.parametrize("storage", ["Q5_1", "Q6_K", "IQ4_NL", "IQ3_S"])
def test_stacked_tensors_are_one_matrix_also_across_a_block_of_rows(storage: str) -> None:
    tensors = [random_tensor(storage, rows, seed=rows) for rows in (24, 40, 5)]
    weights = np.vstack([to_float32(tensor) for tensor in tensors])
    np.testing.assert_array_equal(packed(*tensors).take(np.arange(69, dtype=np.int32)), weights)


@pytest.mark.parametrize("storage", ["Q5_0", "Q5_1", "IQ4_NL", "MXFP4"])
@ARITHMETIC
def test_types_of_small_blocks_may_have_an_odd_number_of_them(storage: str, integer: bool) -> None:
    tensor = random_tensor(storage, 33, columns=96)
    x = activations(3, 96)
    exact = x.astype(np.float64) @ to_float32(tensor).T.astype(np.float64)
    assert np.linalg.norm(product(x, packed(tensor), integer=integer) - exact) / np.linalg.norm(exact) < 2e-6


@pytest.mark.parametrize("code", [0, 1, 2, 127, 250])
def test_the_scales_of_mxfp4_are_powers_of_two_down_to_subnormal_ones(code: int) -> None:
    tensor = random_tensor("MXFP4", 32, 64)
    tensor.data.reshape(-1, 17)[:, 0] = code
    np.testing.assert_array_equal(packed(tensor).take(np.arange(32, dtype=np.int32)), to_float32(tensor))


def test_all_scales_of_nvfp4_are_those_of_the_reference() -> None:
    tensor = random_tensor("NVFP4", 32, 128)
    tensor.data.reshape(-1, 36)[:, :4] = np.arange(256, dtype=np.uint8).reshape(64, 4)
    np.testing.assert_array_equal(packed(tensor).take(np.arange(32, dtype=np.int32)), to_float32(tensor))
