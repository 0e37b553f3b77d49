"""Packer: RawTensors -> the Matrix or the Experts that they rest as. weights.py feeds it tensor after tensor.

The rule: the file's blocks if a kernel reads those; groups of MLX's own if they hold every weight exactly; else floats.
Scales and floats are of the activations' type where that holds them exactly (floats also where the user has asked for it, and
what a quantized type becomes), else float32: the product is computed in float32 then. On Linux all is float32, and exact.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from backends.mlx.experts import AffineExperts, BlockExperts, DenseExperts, Mxfp4Experts
from backends.mlx.mapping import Mappings
from backends.mlx.matrices import Affine, Blocks, Dense, Experts, Groups, Matrix, Mxfp4, Product
from backends.mlx.repack import REPACKS, Packed, check_bytes, packed_bytes, repack
from engine.errors import OutOfDeviceMemory
from engine.weights.tensors import MlxLayout, Part, RawTensor, to_float32

__all__ = ["Packer", "Taken"]

Floats = NDArray[np.float32]
Taken = Callable[[RawTensor], None]
Resting = Literal["groups", "blocks", "floats"]
FLOATS = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "F64": mx.float32}
NAMES = {mx.bfloat16: "BF16", mx.float16: "F16"}
CHUNK_WEIGHTS = 1 << 22


class Packer:
    """Makes matrices for activations of one type; refuses what would not fit in `limit_bytes` before it is made."""

    def __init__(
        self,
        dtype: mx.Dtype,
        *,
        forced: bool = False,
        columns_first: bool = False,
        native: Mapping[str, Product] | None = None,
        trial: Callable[[Product, RawTensor, mx.Dtype], bool] | None = None,
        mappings: Mappings | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        """forced: floats become `dtype` even if they are rounded. columns_first: dense matrices rest as (K, N).
        native: storage types that rest in their blocks, with their products; trial: whether one is right, asked at its first
        tensor."""
        self.dtype, self.forced, self.columns_first = dtype, forced, columns_first
        self.native: dict[str, Product] = dict(native or {})
        self.trial, self.tried = trial, set[str]()
        self.mappings = mappings or Mappings(possible=False)
        self.limit_bytes, self.nbytes = limit_bytes, 0

    def resting(self, raw: RawTensor) -> Resting:
        """How a tensor's storage type rests."""
        storage = raw.storage
        if storage.name in self.native and self.trial is not None and storage.name not in self.tried:
            self.tried.add(storage.name)
            if not self.trial(self.native[storage.name], raw, self.dtype):
                del self.native[storage.name]
        if storage.name in self.native:
            return "blocks"
        return "groups" if storage.name in REPACKS or storage.mlx is not None else "floats"

    def matrix(self, raws: Sequence[RawTensor], taken: Taken, *, gathered: bool = False) -> Matrix:
        """Tensors of one storage type and width under one another. gathered: rows of it will be looked up."""
        self.admit(raws)
        match self.resting(raws[0]):
            case "groups":
                groups = self.groups(raws, taken)
                made: Matrix = (Affine if groups.biases is not None else Mxfp4)(groups, self.dtype)
            case "blocks":
                kind = raws[0].storage
                blocks = self.blocks(raws, taken)
                made = Blocks(blocks, kind.name, kind.bytes, raws[0].shape[-1], self.dtype, self.native[kind.name])
            case "floats":
                turned = self.columns_first and not gathered
                made = Dense(self.floats(raws, taken, turned), self.dtype, turned)
        self.nbytes += made.nbytes
        return made

    def experts(self, raws: Sequence[RawTensor], count: int, taken: Taken) -> Experts:
        """Tensors of one width, expert after expert, of equally many rows each; floats if their storage types differ."""
        self.admit(raws)
        kinds = {raw.storage for raw in raws}
        match self.resting(raws[0]) if len(kinds) == 1 else "floats":
            case "groups":
                groups = self.groups(raws, taken, count)
                made: Experts = (AffineExperts if groups.biases is not None else Mxfp4Experts)(groups)
            case "blocks":
                blocks = self.blocks(raws, taken)
                made = BlockExperts(blocks.reshape(count, -1, blocks.shape[-1]), self.native[raws[0].storage.name])
            case "floats":
                weight = self.floats(raws, taken, turned=False)
                if not mx.metal.is_available():
                    weight = weight.astype(mx.float32)           # MLX's CPU build gathers matrices in no other type
                    mx.eval(weight)
                made = DenseExperts(weight.reshape(count, -1, weight.shape[-1]))
        self.nbytes += made.nbytes
        return made

    def admit(self, raws: Sequence[RawTensor]) -> None:
        """Raises OutOfDeviceMemory if the tensors would not fit beside what is there: Metal itself would end the process."""
        for raw in raws:
            check_bytes(raw)
        if self.limit_bytes is None:
            return
        needed = self.nbytes + sum(self.estimate(raw) for raw in raws)
        if needed > self.limit_bytes:
            raise OutOfDeviceMemory(
                f"at tensor {raws[0].name} the weights take {needed / 1e9:.1f} GB, {self.limit_bytes / 1e9:.1f} GB may be "
                "used: take a smaller quantization or a smaller model"
            )

    def estimate(self, raw: RawTensor) -> int:
        """The most that a tensor takes here."""
        weights = raw.rows * raw.shape[-1]
        match self.resting(raw):
            case "groups" if (plan := REPACKS.get(raw.storage.name)) is not None:
                return packed_bytes(plan, weights)
            case "floats":
                return weights * (4 if self.dtype == mx.float32 else 2)
        return raw.data.nbytes + sum(2 * part.data.nbytes for part in raw.beside)

    def groups(self, raws: Sequence[RawTensor], taken: Taken, experts: int | None = None) -> Groups:
        packed = mlx_packed(raws[0].storage.mlx, raws, taken) if raws[0].storage.mlx else repack(raws, taken)
        front = () if experts is None else (experts,)

        def device(values: NDArray[np.generic], dtype: mx.Dtype) -> mx.array:
            return mx.array(values.reshape(*front, -1, values.shape[-1])).astype(dtype)

        words = device(packed.words, mx.uint32)
        if packed.biases is None:
            groups = Groups(words, device(packed.scales, mx.uint8), None, packed.bits, packed.group, packed.mode)
        else:
            kind = self.dtype if is_exact(packed.scales, self.dtype) and is_exact(packed.biases, self.dtype) else mx.float32
            scales, biases = device(packed.scales, kind), device(packed.biases, kind)
            groups = Groups(words, scales, biases, packed.bits, packed.group, packed.mode)
        mx.eval(groups.arrays)
        return groups

    def blocks(self, raws: Sequence[RawTensor], taken: Taken) -> mx.array:
        """(N, bytes of a row) uint8, in the file's mapping if one tensor makes the matrix."""
        blocks = self.mappings.array(raws[0].data) if len(raws) == 1 else None
        if blocks is None:
            blocks = mx.array(bytes_of_rows(raws))
        blocks = blocks.reshape(-1, raws[0].row_bytes)
        mx.eval(blocks)
        for raw in raws:
            taken(raw)
        return blocks

    def floats(self, raws: Sequence[RawTensor], taken: Taken, turned: bool) -> mx.array:
        """(N, K), or turned (K, N), of the type that the rule gives."""
        kind = self.float_type(raws)
        if kind != mx.float32 and all(raw.storage.name == NAMES[kind] for raw in raws):
            weight = self.as_it_is(raws, kind)
        elif kind == mx.float32:
            weight, turned = mx.array(staged(raws, turned)), False
        else:
            parts = []
            for chunk in chunks(raws):
                parts.append(mx.array(chunk).astype(kind))
                mx.eval(parts[-1])
            weight = mx.concatenate(parts)
        if turned:
            weight = mx.contiguous(weight.T)
        mx.eval(weight)
        for raw in raws:
            taken(raw)
        return weight

    def float_type(self, raws: Sequence[RawTensor]) -> mx.Dtype:
        """The activations' type, or float32 if that would round floats that nobody asked to round."""
        if self.dtype == mx.float32 or self.forced:
            return self.dtype
        other = [raw for raw in raws if FLOATS.get(raw.storage.name, self.dtype) != self.dtype]
        return self.dtype if all(is_exact(chunk, self.dtype) for chunk in chunks(other)) else mx.float32

    def as_it_is(self, raws: Sequence[RawTensor], kind: mx.Dtype) -> mx.array:
        """Floats of 16 bits whose bytes need no change: in the file's mapping if one tensor makes the matrix."""
        mapped = self.mappings.array(raws[0].data) if len(raws) == 1 else None
        stored = mapped if mapped is not None else mx.array(bytes_of_rows(raws))
        return stored.view(kind).reshape(-1, raws[0].shape[-1])


def mlx_packed(layout: MlxLayout, raws: Sequence[RawTensor], taken: Taken) -> Packed:
    """MLX's own tensors, under one another; they are in its layout."""
    words = np.concatenate([raw.data.view(np.uint32).reshape(raw.rows, -1) for raw in raws])
    match layout.mode:
        case "affine":
            scales, biases = (
                np.concatenate([to_float32(raw.beside[at]).reshape(raw.rows, -1) for raw in raws]) for at in (0, 1)
            )
            packed = Packed(words, scales, biases, layout.bits, layout.group, layout.mode)
        case "mxfp4":
            exponents = np.concatenate([raw.beside[0].data.reshape(raw.rows, -1) for raw in raws])
            packed = Packed(words, exponents, None, layout.bits, layout.group, layout.mode)
    for raw in raws:
        taken(raw)
    return packed


def bytes_of_rows(raws: Sequence[RawTensor]) -> NDArray[np.uint8]:
    """(N, bytes of a row): MLX has no axis of 2^31 bytes or more, experts together have."""
    return np.concatenate([raw.data.reshape(raw.rows, raw.row_bytes) for raw in raws])


def chunks(raws: Sequence[RawTensor]) -> Iterator[Floats]:
    """The rows of all tensors as float32, a few at a time."""
    for raw in raws:
        step = max(1, CHUNK_WEIGHTS // max(1, raw.shape[-1]))
        for start in range(0, raw.rows, step):
            yield to_float32(Part(raw.name, start, min(step, raw.rows - start)).of(raw, raw.name))


def staged(raws: Sequence[RawTensor], turned: bool) -> Floats:
    """All rows as float32 under one another, or side by side."""
    rows, columns = sum(raw.rows for raw in raws), raws[0].shape[-1]
    values = np.empty((columns, rows) if turned else (rows, columns), np.float32)
    first = 0
    for chunk in chunks(raws):
        at = slice(first, first + len(chunk))
        if turned:
            values[:, at] = chunk.T
        else:
            values[at] = chunk
        first += len(chunk)
    return values


def is_exact(values: NDArray[np.generic], dtype: mx.Dtype) -> bool:
    """Whether every float32 of `values` is one of `dtype` too."""
    values = values.astype(np.float32, copy=False)
    if dtype == mx.bfloat16:
        return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()
    if dtype == mx.float16:
        with np.errstate(over="ignore"):
            return bool((values.astype(np.float16) == values).all())
    return dtype == mx.float32
