"""All layers of a dense model in one call and one parallel region: the loop of model.py without Python between the kernels.

A layer of a small model computes for 0.1 ms, and each call from Python costs some microseconds. fused.py makes the arguments
and tells which models this serves; the results have the same bits as those of model.py's own loop. The arguments are
addresses in one record: how long Numba compiles a launch of threads depends on the arrays that it is given.
"""

from functools import cache
from typing import Any, cast

import numba
import numpy as np
from numba import cfunc, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from backends.cpu.kernels.attention import ENOUGH, merge_parts, padded, queries_of, segments_of, share
from backends.cpu.kernels.elementwise import norm_row, silu_or_gelu
from backends.cpu.kernels.groups import Groups, prepare
from backends.cpu.kernels.integer import MATRIX, TILE, block_totals, share_products
from backends.cpu.kernels.jit import LANES, OPTIONS, inner, kernel, signed
from backends.cpu.kernels.position import position_row
from backends.cpu.kernels.sharing import APART, next_task
from backends.cpu.kernels.stages import finish_stage, new_marks, stage_shares
from backends.cpu.kernels.vectors import call

__all__ = [
    "ATTENTION_OUTPUT", "DOWN", "GATE", "QUERY", "SLOTS", "STEP", "UP", "attention_function", "forward", "stages_function",
]  # fmt: skip

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
typed_intrinsic: Any = intrinsic
carray: Any = numba.carray     # type: ignore[attr-defined]

# a layer's matrices; a slot without one has no blocks. Query, key and value take up to three, unlike types apart
QUERY, ATTENTION_OUTPUT, GATE, UP, DOWN, SLOTS = 0, 3, 4, 5, 6, 7
STAGES = 11                 # of a layer: norm, up to three of qkv, rope, attention, merging, output, norm, gate and up, down

STEP = np.dtype(
    [
        (name, np.int64)
        for name in (
            # addresses: (layers, SLOTS) of MATRIX; (layers, 2, D): before attention, before the feed-forward;
            # (layers, columns of qkv) or nothing; (layers, 2, head size) or nothing; (layers,): 0 is all
            "matrices", "norms", "biases", "head_norms", "windows",
            # addresses: (T, rotary / 2) twice; (T,); (blocks, 4); (B, W); the pages
            "cosine", "sine", "slots", "blocks", "tables", "keys", "values",
            # addresses: x (T, D) is changed in place; the rest is workspace, with what is prepared of its groups
            "x", "normed", "normed_groups", "qkv", "mixed", "mixed_groups", "gated", "gated_groups",
            "nap", "stages", "attention",      # of functions
            # sizes
            "layers", "hidden", "width", "heads", "kv_heads", "head_size", "page_tokens", "pages", "rotary_half",
            "bias_columns", "norm_size", "block_count", "table_rows", "table_width", "tokens", "room", "is_silu",
            "interleaved", "unused",           # 0
        )
    ]
    + [(name, np.float32) for name in ("epsilon", "scale", "cap", "padding")]
)  # fmt: skip
"""What a step is: every array by its address. room: rows that the workspace has, a whole tile at least."""


@typed_intrinsic  # type: ignore[untyped-decorator]
def pointer(_context: Any, address: Any) -> Any:
    def generate(_target: Any, builder: Any, signature: Any, values: list[Any]) -> Any:
        return builder.inttoptr(values[0], _target.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@inner
def gated_block(
    matrices: NDArray[Any], records: Groups, b: int, is_silu: bool, out: Floats, groups: Groups, tokens: int
) -> None:
    """Gate and up of 32 rows, for all tokens: activation(gate) * up, and its digits."""
    gate, up = np.empty((TILE, LANES), np.float32), np.empty((TILE, LANES), np.float32)
    for t in range(0, tokens, TILE):
        block_totals(matrices, GATE, records, b, t, tokens, gate)
        block_totals(matrices, UP, records, b, t, tokens, up)
        for i in range(min(TILE, tokens - t)):
            for r in range(LANES):
                out[t + i, b * LANES + r] = silu_or_gelu(is_silu, gate[i, r]) * up[i, r]
            prepare(out, groups, t + i, b * LANES, (b + 1) * LANES)


@inner
def share_norms(
    x: Floats, weight: Floats, epsilon: np.float32, out: Floats, groups: Groups, tokens: int, shares: Longs, worker: int
) -> int:
    t, done = next_task(shares, worker, tokens), 0
    while t >= 0:
        norm_row(x, weight, epsilon, out, groups, t)
        t = next_task(shares, worker, tokens)
        done += 1
    return done


@inner
def share_gated(
    matrices: NDArray[Any], records: Groups, is_silu: bool, out: Floats, groups: Groups, tokens: int, shares: Longs,
    worker: int,
) -> int:
    blocks, done = matrices[GATE].blocks, 0
    b = next_task(shares, worker, blocks)
    while b >= 0:
        gated_block(matrices, records, b, is_silu, out, groups, tokens)
        b = next_task(shares, worker, blocks)
        done += 1
    return done


@inner
def share_positions(
    qkv: Floats, bias: Floats, head_norms: Floats, epsilon: np.float32, cosine: Floats, sine: Floats, interleaved: bool,
    slots: Longs, keys: Floats, values: Floats, layer: int, shares: Longs, worker: int,
) -> int:  # fmt: skip
    tokens, done = slots.shape[0], 0
    t = next_task(shares, worker, tokens)
    while t >= 0:
        position_row(
            qkv, bias, head_norms[0], head_norms[1], epsilon, cosine, sine, interleaved, slots, keys, values, layer, t
        )  # fmt: skip
        t = next_task(shares, worker, tokens)
        done += 1
    return done


@inner
def share_merging(
    blocks: Ints, places: int, kv_heads: int, group: int, window: int, outs: Floats, masses: Floats, tops: Floats,
    result: Floats, groups: Groups, shares: Longs, worker: int,
) -> int:  # fmt: skip
    place, done = next_task(shares, worker, places), 0
    while place >= 0:
        merge_parts(blocks, place, kv_heads, group, window, outs, masses, tops, result, groups)
        place = next_task(shares, worker, places)
        done += 1
    return done


@inner
def parts_of(blocks: Ints, kv_heads: int, window: int, workers: int) -> int:
    """Into how many tasks attention cuts the context of a block, see attention.attend."""
    return segments_of(blocks, window) if len(blocks) * kv_heads < ENOUGH * workers else 1


@inner
def windows_of(step: NDArray[Any]) -> Longs:
    windows: Longs = carray(pointer(step[0].windows), (step[0].layers,), np.int64)
    return windows


@inner
def parts_room(step: NDArray[Any], workers: int) -> int:
    """Floats that attention wants to keep parts of its results, in any layer."""
    s = step[0]
    blocks = carray(pointer(s.blocks), (s.block_count, 4), np.int32)
    windows = windows_of(step)
    parts = 1
    for layer in range(s.layers):
        parts = max(parts, parts_of(blocks, s.kv_heads, windows[layer], workers))
    lines = padded(queries_of(blocks) * (s.heads // s.kv_heads))
    return len(blocks) * s.kv_heads * parts * lines * (s.head_size + LANES + 1) if parts > 1 else 0


def attention_stages(
    step_at: int, kept_at: int, kept_size: int, marks_at: int, workers: int, worker: int, layer: int, stage: int
) -> None:
    """One thread's way through a layer's attention: one stage, or two where contexts are cut into parts."""
    step = carray(pointer(step_at), (1,), STEP)
    s = step[0]
    kept = carray(pointer(kept_at), (kept_size,), np.float32)
    marks = carray(pointer(marks_at), (STAGES * s.layers, workers + 1, APART), np.int64)
    size, kv_heads, tokens, window = s.head_size, s.kv_heads, s.tokens, windows_of(step)[layer]
    columns, query_columns, group = (s.heads + 2 * kv_heads) * size, s.heads * size, s.heads // kv_heads
    blocks = carray(pointer(s.blocks), (s.block_count, 4), np.int32)
    tables = carray(pointer(s.tables), (s.table_rows, s.table_width), np.int32)
    keys = carray(pointer(s.keys), (s.pages, s.layers, kv_heads, size, s.page_tokens), np.float32)
    values = carray(pointer(s.values), (s.pages, s.layers, kv_heads, s.page_tokens, size), np.float32)
    qkv = carray(pointer(s.qkv), (tokens, columns), np.float32)
    mixed = carray(pointer(s.mixed), (s.room, query_columns), np.float32)
    mixed_groups = carray(pointer(s.mixed_groups), (s.room, query_columns // LANES, LANES), np.uint32)
    lines, places = padded(queries_of(blocks) * group), len(blocks) * kv_heads
    parts = parts_of(blocks, kv_heads, window, workers)
    cells = places * parts * lines if parts > 1 else 0
    rows = cells // (parts * lines)
    outs = kept[: cells * size].reshape((rows, parts, lines, size))
    masses = kept[cells * size : cells * (size + LANES)].reshape((rows, parts, lines, LANES))
    tops = kept[cells * (size + LANES) : cells * (size + LANES + 1)].reshape((rows, parts, lines))
    done = share(
        qkv, keys, values, layer, blocks, tables, s.scale, window, s.cap, mixed, mixed_groups, parts, lines, outs, masses,
        tops, stage_shares(marks, stage), worker,
    )  # fmt: skip
    finish_stage(marks, stage, places * parts, done, tokens, s.nap)
    if parts > 1:
        done = share_merging(
            blocks, places, kv_heads, group, window, outs, masses, tops, mixed, mixed_groups,
            stage_shares(marks, stage + 1), worker,
        )  # fmt: skip
        finish_stage(marks, stage + 1, places, done, tokens, s.nap)


def all_stages(step_at: int, kept_at: int, kept_size: int, marks_at: int, workers: int, worker: int) -> None:
    """One thread's way through all stages of a step."""
    step = carray(pointer(step_at), (1,), STEP)
    s = step[0]
    marks = carray(pointer(marks_at), (STAGES * s.layers, workers + 1, APART), np.int64)
    layers, hidden, tokens, room, size, kv_heads = s.layers, s.hidden, s.tokens, s.room, s.head_size, s.kv_heads
    columns, query_columns = (s.heads + 2 * kv_heads) * size, s.heads * size
    epsilon, is_silu, interleaved = s.epsilon, s.is_silu != 0, s.interleaved != 0
    all_matrices = carray(pointer(s.matrices), (layers, SLOTS), MATRIX)
    norms = carray(pointer(s.norms), (layers, 2, hidden), np.float32)
    biases = carray(pointer(s.biases), (layers, s.bias_columns), np.float32)
    head_norms = carray(pointer(s.head_norms), (layers, 2, s.norm_size), np.float32)
    cosine = carray(pointer(s.cosine), (tokens, s.rotary_half), np.float32)
    sine = carray(pointer(s.sine), (tokens, s.rotary_half), np.float32)
    slots = carray(pointer(s.slots), (tokens,), np.int64)
    keys = carray(pointer(s.keys), (s.pages, layers, kv_heads, size, s.page_tokens), np.float32)
    values = carray(pointer(s.values), (s.pages, layers, kv_heads, s.page_tokens, size), np.float32)
    x = carray(pointer(s.x), (room, hidden), np.float32)
    normed = carray(pointer(s.normed), (room, hidden), np.float32)
    normed_groups = carray(pointer(s.normed_groups), (room, hidden // LANES, LANES), np.uint32)
    qkv = carray(pointer(s.qkv), (tokens, columns), np.float32)
    mixed_groups = carray(pointer(s.mixed_groups), (room, query_columns // LANES, LANES), np.uint32)
    gated = carray(pointer(s.gated), (room, s.width), np.float32)
    gated_groups = carray(pointer(s.gated_groups), (room, s.width // LANES, LANES), np.uint32)
    blocks, windows = carray(pointer(s.blocks), (s.block_count, 4), np.int32), windows_of(step)

    # numbers that the compiler does not see: it would compile share_products once more for each
    nothing = s.unused
    output, down, write, add = nothing + ATTENTION_OUTPUT, nothing + DOWN, nothing != 0, nothing == 0
    stage = nothing
    for layer in range(layers):
        mine = all_matrices[layer]
        done = share_norms(x, norms[layer, 0], epsilon, normed, normed_groups, tokens, stage_shares(marks, stage), worker)
        finish_stage(marks, stage, tokens, done, tokens, s.nap)
        stage += 1
        first = nothing
        for slot in range(QUERY, ATTENTION_OUTPUT):
            if mine[slot].blocks > 0:
                done = share_products(
                    mine, slot, normed_groups, tokens, qkv, first, write, stage_shares(marks, stage), worker
                )  # fmt: skip
                finish_stage(marks, stage, mine[slot].blocks, done, tokens, s.nap)
                stage += 1
                first += mine[slot].rows
        done = share_positions(
            qkv, biases[layer], head_norms[layer], epsilon, cosine, sine, interleaved, slots, keys, values, layer,
            stage_shares(marks, stage), worker,
        )  # fmt: skip
        finish_stage(marks, stage, tokens, done, tokens, s.nap)
        stage += 1
        call(s.attention, (step_at, kept_at, kept_size, marks_at, workers, worker, np.int64(layer), stage))
        stage += 2 if parts_of(blocks, kv_heads, windows[layer], workers) > 1 else 1
        done = share_products(mine, output, mixed_groups, tokens, x, nothing, add, stage_shares(marks, stage), worker)
        finish_stage(marks, stage, mine[ATTENTION_OUTPUT].blocks, done, tokens, s.nap)
        stage += 1
        done = share_norms(x, norms[layer, 1], epsilon, normed, normed_groups, tokens, stage_shares(marks, stage), worker)
        finish_stage(marks, stage, tokens, done, tokens, s.nap)
        stage += 1
        done = share_gated(mine, normed_groups, is_silu, gated, gated_groups, tokens, stage_shares(marks, stage), worker)
        finish_stage(marks, stage, mine[GATE].blocks, done, tokens, s.nap)
        stage += 1
        done = share_products(mine, down, gated_groups, tokens, x, nothing, add, stage_shares(marks, stage), worker)
        finish_stage(marks, stage, mine[DOWN].blocks, done, tokens, s.nap)
        stage += 1


@cache
def stages_function() -> Any:
    """all_stages, compiled; its .address is what STEP holds. By address, because LLVM would work on it once more for each
    function that it is part of."""
    return by_address(all_stages, 6)


@cache
def attention_function() -> Any:
    """attention_stages, compiled."""
    return by_address(attention_stages, 8)


def by_address(function: Any, arguments: int) -> Any:
    signature, compiled = types.void(*[types.int64] * arguments), cast(Any, cfunc)
    try:
        return compiled(signature, cache=True, **OPTIONS)(function)
    except RuntimeError:       # no folder for the cache: jit.kernel has said it
        return compiled(signature, **OPTIONS)(function)


@kernel
def forward(step: NDArray[Any], workers: int) -> None:
    """All layers; step is one STEP."""
    kept = np.empty(parts_room(step, workers), np.float32)
    marks = new_marks(STAGES * step[0].layers, workers)
    for worker in prange(workers):
        call(
            step[0].stages,
            (
                np.int64(step.ctypes.data), np.int64(kept.ctypes.data), np.int64(len(kept)), np.int64(marks.ctypes.data),
                np.int64(workers), signed(worker),
            ),
        )  # fmt: skip
