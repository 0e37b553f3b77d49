// out = x W^T for many tokens: decode steps of many sequences, prompts, an expert's tokens. products.py launches this.
//
// A block has TOKENS tokens and ROW_WARPS x ROW_TILES x 16 rows of W. Activations come through shared memory, STAGES - 1
// stages ahead; weights go straight into registers, are decoded once and used for all tokens of the block. K_WARPS groups of
// warps take every so-many-th 256 columns each and are summed in their order: a result does not depend on timing.
#include "fragments.cuh"

constexpr int STAGES = 3;

// One stage of x in shared memory: [group][tile][token][64 columns], 16-byte chunks of odd tokens swapped in pairs, so that
// eight lanes' chunks (two tokens, four of each) lie in different banks.
__host__ __device__ constexpr int stage_bytes(int tokens, int k_warps, int stage_tiles) {
    return k_warps * stage_tiles * tokens * 128;
}

// As product_few. Grid: (token tiles, ceil(rows / (16 ROW_WARPS ROW_TILES))), 32 ROW_WARPS K_WARPS threads. RING: tiles of
// weights that a warp has under way. Shared memory: STAGES stages, or if more the sums of all groups but one; then 8 bytes a
// token.
template <class F, bool ANY_COLUMNS, int TOKENS, int ROW_WARPS, int K_WARPS, int ROW_TILES, int STAGE_TILES, int RING>
__global__ void __launch_bounds__(ROW_WARPS* K_WARPS* WARP, 2)
product_many(
    const bf16* x, i64 x_stride, const u8* blob, const u8* strip, i64 blob_bytes, i64 strip_bytes, void* out, i64 out_stride,
    int out_float, int rows, int columns, int tokens, const int* tiles, const int* source
) {
    constexpr int THREADS = ROW_WARPS * K_WARPS * WARP, PARTS = TOKENS / 8, BYTES = stage_bytes(TOKENS, K_WARPS, STAGE_TILES);
    constexpr int SUMS = (K_WARPS - 1) * ROW_WARPS * ROW_TILES * PARTS * 4 * WARP * 4;
    constexpr int OFFSETS_AT = STAGES * BYTES > SUMS ? STAGES * BYTES : SUMS;
    constexpr int RUNS = SUPER_TILES / F::STRIP_TILES;
    static_assert(SUPER_TILES % STAGE_TILES == 0 && SUPER_TILES % RING == 0 && BYTES % (16 * THREADS) == 0);
    SHARED(u8, stages, 0);
    SHARED(i64, offsets, OFFSETS_AT);      // where a token's row of x begins; -1: there is no such token

    int first = blockIdx.x * TOKENS, count = tokens - first;
    if (tiles) {
        int expert = tiles[3 * blockIdx.x];
        first = tiles[3 * blockIdx.x + 1], count = tiles[3 * blockIdx.x + 2];
        if (expert < 0 || count <= 0) return;
        blob += expert * blob_bytes, strip += expert * strip_bytes;
    }
    count = min(count, TOKENS);
    auto offset_of = [&](int i) { return i < count ? (source ? source[first + i] : first + i) * x_stride : -1; };
    for (int i = threadIdx.x; i < TOKENS; i += THREADS) offsets[i] = offset_of(i);
    __syncthreads();

    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, k_warp = warp / ROW_WARPS, row_warp = warp % ROW_WARPS;
    int g = lane / 4, t = lane % 4, all = tiles_of(columns), supers = (all + SUPER_TILES - 1) / SUPER_TILES;
    int rounds = (supers + K_WARPS - 1) / K_WARPS, steps = rounds * (SUPER_TILES / STAGE_TILES);
    int row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, row_tile = (blockIdx.y * ROW_WARPS + row_warp) * ROW_TILES;

    // This thread's chunks of a stage: the same column of each row, LINES rows apart, all of one token or all of one part.
    constexpr int LINES = THREADS / 8;
    int in_row = threadIdx.x % 8, line = threadIdx.x / 8;
    u8* mine_to_fill = stages + line * 128 + (in_row ^ (line & 1)) * 16;
    auto fetch = [&](int step) {
        if (step < steps) {
            int round = step / (SUPER_TILES / STAGE_TILES), in_super = step % (SUPER_TILES / STAGE_TILES) * STAGE_TILES;
            u8* to = mine_to_fill + step % STAGES * BYTES;
#pragma unroll
            for (int i = 0; i < BYTES / (16 * THREADS); i++) {
                int token = LINES > TOKENS ? line % TOKENS : line + i * LINES % TOKENS;
                int part = LINES > TOKENS ? line / TOKENS + i * (LINES / TOKENS) : i * LINES / TOKENS;
                int tile = (round * K_WARPS + part / STAGE_TILES) * SUPER_TILES + in_super + part % STAGE_TILES;
                int column = tile * TILE_COLUMNS + in_row * 8;
                i64 offset = offsets[token];
                bool there = offset >= 0 && column < columns;
                if constexpr (ANY_COLUMNS)
                    store_vector(to + i * LINES * 128, load_columns<true>(x + offset, column, offset < 0 ? 0 : columns));
                else
                    copy_async_16_or_zero(to + i * LINES * 128, there ? x + offset + column : x, there);
            }
        }
        copies_commit();
    };

    // a row tile past the end reads the last one's weights: nothing of it is written
    Cursor<F> here[ROW_TILES];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        here[r] = Cursor<F>(blob, strip, min(row_tile + r, row_tiles - 1), all);
        here[r].advance(k_warp);
    }
    constexpr bool AHEAD = RING > 1;       // registers for the next headers, too
    F ring[ROW_TILES][RING];
    typename F::Header headers[ROW_TILES][RUNS], next_headers[ROW_TILES][RUNS];
    float sums[ROW_TILES][PARTS][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
        for (int i = 0; i < RING; i++) here[r].read(ring[r][i], i, lane);
#pragma unroll
        for (int i = 0; i < RUNS; i++)
            if (AHEAD) here[r].read_header(next_headers[r][i], i * F::STRIP_TILES, lane);
#pragma unroll
        for (int p = 0; p < PARTS; p++)
            for (int i = 0; i < 4; i++) sums[r][p][i] = 0.0f;
    }
    for (int step = 0; step < STAGES - 1; step++) fetch(step);

    int step = 0;
    for (int round = 0; round < rounds; round++) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < RUNS; i++) {
                if (AHEAD) headers[r][i] = next_headers[r][i];
                here[r].read_header(
                    AHEAD ? next_headers[r][i] : headers[r][i], (AHEAD ? K_WARPS * SUPER_TILES : 0) + i * F::STRIP_TILES, lane
                );
            }
#pragma unroll
        for (int in = 0; in < SUPER_TILES; in++) {
            if (in % STAGE_TILES == 0) {
                copies_wait<STAGES - 2>();
                __syncthreads();
                fetch(step + STAGES - 1);
            }
            Factors factors[ROW_TILES][2];
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; i++) {
                const typename F::Header& header = headers[i / 2][in / F::STRIP_TILES];
                factors[i / 2][i % 2] = lifted_factors<F>(header.factors(in % F::STRIP_TILES, i % 2, lane));
            }
            const u8* b = stages + step % STAGES * BYTES + ((k_warp * STAGE_TILES + in % STAGE_TILES) * TOKENS + g) * 128;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 a[ROW_TILES][2][4];
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++) {
                    decode_half(ring[r][in % RING], half, factors[r], a[r]);
                    if (half == 0) continue;
                    int later = in + RING;
                    here[r].read(ring[r][in % RING], later / SUPER_TILES * K_WARPS * SUPER_TILES + later % SUPER_TILES, lane);
                }
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
                    uint4 v = load_vector<uint4>(b + p * 1024 + ((2 * t + half) ^ (g & 1)) * 16);
#pragma unroll
                    for (int r = 0; r < ROW_TILES; r++) {
                        multiply_bf16(sums[r][p], a[r][0], v.x, v.y);
                        multiply_bf16(sums[r][p], a[r][1], v.z, v.w);
                    }
                }
            }
            if ((in + 1) % STAGE_TILES == 0) step++;
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) here[r].advance(K_WARPS);
    }

    if constexpr (K_WARPS > 1) {
        SHARED(float, room, 0);            // [group - 1][warp of rows][sum][lane]
        constexpr int GROUP = ROW_WARPS * ROW_TILES * PARTS * 4 * WARP;
        float* own = room + row_warp * ROW_TILES * PARTS * 4 * WARP + lane;
        __syncthreads();
        if (k_warp > 0)
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int i = 0; i < PARTS * 4; i++)
                    own[(k_warp - 1) * GROUP + (r * PARTS * 4 + i) * WARP] = sums[r][i / 4][i % 4];
        __syncthreads();
        if (k_warp > 0) return;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
            for (int i = 0; i < PARTS * 4; i++)
                for (int k = 0; k < K_WARPS - 1; k++) sums[r][i / 4][i % 4] += own[k * GROUP + (r * PARTS * 4 + i) * WARP];
    }
    float* out_floats = static_cast<float*>(out);
    bf16* out_halves = static_cast<bf16*>(out);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int i = 0; i < PARTS * 4; i++) {
            int number = i / 4 * 8 + 2 * t + i % 2, row = (row_tile + r) * TILE_ROWS + g + i % 4 / 2 * 8;
            if (number >= count || row >= rows) continue;
            float sum = sums[r][i / 4][i % 4];
            i64 at = (first + number) * out_stride + row;
            if (out_float)
                out_floats[at] = sum;
            else
                out_halves[at] = __float2bfloat16(sum);
        }
}
