#include "block_decode.metal"
// out = x blocksᵀ for M tokens, M <= 8, from GGUF blocks as the file has them; or for each choice of an expert. Sums are float.
//
// Bytes read for each output row, whatever M is: its blocks, once. A simdgroup reads four times 256 weights of each of its ROWS
// rows at a time, eight lanes to 256, 32 weights to a lane; eight numbers of x and their sum, which the minima are multiplied
// with, serve ROWS rows. Launch: 4 simdgroups, of which PARTS share the blocks of a row and 4 / PARTS have rows of their own.
// T: numbers of x and out. KIND: as block_decode.metal has it. Only where a block is one unit may K end within the 256.
// SHARED = 0: x (M, K); blocks (N, bytes of a row); out (M, N); chosen is not read.
// SHARED > 0, M = 1: chosen (choices), blocks (E, N, bytes of a row), out (choices, N), choice c reads row c / SHARED of x.
constexpr int BYTES = rillet::Block<KIND>::BYTES, UNITS = rillet::Block<KIND>::UNITS, SETS = 4 / PARTS;
threadgroup float sums[4 * ROWS * M];
const int simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
const int axis = SHARED == 0 ? 0 : 1, rows = blocks_shape[axis], row_bytes = blocks_shape[axis + 1];
const int units = row_bytes / BYTES * UNITS, count = (units + 7) / 8;
const int set = simdgroup / PARTS, first = (int(threadgroup_position_in_grid.x) * SETS + set) * ROWS;
const int part = lane / 4 % 2, i = lane % 4 * 8, choice = threadgroup_position_in_grid.y;
size_t expert = 0, input = 0;
if (SHARED > 0) {
    expert = chosen[choice];
    input = choice / max(1, SHARED);
}
float sum[ROWS * M];
UNROLLED
for (int at = 0; at < ROWS * M; at++) sum[at] = 0.0f;
for (int number = simdgroup % PARTS * 4 + lane / 8; number < count; number += 4 * PARTS) {
    UNROLLED
    for (int round = 0; round < 4; round++) {
        const int unit = 8 * number + 4 * part + round;
        if (UNITS == 1 && unit >= units) continue;
        float codes[ROWS * 8], steps[ROWS], below[ROWS];
        UNROLLED
        for (int row = 0; row < ROWS; row++) {
            const size_t line = expert * rows + min(first + row, rows - 1);      // the last group may read a row again
            const device uint8_t* block = blocks + (line * row_bytes + size_t(unit / UNITS) * BYTES);
            const uint2 eight = rillet::Block<KIND>::codes(block, part, round, i);
            rillet::Block<KIND>::scale(block, part, round, i, steps[row], below[row]);
            UNROLLED
            for (int j = 0; j < 8; j++) codes[row * 8 + j] = rillet::code_at(eight, j);
        }
        UNROLLED
        for (int token = 0; token < M; token++) {
            const device T* from = x + ((input + token) * units + unit) * 32 + i;
            const float4 low = rillet::load4(from), high = rillet::load4(from + 4);
            const float total = low[0] + low[1] + low[2] + low[3] + high[0] + high[1] + high[2] + high[3];
            UNROLLED
            for (int row = 0; row < ROWS; row++) {
                float product = 0.0f;
                UNROLLED
                for (int j = 0; j < 4; j++) product += low[j] * codes[row * 8 + j] + high[j] * codes[row * 8 + 4 + j];
                sum[row * M + token] += steps[row] * product - below[row] * total;
            }
        }
    }
}
UNROLLED
for (int at = 0; at < ROWS * M; at++) {
    const float all = simd_sum(sum[at]);
    if (lane == 0) sums[simdgroup * ROWS * M + at] = all;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int at = thread_index_in_threadgroup; at < SETS * ROWS * M; at += 128) {
    const int mine = at / (ROWS * M), place = at % (ROWS * M);
    float total = 0.0f;
    for (int other = 0; other < PARTS; other++) total += sums[(mine * PARTS + other) * ROWS * M + place];
    const int row = (int(threadgroup_position_in_grid.x) * SETS + mine) * ROWS + place / M;
    const int line = SHARED == 0 ? place % M : choice;
    if (row < rows) out[size_t(line) * rows + row] = T(total);
}
