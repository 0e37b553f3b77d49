"""Linear kernels and repacking against float64 and gguf's reference dequantization; bit equality for every token count."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from backends.cpu.ops import Ops
from backends.cpu.weights import Loader
from engine.model.spec import Attention, Dense, Layer, ModelSpec, Rope
from engine.weights.tensors import STORAGE, RawTensor, to_float32
from tests.support.cpu_rows import ARITHMETIC, rows_of

GGUF_QUANTIZABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
RANDOM_BYTES = ("Q4_K", "Q5_K", "Q6_K")       # gguf cannot quantize to these: random blocks with sane scales
LANES = (*GGUF_QUANTIZABLE, *RANDOM_BYTES)
DENSE = ("F32", "F16", "BF16")
ROWS, COLUMNS = 72, 512
MARKS = (1, 2, 3, 4, 5, 16, 17, 64)


class Source:
    """A TensorSource of tensors in memory that remembers what was released."""

    def __init__(self, *tensors: RawTensor) -> None:
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.released: list[str] = []

    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> RawTensor:
        return self.tensors[name]

    def release(self, name: str) -> None:
        self.released.append(name)


def raw(storage: str, name: str = "query", rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> RawTensor:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns), dtype=np.float32)
    kind = STORAGE[storage]
    if storage in DENSE or storage in GGUF_QUANTIZABLE:
        data = quantize(values, GGMLQuantizationType(kind.gguf_id)).view(np.uint8)
    else:
        blocks = rng.integers(0, 256, (rows * columns // kind.block, kind.bytes), dtype=np.uint8)
        halves = rng.uniform(0.001, 0.01, (len(blocks), 2)).astype(np.float16).view(np.uint8)
        at = {"Q4_K": 0, "Q5_K": 0, "Q6_K": 208}[storage]
        width = min(4, kind.bytes - at)
        blocks[:, at : at + width] = halves[:, :width]
        data = blocks
    return RawTensor(name, (rows, columns), kind, np.ascontiguousarray(data).reshape(-1), "memory")


def loader(source: Source, dtype: str = "auto") -> Loader:
    attention = Attention(heads=1, kv_heads=1, head_size=4, scale=1.0, rope=Rope(1e4, 4, interleaved=False))
    spec = ModelSpec("test", 1, 4, (Layer(attention, Dense(4)),), 1e-5, tied_output=True, context_length=8)
    made = Loader(spec, source, dtype, lambda what, done, of: None)
    made.shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    return made


def activations(tokens: int, columns: int = COLUMNS) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((64, columns)).astype(np.float32)[:tokens]


def product(x: np.ndarray, stack: object, workers: int = 2, *, integer: bool) -> np.ndarray:
    """x W^T by the kernels, through arrays with room for a tile that is full of numbers that must not matter."""
    ops = Ops(workers, 1e-5, integer=integer)
    rows = rows_of(x, integer=integer, padding=1e6)
    return ops.linear(rows, stack, "out").values[: len(x)].copy()


def identity_rows(stack: object) -> np.ndarray:
    """The weights as the embedding lookup reads them."""
    matrix = stack.matrices[0]
    return Ops(2, 1e-5).embed(np.arange(matrix.rows, dtype=np.int32), matrix, COLUMNS).values[: matrix.rows]


@pytest.mark.parametrize("storage", LANES + DENSE)
def test_repacked_weights_are_those_of_the_reference(storage: str) -> None:
    tensor = raw(storage)
    stack = loader(Source(tensor)).stack("query")
    exact = to_float32(tensor)
    np.testing.assert_allclose(identity_rows(stack), exact, rtol=0, atol=2e-7 * np.abs(exact).max())


@pytest.mark.parametrize("storage", LANES + DENSE)
@ARITHMETIC
def test_a_product_is_close_to_float64(storage: str, integer: bool) -> None:
    tensor = raw(storage)
    x = activations(17)
    exact = x.astype(np.float64) @ to_float32(tensor).astype(np.float64).T
    error = np.abs(product(x, loader(Source(tensor)).stack("query"), integer=integer) - exact).max() / np.abs(exact).max()
    assert error < 2e-6


@pytest.mark.parametrize("storage", LANES + DENSE)
@ARITHMETIC
def test_a_token_gives_the_same_bits_in_any_company(storage: str, integer: bool) -> None:
    stack = loader(Source(raw(storage))).stack("query")
    whole = product(activations(64), stack, integer=integer)
    for tokens in MARKS:
        np.testing.assert_array_equal(product(activations(tokens), stack, integer=integer), whole[:tokens], strict=True)


@ARITHMETIC
@pytest.mark.parametrize("storage", ["Q4_1", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(storage: str, broken: float, integer: bool) -> None:
    x = activations(3)
    x[1, 37] = broken
    found = product(x, loader(Source(raw(storage))).stack("query"), integer=integer)
    assert not np.isfinite(found[1]).any()
    assert np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("storage", ["Q4_1", "BF16"])
@ARITHMETIC
def test_the_number_of_threads_does_not_change_a_bit(storage: str, integer: bool) -> None:
    stack = loader(Source(raw(storage))).stack("query")
    one, two = (product(activations(5), stack, workers, integer=integer) for workers in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("columns", [3, 24, 30])
def test_dense_matrices_may_have_any_width(columns: int) -> None:
    tensor = raw("F32", columns=columns)
    x = activations(6, columns)
    ops = Ops(2, 1e-5)
    rows = ops.rows("x", 6, columns)
    rows.values[:6] = x
    out = ops.linear(rows, loader(Source(tensor)).stack("query"), "out").values[:6]
    np.testing.assert_allclose(out, x.astype(np.float64) @ to_float32(tensor).T.astype(np.float64), rtol=1e-4, atol=1e-5)


@ARITHMETIC
def test_stacked_matrices_of_unlike_types_and_odd_rows_are_one_product(integer: bool) -> None:
    tensors = [raw("Q4_1", "query", 40, seed=1), raw("Q4_1", "key", 24, seed=2), raw("Q6_K", "value", 24, seed=3)]
    source = Source(*tensors)
    stack = loader(source).stack("query", "key", "value")
    assert [matrix.rows for matrix in stack.matrices] == [64, 24]
    x = activations(5)
    exact = np.hstack([x.astype(np.float64) @ to_float32(tensor).T.astype(np.float64) for tensor in tensors])
    assert np.abs(product(x, stack, integer=integer) - exact).max() / np.abs(exact).max() < 2e-6
    assert source.released == ["query", "key", "value"]


def test_a_type_that_has_no_packing_is_widened_to_bfloat16() -> None:
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS))
    tensor = RawTensor("query", values.shape, STORAGE["F64"], values.view(np.uint8).reshape(-1), "memory")
    made = loader(Source(tensor))
    stack = made.stack("query")
    np.testing.assert_allclose(identity_rows(stack), values, rtol=2**-8)
    assert made.widened["F64"] == (tensor.data.nbytes, 2 * values.size)


def test_dtype_f32_holds_every_weight_exactly() -> None:
    tensor = raw("Q4_K")
    np.testing.assert_array_equal(identity_rows(loader(Source(tensor), "f32").stack("query")), to_float32(tensor))
