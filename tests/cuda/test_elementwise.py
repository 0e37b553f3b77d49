"""Norms, gates and sums of rows on the emulated device, against NumPy in float64."""

import numpy as np
import pytest

from backends.cuda import elementwise
from backends.cuda.device import Array
from backends.cuda.elementwise import elementwise_kernels, gated_kernel, norm_kernel, rows_kernel
from engine.errors import StepFailed
from tests.cuda.devices import make_device

EPSILON = 1e-5
SEEDS = [0, 1, 7]
COLUMNS = [1, 31, 64, 100, 130, 896, 1027, 4096]
LONG = 4 * 4 * 1024 + 4 * 77              # more than a block keeps in registers


def bf16(values):
    """Round to nearest even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def close(got, wanted, *, exact=False):
    wanted = np.asarray(wanted, np.float64)
    error = np.abs(got - wanted)
    worst = 2e-6 if exact else 2**-8
    assert np.all(error <= worst * np.abs(wanted) + 1e-6), float(error.max())


def norm(x, weight):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON) * weight


class Bench:
    """A device with inputs of a shape."""

    def __init__(self, rows, columns, *, seed=0, edits=None, normal=True):
        random = np.random.default_rng(columns * 1000 + rows)
        self.device = make_device(seed=seed, edits=edits)
        self.stream = self.device.stream()
        self.x = random.normal(0.3, 2.0, (rows, columns)).astype(np.float32)
        self.branch = widened(bf16(random.normal(-0.2, 1.0, (rows, columns))))
        self.weight, self.other, self.bias = (random.normal(1, 0.3, columns).astype(np.float32) for _ in range(3))
        self.X, self.W, self.O, self.B = (self.device.put(a) for a in (self.x, self.weight, self.other, self.bias))
        self.R = self.device.put(bf16(self.branch))
        self.kernels(*(norm_kernel(join, "bf16", columns) for join in ("NOTHING", "ADD", "ADD_NORMED") if normal))

    def kernels(self, *kernels):
        self.device.prepare(kernels)

    def empty(self, rows, columns, item="bf16"):
        size = rows * columns * (4 if item == "f32" else 2)
        return Array(self.device.allocate(size), (rows, columns), item)


@pytest.mark.parametrize("columns", [*COLUMNS, LONG, LONG + 1])
def test_every_norm_gives_what_float64_gives_for_any_number_of_columns(columns):
    for seed in SEEDS if columns < 2000 else [3]:
        b = Bench(3, columns, seed=seed)
        out = b.empty(3, columns)
        elementwise.rms_norm(b.stream, b.X, b.W, out, EPSILON)
        close(b.device.get(out), norm(b.x, b.weight))
        close(b.device.get(b.X), b.x, exact=True)

        elementwise.add_rms_norm(b.stream, b.X, b.R, b.W, out, EPSILON)
        once = b.x.astype(np.float64) + b.branch
        close(b.device.get(b.X), once, exact=True)
        close(b.device.get(out), norm(once, b.weight))

        elementwise.add_normed(b.stream, b.X, b.R, b.O, EPSILON)
        twice = once + norm(b.branch, b.other)
        close(b.device.get(b.X), twice, exact=True)

        elementwise.add_normed(b.stream, b.X, b.R, b.O, EPSILON, weight=b.W, out=out)
        thrice = twice + norm(b.branch, b.other)
        close(b.device.get(b.X), thrice, exact=True)
        close(b.device.get(out), norm(thrice, b.weight))


@pytest.mark.parametrize("columns", [100, 33])
def test_a_bias_is_part_of_the_branch(columns):
    b = Bench(2, columns)
    out = b.empty(2, columns)
    elementwise.add_rms_norm(b.stream, b.X, b.R, b.W, out, EPSILON, b.B)
    once = b.x.astype(np.float64) + b.branch + b.bias
    close(b.device.get(out), norm(once, b.weight))
    elementwise.add_normed(b.stream, b.X, b.R, b.O, EPSILON, b.B)
    close(b.device.get(b.X), once + norm(b.branch + b.bias.astype(np.float64), b.other), exact=True)


@pytest.mark.parametrize("columns", [64, 37])
def test_the_last_norm_takes_the_rows_that_are_asked_for(columns):
    b = Bench(9, columns)
    b.kernels(norm_kernel("NOTHING", "f32", columns))
    at = np.array([8, 0, 3, 3], np.int32)
    chosen, states = b.empty(4, columns), b.empty(4, columns, "f32")
    elementwise.rms_norm(b.stream, b.X, b.W, chosen, EPSILON, b.device.put(at))
    elementwise.rms_norm(b.stream, b.X, b.W, states, EPSILON, b.device.put(at))
    close(b.device.get(chosen), norm(b.x[at], b.weight))
    close(b.device.get(states), norm(b.x[at], b.weight), exact=True)


def test_a_row_has_the_same_bits_in_any_company_and_with_any_order_of_threads():
    columns, seen = 896, []
    for rows, seed in [(1, 0), (40, 1), (7, 5)]:
        b = Bench(40, columns, seed=seed)
        out = b.empty(rows, columns)
        elementwise.rms_norm(b.stream, b.X.first(rows), b.W, out, EPSILON)
        seen.append(b.device.get(out)[0])
    assert all(np.array_equal(seen[0], other) for other in seen[1:])


def test_zeros_and_huge_numbers_have_norms():
    b = Bench(3, 64)
    x = np.stack([np.zeros(64), np.full(64, 3e17), np.full(64, 1e-30)]).astype(np.float32)
    out = b.empty(3, 64)
    elementwise.rms_norm(b.stream, b.device.put(x), b.W, out, EPSILON)
    close(b.device.get(out), norm(x, b.weight))


def test_a_row_beyond_four_gigabytes_is_where_it_belongs():
    columns, rows = 1 << 20, 1100             # of the float32 rows, 1,024 are 4 GiB
    device = make_device(memory_bytes=1 << 36)
    device.prepare([norm_kernel("NOTHING", "bf16", columns)])
    x = Array(device.allocate(rows * columns * 4), (rows, columns), "f32")
    values = np.random.default_rng(0).normal(size=columns).astype(np.float32)
    stream = device.stream()
    stream.copy_in(x.row(rows - 1).address, values)
    out = Array(device.allocate(columns * 2), (1, columns), "bf16")
    at = device.put(np.array([rows - 1], np.int32))
    elementwise.rms_norm(stream, x, device.put(np.ones(columns, np.float32)), out, EPSILON, at)
    close(device.get(out)[0], norm(values, 1.0))


def silu(z):
    return z / (1 + np.exp(-z))


def gelu_tanh(z):
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


@pytest.mark.parametrize("columns", [1, 7, 8, 96, 100, 2056])
@pytest.mark.parametrize(("activation", "formula"), [("silu", silu), ("gelu_tanh", gelu_tanh)])
def test_a_gate_is_the_activation_times_up(activation, formula, columns):
    device = make_device(seed=columns)
    device.prepare([gated_kernel(activation, columns)])
    gate_up = widened(bf16(np.random.default_rng(columns).normal(0, 3, (5, 2 * columns))))
    out = Array(device.allocate(5 * columns * 2), (5, columns), "bf16")
    elementwise.gated(device.stream(), device.put(bf16(gate_up)), activation, out)
    gate, up = gate_up[:, :columns].astype(np.float64), gate_up[:, columns:]
    close(device.get(out), formula(gate) * up)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_far_out_stay_finite(activation):
    device = make_device()
    device.prepare([gated_kernel(activation, 8)])
    gate_up = np.ones((1, 16), np.float32)
    gate_up[0, :8] = [-3e38, -1e4, -90, -0.0, 0.0, 90, 1e4, 3e38]
    out = Array(device.allocate(16), (1, 8), "bf16")
    elementwise.gated(device.stream(), device.put(bf16(gate_up)), activation, out)
    wanted = np.where(gate_up[0, :8] > 0, widened(bf16(gate_up[0, :8])), 0)
    close(device.get(out)[0], wanted)


@pytest.mark.parametrize("columns", [1, 5, 64, 1028, 1031])
def test_sums_of_rows(columns):
    b = Bench(4, columns, normal=False)
    b.kernels(rows_kernel("add_rows", columns), rows_kernel("add_bias", columns))
    elementwise.add(b.stream, b.X, b.R)
    close(b.device.get(b.X), b.x.astype(np.float64) + b.branch, exact=True)
    elementwise.add_bias(b.stream, b.R, b.B)
    close(b.device.get(b.R), b.branch.astype(np.float64) + b.bias)


def test_all_that_a_model_needs_is_prepared():
    device = make_device()
    device.prepare(elementwise_kernels(64, [96, 100], ["silu"]))
    names = {kernel.name for kernel in device.functions}
    assert {"norm_rows<ADD, bf16, 4>", "norm_rows<NOTHING, float, 4>", "gated<SILU, 8>", "gated<SILU, 1>"} < names


@pytest.mark.parametrize(
    ("file", "was", "becomes"),
    [
        ("gpu.cuh", "if (lane == 0) room[warp] = v;\n    __syncthreads();", "if (lane == 0) room[warp] = v;"),
        ("gpu.cuh", "    __syncthreads();\n    return room[32];", "    return room[32];"),
        ("norm.cu", "if (g < groups) {\n            kept[k] = joined", "{\n            kept[k] = joined"),
        ("norm.cu", "if (g < groups) write(kept[k]", "write(kept[k]"),
    ],
)
def test_a_broken_norm_is_found_out(file, was, becomes):
    def wrong(seed):
        b = Bench(2, 68 * 4, seed=seed, edits={file: lambda text: text.replace(was, becomes)})
        out = b.empty(2, 68 * 4)
        try:
            elementwise.add_rms_norm(b.stream, b.X, b.R, b.W, out, EPSILON)
            close(b.device.get(out), norm(b.x.astype(np.float64) + b.branch, b.weight))
        except (StepFailed, AssertionError):
            return True
        return False

    assert any(wrong(seed) for seed in SEEDS)
