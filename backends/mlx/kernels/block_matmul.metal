#include "block_decode.metal"
// out = x blocksᵀ for many tokens, from GGUF blocks as the file has them; or by expert for choices sorted by it. Sums are float.
//
// A threadgroup makes ROWS rows of TOKENS tokens; each of its ROWS / 16 simdgroups has 16 rows as 8 x 8 products. For every 32
// of K it lays the dequantized weights (turned: a product reads two neighbouring rows at once) and the numbers of x into
// threadgroup memory as T: two barriers, one before and one after. Rows and tokens behind the last are read as the last one
// and never written. T: numbers of x and out. KIND: as block_decode.metal has it.
// SHARED = 0: x (M, K); blocks (N, bytes of a row); out (M, N); order and starts are not read.
// SHARED > 0: order (choices) has the choices in order of their experts, expert e those from starts[e] to starts[e + 1]; blocks
// (E, N, bytes of a row); out (choices, N); choice c reads row c / SHARED of x.
constexpr int BYTES = rillet::Block<KIND>::BYTES, UNITS = rillet::Block<KIND>::UNITS, THREADS = 2 * ROWS, K_STEP = 32, TILES = TOKENS / 8;
constexpr int W_STRIDE = ROWS + 8, X_STRIDE = K_STEP + 8;
threadgroup T weight_tile[K_STEP * W_STRIDE];
threadgroup T x_tile[TOKENS * X_STRIDE];
const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
const int thread_number = thread_index_in_threadgroup, axis = SHARED == 0 ? 0 : 1;
const int rows = blocks_shape[axis], row_bytes = blocks_shape[axis + 1], units = row_bytes / BYTES * UNITS;
const int tile = threadgroup_position_in_grid.x;
const int first_row = int(threadgroup_position_in_grid.y) * ROWS;

// Expert e has the token tiles from starts[e] / TOKENS + e on; those that it does not need end here.
int expert = 0, first = tile * TOKENS, behind = x_shape[0];
if (SHARED > 0) {
    int last = blocks_shape[0];
    while (last - expert > 1) {
        const int middle = (expert + last) / 2;
        if (starts[middle] / TOKENS + middle <= tile) expert = middle;
        else last = middle;
    }
    first = starts[expert] + (tile - starts[expert] / TOKENS - expert) * TOKENS;
    behind = starts[expert + 1];
}
if (first >= behind) return;

// A thread dequantizes half a step of one row. Neighbours have neighbouring rows, and write next to each other.
const int my_row = thread_number % ROWS, my_half = thread_number / ROWS;
const size_t line = size_t(expert) * rows + min(first_row + my_row, rows - 1);
const device uint8_t* row_blocks = blocks + line * row_bytes;
const int matrix_row = rillet::matrix_row(lane), matrix_column = rillet::matrix_column(lane);
float2 sum[2 * TILES];
UNROLLED
for (int at = 0; at < 2 * TILES; at++) sum[at] = float2(0.0f);
for (int step = 0; step < units; step++) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const device uint8_t* block = row_blocks + size_t(step / UNITS) * BYTES;
    const int part = step / 4 % 2, round = step % 4;
    float scale, below;
    rillet::Block<KIND>::scale(block, part, round, my_half * 16, scale, below);
    for (int eight = 0; eight < 2; eight++) {
        const int i = my_half * 16 + eight * 8;
        const uint2 codes = rillet::Block<KIND>::codes(block, part, round, i);
        for (int j = 0; j < 8; j++) weight_tile[(i + j) * W_STRIDE + my_row] = T(scale * rillet::code_at(codes, j) - below);
    }
    for (int at = thread_number; at < TOKENS * 4; at += THREADS) {
        const int place = min(first + at / 4, behind - 1), i = at % 4 * 8;
        int from = place;
        if (SHARED > 0) from = int(order[place]) / max(1, SHARED);
        const device T* numbers = x + (size_t(from) * units + step) * K_STEP + i;
        for (int j = 0; j < 8; j += 4)
            *reinterpret_cast<threadgroup vec<T, 4>*>(x_tile + at / 4 * X_STRIDE + i + j) =
                *reinterpret_cast<const device vec<T, 4>*>(numbers + j);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int k = 0; k < K_STEP; k += 8) {
        float2 weights[2];
        UNROLLED
        for (int j = 0; j < 2; j++) {
            const threadgroup T* two = weight_tile + (k + matrix_row) * W_STRIDE + simdgroup * 16 + j * 8 + matrix_column;
            weights[j] = float2(float(two[0]), float(two[1]));
        }
        UNROLLED
        for (int t = 0; t < TILES; t++) {
            if (first + t * 8 >= behind) continue;
            const threadgroup T* two = x_tile + (t * 8 + matrix_row) * X_STRIDE + k + matrix_column;
            const float2 numbers = float2(float(two[0]), float(two[1]));
            UNROLLED
            for (int j = 0; j < 2; j++) sum[t * 2 + j] = rillet::multiply_add(numbers, weights[j], sum[t * 2 + j]);
        }
    }
}
UNROLLED
for (int t = 0; t < TILES; t++) {
    const int place = first + t * 8 + matrix_row;
    if (place >= behind) continue;
    int to = place;
    if (SHARED > 0) to = int(order[place]);
    UNROLLED
    for (int j = 0; j < 4; j++) {
        const int row = first_row + simdgroup * 16 + j / 2 * 8 + matrix_column + j % 2;
        if (row < rows) out[size_t(to) * rows + row] = T(sum[t * 2 + j / 2][j % 2]);
    }
}
