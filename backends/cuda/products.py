"""Products of activations and packed matrices, and rows of one as embeddings. ops.py calls these; they launch kernels.

Which kernel runs depends on the count of tokens that is given, the matrix and the device, not on what memory holds: a
launch can be captured for a padded count. Sums have one order, so a result is the same each time.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from backends.cuda.device import ITEM_BYTES, Array, Kernel, Stream
from backends.cuda.matrices import PACKINGS, ROW_TILE, Matrix

__all__ = [
    "EXPERT_TILES", "LEAST_TILE_TOKENS", "all_kernels", "kernels_for", "product", "product_of_experts", "take_rows",
    "tile_tokens",
]  # fmt: skip

FEW_TOKENS, FEW_WARPS = 8, 8
STAGES = 3
TAKE_THREADS = 128
ABSENT = 0
MULTIPROCESSORS = 132    # blocks that a launch should have at least: an H100's; others are near


@dataclass(frozen=True, slots=True)
class Tiling:
    """Template arguments of product_many."""

    tokens: int
    row_warps: int
    k_warps: int
    row_tiles: int           # of 16 rows, for each warp
    stage_tiles: int         # of 64 columns, in a stage of activations
    ring: int                # tiles of weights under way at most

    @property
    def block_rows(self) -> int:
        return self.row_warps * self.row_tiles * ROW_TILE

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.k_warps

    @property
    def shared_bytes(self) -> int:
        stages = STAGES * self.k_warps * self.stage_tiles * self.tokens * 128
        sums = (self.k_warps - 1) * self.block_rows * self.tokens * 4
        return max(stages, sums) + 8 * self.tokens

    def kernel(self, storage: str, any_columns: str) -> Kernel:
        ring = min(self.ring, PACKINGS[storage].ring)
        numbers = (self.tokens, self.row_warps, self.k_warps, self.row_tiles, self.stage_tiles, ring)
        return Kernel("product_many.cu", f"product_many<{storage}, {any_columns}, {', '.join(map(str, numbers))}>")


TILINGS = {
    tiling.tokens: tiling
    for tiling in (
        Tiling(16, 2, 4, 1, 2, 4),
        Tiling(32, 2, 4, 1, 1, 4),
        Tiling(64, 4, 2, 1, 1, 2),
        Tiling(96, 4, 1, 2, 1, 1),          # with 128 tokens some types would want more than 255 registers
    )
}
EXPERT_TILES = (FEW_TOKENS, *TILINGS)
"""How many tokens of one expert a tile can have at most."""
LEAST_TILE_TOKENS = FEW_TOKENS


def few_kernel(storage: str, any_columns: str) -> Kernel:
    return Kernel("product_few.cu", f"product_few<{storage}, {any_columns}>")


def take_kernel(storage: str) -> Kernel:
    return Kernel("embedding.cu", f"take_rows<{storage}>")


def kernels_for(matrices: Iterable[Matrix], most_tokens: int) -> list[Kernel]:
    """What this file launches with these matrices, for up to so many tokens."""
    kinds = dict.fromkeys((matrix.storage, unaligned(matrix)) for matrix in matrices)
    tilings = [tiling for tokens, tiling in TILINGS.items() if most_tokens > max(FEW_TOKENS, tokens // 2)]   # experts' too
    found = [few_kernel(*kind) for kind in kinds]
    found += [tiling.kernel(*kind) for kind in kinds for tiling in tilings]
    return found + [take_kernel(storage) for storage in dict.fromkeys(storage for storage, _ in kinds)]


def all_kernels() -> list[Kernel]:
    """For the catalogue."""
    kinds = [(storage, "false") for storage in PACKINGS] + [("BF16", "true"), ("F16", "true")]
    found = [few_kernel(*kind) for kind in kinds] + [tiling.kernel(*kind) for kind in kinds for tiling in TILINGS.values()]
    return found + [take_kernel(storage) for storage in PACKINGS]


def unaligned(matrix: Matrix) -> str:
    """Whether rows of activations begin anywhere: the template argument."""
    return "true" if matrix.columns % 8 else "false"


def tile_of(tokens: int, rows: int) -> int:
    """Tokens of a block: as many as there are, up to 96, but few enough that every multiprocessor has a block."""
    if tokens <= FEW_TOKENS:
        return FEW_TOKENS
    least, *larger = TILINGS
    wanted = [tile for below, tile in zip(TILINGS, larger, strict=False) if tokens > below]
    busy = [tile for tile in wanted if -(-tokens // tile) * -(-rows // TILINGS[tile].block_rows) >= MULTIPROCESSORS]
    return max(busy, default=least)


def tile_tokens(tokens: int, experts_per_token: int, experts: int) -> int:
    """The tile for product_of_experts: so that an expert that is chosen as often as the others has one, with some room."""
    share = tokens * experts_per_token / experts
    return next((tile for tile in EXPERT_TILES if tile >= 1.5 * share), EXPERT_TILES[-1])


def product(stream: Stream, x: Array, matrix: Matrix, out: Array, column: int = 0) -> None:
    """out[:T, column : column + rows] = x W^T. x (T, columns) bf16; out (>= T, >= column + rows) bf16 or f32; f32 sums."""
    tokens = x.shape[0]
    assert matrix.experts == 1, matrix.experts
    assert 1 <= tokens <= out.shape[0], (tokens, out.shape)
    tile = tile_of(tokens, matrix.rows)
    launch(stream, tile, -(-tokens // tile), x, matrix, out, column, tokens, ABSENT, ABSENT)


def product_of_experts(
    stream: Stream, x: Array, source: Array | None, matrix: Matrix, tiles: Array, out: Array, tile_tokens: int,
    column: int = 0,
) -> None:  # fmt: skip
    """out[p, column : column + rows] = x[source[p]] W_e^T for the positions p of each tile (expert e, first position, count).

    tiles (n, 3) i32 on the device, all n are launched: count <= tile_tokens, one of EXPERT_TILES; expert -1 or count 0 is
    nothing to do. source (P,) i32, or None: x[p]. x (T, columns) bf16; out (P, >= column + rows) bf16 or f32: rows in no tile
    stay as they are.
    """
    assert tile_tokens in EXPERT_TILES, tile_tokens
    assert tiles.shape[1:] == (3,), tiles
    where = ABSENT if source is None else source
    launch(stream, tile_tokens, tiles.shape[0], x, matrix, out, column, tile_tokens, tiles, where)


def launch(
    stream: Stream, tile: int, count: int, x: Array, matrix: Matrix, out: Array, column: int, tokens: int,
    tiles: Array | int, source: Array | int,
) -> None:  # fmt: skip
    """`count` tiles of tokens by all rows."""
    assert x.shape[1] == matrix.columns, (x, matrix.columns)
    assert 0 <= column <= out.shape[1] - matrix.rows, (out, column, matrix.rows)
    assert out.item in ("bf16", "f32"), out
    arguments = (
        x, np.int64(x.shape[1]), matrix.blob, matrix.strip, np.int64(matrix.blob_bytes), np.int64(matrix.strip_bytes),
        out.address + column * ITEM_BYTES[out.item], np.int64(out.shape[1]), np.int32(out.item == "f32"),
        np.int32(matrix.rows), np.int32(matrix.columns), np.int32(tokens), tiles, source,
    )  # fmt: skip
    if tile == FEW_TOKENS:
        warps = few_warps(matrix)
        kernel = few_kernel(matrix.storage, unaligned(matrix))
        stream.launch(kernel, (count, matrix.row_tiles, 1), 32 * warps, warps * FEW_TOKENS * ROW_TILE * 4, *arguments)
    else:
        tiling = TILINGS[tile]
        kernel = tiling.kernel(matrix.storage, unaligned(matrix))
        grid = (count, -(-matrix.rows // tiling.block_rows), 1)
        stream.launch(kernel, grid, tiling.threads, tiling.shared_bytes, *arguments)


def few_warps(matrix: Matrix) -> int:
    """Warps of a block, so that each has as many steps as the others: fewer where there are many blocks anyway."""
    most = FEW_WARPS if matrix.row_tiles < 12 * MULTIPROCESSORS else FEW_WARPS // 2
    rounds = -(-matrix.supers // most)
    return -(-matrix.supers // rounds)


def take_rows(stream: Stream, ids: Array, matrix: Matrix, out: Array) -> None:
    """out[t] = row ids[t] of the matrix, exactly as gguf dequantizes it. ids (T,) i32 < rows; out (>= T, columns) f32."""
    tokens = ids.shape[0]
    assert out.shape[0] >= tokens, (ids, out)
    assert out.shape[1] == matrix.columns, (out, matrix.columns)
    stream.launch(
        take_kernel(matrix.storage), (tokens, 1, 1), TAKE_THREADS, 0, ids, matrix.blob, matrix.strip, out,
        np.int32(matrix.columns),
    )  # fmt: skip
