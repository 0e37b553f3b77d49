"""Weights for tests of the cuda backend's matrices: random blocks that a file could have, packed, and products by NumPy."""

import numpy as np

from backends.cuda import products
from backends.cuda.bfloat16 import from_bfloat16, to_bfloat16
from backends.cuda.device import make_array
from backends.cuda.matrices import Packer
from engine.weights.tensors import STORAGE, RawTensor, to_float32
from tests.cuda.devices import make_device

CLOSE = 2e-6                         # products, relative: see far()
# storage type -> where a block has its float16s; whether the second one is a minimum
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_XS": [0],
}  # fmt: skip


def random_weights(name, rows, columns, seed=0):
    """(rows, columns) as a file may have them: every bit of a block is random, its float16s are near 0.01."""
    rng = np.random.default_rng([seed, rows, columns, *name.encode()])
    if name in HALVES:
        storage = STORAGE[name]
        blocks = rng.integers(0, 256, (rows * columns // storage.block, storage.bytes), np.uint8)
        for at in HALVES[name]:
            halves = (rng.uniform(0.5, 2, len(blocks)) * rng.choice([-1, 1], len(blocks)) * 0.01).astype(np.float16)
            blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
        return RawTensor("w", (rows, columns), storage, blocks.reshape(-1), "w.gguf")
    return floats(name, rng.normal(0, 0.05, (rows, columns)).astype(np.float32))


def floats(name, values):
    values = to_bfloat16(values) if name == "BF16" else values.astype({"F16": "f2", "F32": "f4", "F64": "f8"}[name])
    return RawTensor("w", values.shape, STORAGE[name], values.reshape(-1).view(np.uint8), "w.gguf")


def packed(device, stream, storage, *tensors, experts=1):
    """The tensors under one another, or one for each expert, as one matrix."""
    packer = Packer(device, stream, piece_bytes=1 << 14)
    rows = tensors[0].rows if experts > 1 else sum(tensor.rows for tensor in tensors)
    matrix = packer.empty(storage, rows, tensors[0].shape[-1], experts)
    first = 0
    for number, tensor in enumerate(tensors):
        packer.fill(matrix, tensor, 0 if experts > 1 else first, number if experts > 1 else 0)
        first += tensor.rows
    packer.close()
    return matrix


def rounded(values):
    """To bfloat16, as float32."""
    return from_bfloat16(to_bfloat16(np.asarray(values, np.float32)))


def tokens_of(count, columns, seed=1):
    return rounded(np.random.default_rng([seed, count, columns]).normal(0, 1, (count, columns)))


def wanted(x, *tensors):
    """Products in float64 with the weights that the kernels multiply by: gguf's, rounded to bfloat16."""
    weights = np.concatenate([to_float32(tensor).reshape(-1, tensor.shape[-1]) for tensor in tensors])
    return x.astype(np.float64) @ rounded(weights).astype(np.float64).T


def far(got, reference):
    """The norm of the difference, relative."""
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))


class Bench:
    """A device with one matrix, and what is multiplied by it."""

    def __init__(self, name, rows, columns, *, most_tokens=8, seed=0, edits=None, experts=1):
        self.device = make_device(seed=seed, edits=edits, memory_bytes=16 << 30)
        self.stream = self.device.stream()
        self.raws = [random_weights(name, rows, columns, expert) for expert in range(experts)]
        self.matrix = packed(self.device, self.stream, name, *self.raws, experts=experts)
        self.device.prepare(kernels_of(self.matrix, most_tokens))

    def product(self, x, item="f32", tile=None):
        """(T, rows)."""
        out = make_array(self.device, item, len(x), self.matrix.rows)
        there = self.device.put(to_bfloat16(x))
        if tile is None:
            products.product(self.stream, there, self.matrix, out)
        else:
            products.launch(self.stream, tile, -(-len(x) // tile), there, self.matrix, out, 0, len(x), 0, 0)
        return self.device.get(out)

    def wanted(self, x):
        return wanted(x, *self.raws)


def kernels_of(matrix, tile):
    """Only the one that takes tiles of so many tokens: fewer to build."""
    kind = matrix.storage, products.unaligned(matrix)
    return [products.few_kernel(*kind) if tile == 8 else products.TILINGS[tile].kernel(*kind)]
