"""The two products of attention, for a tile of lines and one page: scores of keys, and values by their weights.

Written with vectors.py, so that a tile's sums stay in registers; LLVM makes two or four vectors of one where a machine has
shorter ones. Every line is summed in one order, whatever the tile. attention.py calls these with addresses.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from backends.cpu.kernels.jit import LANES
from backends.cpu.kernels.vectors import FLOATS, Emitter, Value, tools
from backends.cpu.kernels.vectors import LANES as WIDTH

__all__ = ["WIDTH", "score_tile", "value_tile"]

literal_intrinsic: Any = intrinsic(prefer_literal=True)
FLOAT = 4         # bytes
ROW = FLOAT * LANES
CACHE_LINE = 64   # bytes; a page of keys or values of one head has two for each number of a head


def tile_sums(
    emit: Emitter, lines: int, steps: Value, start: list[Value], factors: Any, vector: Any, fetch: Any = None
) -> list[Value]:
    """start[i] + the sum over steps of factors(i, step) * vector(step), one fused multiply-add after another.

    fetch(step) asks for memory that will be read later.
    """
    builder = emit.builder
    sums = [tools.alloca_once_value(builder, value) for value in start]
    with tools.for_range(builder, steps) as loop:
        if fetch is not None:
            fetch(loop.index)
        shared = vector(loop.index)
        for line in range(lines):
            total = emit.fused(emit.spread(factors(line, loop.index)), shared, builder.load(sums[line]))
            builder.store(total, sums[line])
    return [builder.load(total) for total in sums]


@literal_intrinsic  # type: ignore[untyped-decorator]
def score_tile(_context: Any, lines: Any, fetches: Any, q: Any, keys: Any, size: Any, scores: Any, ahead: Any) -> Any:
    """scores[i, j] = q[i] . keys[:, j]: q (lines, size), keys (size, 32), scores (lines, 32), all float32 by address.

    fetches, a constant: 1 if a page's numbers at address `ahead` are to be on their way then; 0 if not.
    """

    def generate(target: Any, builder: ir.IRBuilder, signature: Any, values: list[Value]) -> Value:
        emit, count = Emitter(builder), lines.literal_value
        _, _, q_at, keys_at, size_, scores_at, ahead_at = values
        row = emit.times(size_, FLOAT)
        queries = [emit.at(q_at, builder.mul(row, row.type(line))) for line in range(count)]
        for half in range(LANES // WIDTH):

            def fetch(d: Value, half: int = half) -> None:
                emit.prefetch(ahead_at, emit.times(d, CACHE_LINE), emit.times(size_, half * CACHE_LINE))

            sums = tile_sums(
                emit, count, size_, [emit.floats(0)] * count,
                lambda line, d: emit.load(FLOATS.element, queries[line], emit.times(d, FLOAT)),
                lambda d, half=half: emit.load(FLOATS, keys_at, emit.times(d, ROW), half * FLOAT * WIDTH),
                fetch if fetches.literal_value else None,
            )  # fmt: skip
            for line in range(count):
                emit.store(sums[line], scores_at, line * ROW + half * FLOAT * WIDTH)
        return target.get_dummy_value()

    return types.void(lines, fetches, q, keys, size, scores, ahead), generate


@literal_intrinsic  # type: ignore[untyped-decorator]
def value_tile(_context: Any, lines: Any, fetches: Any, weights: Any, values_: Any, size: Any, out: Any, ahead: Any) -> Any:
    """out[i] += sum over j of weights[i, j] values[j]: weights (lines, 32), values (32, size), out (lines, size).

    The last size % 16 columns are left to the caller. fetches, ahead: see score_tile.
    """

    def generate(target: Any, builder: ir.IRBuilder, signature: Any, values: list[Value]) -> Value:
        emit, count = Emitter(builder), lines.literal_value
        _, _, weights_at, values_at, size_, out_at, ahead_at = values
        row = emit.times(size_, FLOAT)
        results = [emit.at(out_at, builder.mul(row, row.type(line))) for line in range(count)]
        with tools.for_range(builder, builder.udiv(size_, size_.type(WIDTH))) as loop:
            column, fetched = emit.times(loop.index, FLOAT * WIDTH), emit.times(loop.index, LANES * CACHE_LINE)
            sums = tile_sums(
                emit, count, size_.type(LANES), [emit.load(FLOATS, result, column) for result in results],
                lambda line, j: emit.load(FLOATS.element, weights_at, emit.times(j, FLOAT), line * ROW),
                lambda j: emit.load(FLOATS, values_at, builder.mul(j, row), column),
                (lambda j: emit.prefetch(ahead_at, fetched, emit.times(j, CACHE_LINE))) if fetches.literal_value else None,
            )  # fmt: skip
            for line in range(count):
                emit.store(sums[line], results[line], column)
        return target.get_dummy_value()

    return types.void(lines, fetches, weights, values_, size, out, ahead), generate
