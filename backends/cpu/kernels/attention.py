"""Paged attention: softmax(scale q k) v over the pages of each row, causal, with sliding window and soft cap.

A task is a block of a row's queries for one key/value head: its lines (queries x heads of the group) share every load of
a key and a value. Keys are lanes: 32 scores at a time. The softmax is online, page after page within a segment of 16 pages,
and segments are merged from the first one on; so a query's result has the same bits whatever the block, the chunk or the
company that it came in, and whether its segments were one task or many. ops.py calls `attend`.

Over 300 lines: the steps from a page to a finished line are one algorithm, in the order in which they happen.
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from backends.cpu.kernels.arithmetic import exponential, tanh
from backends.cpu.kernels.groups import SPAN, Groups, prepare
from backends.cpu.kernels.jit import LANES, inner, kernel, signed
from backends.cpu.kernels.sharing import new_shares, next_task
from backends.cpu.kernels.tiles import WIDTH, score_tile, value_tile

__all__ = ["BLOCK_FIELDS", "attend"]

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Room = tuple[Floats, Longs]                # of lines: scores of a page (lines, 32), first and last key seen of it (2, lines)
State = tuple[Floats, Floats, Floats]      # of lines: out (lines, size), mass (lines, 32), top (lines,)

BLOCK_FIELDS = 4   # first token, queries, row, keys that the first query sees
TILE, NARROW = 8, 4        # lines that share the loads of a key or value; a block's lines are padded to the lesser
SEGMENT = 16               # pages
ENOUGH = 4                 # tasks of a thread, from which on they are not cut into segments

FAR = np.float32(-1e30)   # instead of -inf, which fastmath does not allow
ZERO, ONE = np.float32(0), np.float32(1)


@inner
def weigh(scores: Floats, line: int, low: int, high: int, cap: np.float32, top: Floats, mass: Floats, out: Floats) -> None:
    """Turn a line's scores of keys low <= j < high into weights, the others into 0, and rescale what it has so far."""
    if cap > ZERO:
        for j in range(LANES):
            scores[line, j] = cap * tanh(scores[line, j] / cap)
    best = top[line]
    for j in range(LANES):
        s = scores[line, j] if low <= j < high else FAR
        scores[line, j] = s
        best = max(best, s)
    if best > top[line]:
        shrink = exponential(top[line] - best)
        top[line] = best
        for j in range(LANES):
            mass[line, j] *= shrink
        for i in range(out.shape[1]):
            out[line, i] *= shrink
    for j in range(LANES):
        s = scores[line, j]
        weight = exponential(s - best) if s > FAR else ZERO
        scores[line, j] = weight
        mass[line, j] += weight


@inner
def tile_of_page(
    q: Floats, line: int, keys: Floats, values: Floats, page: int, layer: int, head: int, scores: Floats, out: Floats,
    lows: Longs, highs: Longs, cap: np.float32, top: Floats, mass: Floats, lines: int, ahead: int,
) -> None:  # fmt: skip
    """What a page adds to a tile of lines; each sees the keys lows <= j < highs of it. ahead: address of the keys that come
    next."""
    size = q.shape[1]
    wide = lines - line > NARROW
    stop = line + (TILE if wide else NARROW)
    q_at, key_at = np.int64(q[line].ctypes.data), np.int64(keys[page, layer, head].ctypes.data)
    scores_at = np.int64(scores[line].ctypes.data)
    value_at, out_at = np.int64(values[page, layer, head].ctypes.data), np.int64(out[line].ctypes.data)
    if line > 0:                                     # the first tile has brought the page
        if wide:
            score_tile(TILE, 0, q_at, key_at, size, scores_at, value_at)
        else:
            score_tile(NARROW, 0, q_at, key_at, size, scores_at, value_at)
    elif wide:
        score_tile(TILE, 1, q_at, key_at, size, scores_at, value_at)
    else:
        score_tile(NARROW, 1, q_at, key_at, size, scores_at, value_at)
    for i in range(line, stop):
        if i < lines and lows[i] < highs[i]:
            weigh(scores, i, lows[i], highs[i], cap, top, mass, out)
        else:
            for j in range(LANES):
                scores[i, j] = ZERO
    if line > 0:
        if wide:
            value_tile(TILE, 0, scores_at, value_at, size, out_at, ahead)
        else:
            value_tile(NARROW, 0, scores_at, value_at, size, out_at, ahead)
    elif wide:
        value_tile(TILE, 1, scores_at, value_at, size, out_at, ahead)
    else:
        value_tile(NARROW, 1, scores_at, value_at, size, out_at, ahead)
    for i in range(line, stop):
        for c in range(size // WIDTH * WIDTH, size):     # what does not fill a vector
            total = out[i, c]
            for j in range(LANES):
                total += scores[i, j] * values[page, layer, head, j, c]
            out[i, c] = total


@inner
def segment_of(
    q: Floats, lines: int, group: int, first_limit: int, first_page: int, last_page: int, keys: Floats, values: Floats,
    layer: int, table: Ints, head: int, window: int, cap: np.float32, state: State, room: Room,
) -> None:  # fmt: skip
    """The online softmax of all lines over the pages first_page .. last_page, from nothing."""
    out, mass, top = state
    scores, sees = room
    lows, highs = sees[0], sees[1]
    clear(state)
    for number in range(first_page, last_page + 1):
        page = signed(table[number])
        following, its_head = page, min(head + 1, keys.shape[2] - 1)       # most probably the next task's
        if number < last_page:
            following, its_head = signed(table[number + 1]), head
        ahead = signed(keys[following, layer, its_head].ctypes.data)
        start = number * LANES
        for i in range(lines):
            limit = first_limit + i // group
            lows[i] = max(0, limit - window - start) if window > 0 else 0
            highs[i] = min(LANES, limit - start)
        for line in range(0, lines, TILE):
            if first_limit + min(lines - 1, line + TILE - 1) // group > start:      # else no line of the tile sees the page
                tile_of_page(
                    q, line, keys, values, page, layer, head, scores, out, lows, highs, cap, top, mass, lines, ahead
                )  # fmt: skip


@inner
def clear(state: State) -> None:
    out, mass, top = state
    for i in range(len(top)):
        top[i] = FAR
        for j in range(LANES):
            mass[i, j] = ZERO
        for c in range(out.shape[1]):
            out[i, c] = ZERO


@inner
def merge(state: State, more: State, lines: int) -> None:
    """Add a later segment's sums to those of the segments before it."""
    out, mass, top = state
    out_more, mass_more, top_more = more
    for i in range(lines):
        if top_more[i] == FAR:
            continue                                     # the line saw nothing of the segment
        best = max(top[i], top_more[i])
        old = exponential(top[i] - best) if top[i] > FAR else ZERO
        new = exponential(top_more[i] - best)
        top[i] = best
        for j in range(LANES):
            mass[i, j] = mass[i, j] * old + mass_more[i, j] * new
        for c in range(out.shape[1]):
            out[i, c] = out[i, c] * old + out_more[i, c] * new


@inner
def gather_queries(qkv: Floats, token: int, head: int, group: int, lines: int, scale: np.float32, q: Floats) -> None:
    """Lines of one query stand together; those of the padding repeat the last one."""
    size = q.shape[1]
    for line in range(q.shape[0]):
        there = min(line, lines - 1)
        column = (head * group + there % group) * size
        for i in range(size):
            q[line, i] = qkv[token + there // group, column + i] * scale


@inner
def finish(
    state: State, lines: int, group: int, token: int, head: int, result: Floats, groups: Groups
) -> None:
    """Divide by the weights' sums and write the lines to their tokens."""
    out, mass, _ = state
    size = out.shape[1]
    for line in range(lines):
        total = ZERO
        for j in range(LANES):
            total += mass[line, j]
        share = ONE / total
        column = (head * group + line % group) * size
        for i in range(size):
            result[token + line // group, column + i] = out[line, i] * share
    if group * size % SPAN == 0:
        for query in range(lines // group):
            prepare(result, groups, token + query, head * group * size, (head + 1) * group * size)


@inner
def pages_of(block: Ints, window: int) -> tuple[int, int]:
    """The first and the last page that a block's queries see."""
    first_limit, queries = block[3], block[1]
    first = max(0, first_limit - window) // LANES if window > 0 else 0
    return first, (first_limit + queries - 2) // LANES


@inner
def new_state(lines: int, size: int) -> State:
    return np.empty((lines, size), np.float32), np.empty((lines, LANES), np.float32), np.empty(lines, np.float32)


@inner
def new_room(lines: int) -> Room:
    return np.empty((lines, LANES), np.float32), np.empty((2, lines), np.int64)


@inner
def padded(lines: int) -> int:
    return (lines + NARROW - 1) // NARROW * NARROW


@inner
def queries_of(blocks: Ints) -> int:
    """The most queries that a block has."""
    most = 0
    for number in range(len(blocks)):
        most = max(most, blocks[number, 1])
    return most


@inner
def segments_of(blocks: Ints, window: int) -> int:
    """The most segments that a block has."""
    most = 0
    for number in range(len(blocks)):
        first, last = pages_of(blocks[number], window)
        most = max(most, last // SEGMENT - first // SEGMENT + 1)
    return most


@inner
def share(
    qkv: Floats, keys: Floats, values: Floats, layer: int, blocks: Ints, tables: Ints, scale: np.float32, window: int,
    cap: np.float32, result: Floats, groups: Groups, parts: int, lines_most: int, outs: Floats, masses: Floats, tops: Floats,
    shares: Longs, worker: int,
) -> int:  # fmt: skip
    """What one thread does: of a block and a key/value head all segments, or with `parts` > 1 one of them, whose state goes
    to outs (tasks, parts, lines, size), masses and tops. Returns how many tasks it did."""
    kv_heads, size = keys.shape[2], keys.shape[3]
    group = qkv.shape[1] // size // kv_heads - 2
    tasks = len(blocks) * kv_heads * parts
    room, q_room = new_room(lines_most), np.empty((lines_most, size), np.float32)
    state, more = new_state(lines_most, size), new_state(lines_most, size)
    task, done = next_task(shares, worker, tasks), 0
    while task >= 0:
        place, part = task // parts, task % parts
        block, head = blocks[place // kv_heads], place % kv_heads
        lines = block[1] * group
        q = q_room[: padded(lines)]
        gather_queries(qkv, block[0], head, group, lines, scale, q)
        first, last = pages_of(block, window)
        low, high = first // SEGMENT, last // SEGMENT
        if parts > 1:
            low = low + part
            high = min(high, low)
        clear(state)
        for segment in range(low, high + 1):
            segment_of(
                q, lines, group, block[3], max(first, segment * SEGMENT), min(last, segment * SEGMENT + SEGMENT - 1), keys,
                values, layer, tables[block[2]], head, window, cap, more, room,
            )  # fmt: skip
            merge(state, more, lines)
        if parts > 1:
            copy_state(state, outs[place, part], masses[place, part], tops[place, part], lines)
        else:
            finish(state, lines, group, block[0], head, result, groups)
        task = next_task(shares, worker, tasks)
        done += 1
    return done


@inner
def copy_state(state: State, outs: Floats, masses: Floats, tops: Floats, lines: int) -> None:
    out, mass, top = state
    for i in range(lines):
        tops[i] = top[i]
        for j in range(LANES):
            masses[i, j] = mass[i, j]
        for c in range(out.shape[1]):
            outs[i, c] = out[i, c]


@inner
def merge_parts(
    blocks: Ints, place: int, kv_heads: int, group: int, window: int, outs: Floats, masses: Floats, tops: Floats,
    result: Floats, groups: Groups,
) -> None:  # fmt: skip
    """What share() does where all segments are its own: merge them from the first one on."""
    block = blocks[place // kv_heads]
    lines = block[1] * group
    state = new_state(padded(lines), outs.shape[3])
    first, last = pages_of(block, window)
    clear(state)
    for number in range(last // SEGMENT - first // SEGMENT + 1):
        merge(state, (outs[place, number], masses[place, number], tops[place, number]), lines)
    finish(state, lines, group, block[0], place % kv_heads, result, groups)


@kernel
def attend(
    qkv: Floats,            # (T, (heads + 2 kv heads) size): queries are rotated, keys and values are in the pages
    keys: Floats,           # (pages, layers, kv heads, size, page tokens)
    values: Floats,         # (pages, layers, kv heads, page tokens, size)
    layer: int,
    blocks: Ints,           # (blocks, 4): first token, queries, row, keys that the first query sees; costly ones first
    tables: Ints,           # (B, W)
    scale: np.float32,
    window: int,            # 0: all
    cap: np.float32,        # 0: none
    workers: int,
    result: Floats,         # (T, heads size)
    groups: Groups,         # of the result; prepared here if the columns of a task divide into spans
) -> None:
    kv_heads, size = keys.shape[2], keys.shape[3]
    group = qkv.shape[1] // size // kv_heads - 2
    tasks = len(blocks) * kv_heads
    segments, lines = segments_of(blocks, window), padded(queries_of(blocks) * group)
    parts = segments if tasks < ENOUGH * workers else 1
    kept = tasks if parts > 1 else 0
    outs = np.empty((kept, parts, lines, size), np.float32)
    masses = np.empty((kept, parts, lines, LANES), np.float32)
    tops = np.empty((kept, parts, lines), np.float32)
    shares = new_shares(workers)
    for worker in prange(workers):
        share(
            qkv, keys, values, layer, blocks, tables, scale, window, cap, result, groups, parts, lines, outs, masses, tops,
            shares, signed(worker),
        )  # fmt: skip
    for place in range(kept):
        merge_parts(blocks, place, kv_heads, group, window, outs, masses, tops, result, groups)
