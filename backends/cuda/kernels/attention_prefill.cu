// Attention of rows with several queries, after FlashAttention-2 (Dao 2023): a block has some queries of a row and one kv
// head.
//
// attention.py launches it and makes the list of blocks. A tile's rows are (query, head) pairs, so that a page's keys and
// values are read once for all heads that share them. Scores stay in registers: exponentials are rounded to bfloat16,
// sums are float32.
#include "attention.cuh"

// attention.py has the same numbers
constexpr int PREFILL_WARPS = 4;
__device__ constexpr int prefill_parts(int head) { return head <= 128 ? 2 : 1; }        // products of 16 rows of each warp

// qkv (T, (heads + 2 kv_heads) HEAD) bf16, out (T, heads HEAD) bf16. blocks (n, 4): first token in the step, queries, row
// of the page tables, keys that the first query sees (itself included; each following query sees one more, all of them
// the last `window`). Grid (n, kv_heads * passes), a pass being as many of the group's heads as there are rows in a tile.
template <int HEAD, bool FP8>
__global__ void __launch_bounds__(PREFILL_WARPS * WARP)
attend_prefill(
    const bf16* qkv, const u8* pool, i64 page_bytes, const int* blocks, const int* page_tables, const int* table_width,
    bf16* out, int heads, int kv_heads, int window, float scale, float soft_cap
) {
    using T = Tile<HEAD, FP8>;
    constexpr int PARTS = prefill_parts(HEAD), THREADS = PREFILL_WARPS * WARP, ROWS = PREFILL_WARPS * PARTS * 16;
    constexpr int QUERY_STRIDE = (HEAD / 8 | 1) * 16, HALF = PAGE_TOKENS * T::STRIDE, STAGE = 2 * HALF;      // bytes
    constexpr int TILES = PAGE_TOKENS / 8;
    SHARED(u8, queries, 0);
    SHARED(u8, stages, ROWS * QUERY_STRIDE);

    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    int4 block = load_vector<int4>(blocks + 4 * static_cast<i64>(blockIdx.x));
    int token = block.x, query_count = block.y, seen = block.w;
    int group = heads / kv_heads, passes = (group + ROWS - 1) / ROWS;
    int kv_head = blockIdx.y / passes, pass = blockIdx.y % passes;
    int head = kv_head * group + pass * ROWS;
    int count = min(ROWS, group - pass * ROWS);                      // heads; row r: query r / count, its head r % count

    int first = max(0, seen - window), end = seen + query_count - 1; // keys that any of them sees
    int page = first / PAGE_TOKENS, end_page = (end + PAGE_TOKENS - 1) / PAGE_TOKENS;
    const int* pages = page_tables + static_cast<i64>(block.z) * *table_width;
    const u8* keys = pool + static_cast<i64>(kv_head) * PAGE_TOKENS * T::ROW_BYTES;
    i64 to_values = static_cast<i64>(kv_heads) * PAGE_TOKENS * T::ROW_BYTES;
    auto copy_page = [&](int stage, int page, int number) {
        const u8* from = keys + number * page_bytes;
        u8* to = stages + stage * STAGE;
        copy_tokens<T, PAGE_TOKENS, THREADS>(to, from, page * PAGE_TOKENS, first, end, threadIdx.x);
        copy_tokens<T, PAGE_TOKENS, THREADS>(to + HALF, from + to_values, page * PAGE_TOKENS, first, end, threadIdx.x);
        copies_commit();
    };
    copy_page(0, page, pages[page]);
    int ahead = page + 1 < end_page ? pages[page + 1] : 0;

    i64 columns = static_cast<i64>(heads + 2 * kv_heads) * HEAD;
    for (int i = threadIdx.x; i < ROWS * T::STEPS; i += THREADS) {
        int r = i / T::STEPS, k = i % T::STEPS, query = r / count;
        u32 w[8] = {};
        if (query < query_count) {
            const bf16* from = qkv + (token + query) * columns + static_cast<i64>(head + r % count) * HEAD + k * 16;
            uint4 low = load_vector<uint4>(from), high = load_vector<uint4>(from + 8);
            w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w;
            w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
        }
        order_query<FP8>(w);
        u8* to = queries + r * QUERY_STRIDE + k * 32;
        store_vector(to, uint4{w[0], w[1], w[2], w[3]});
        store_vector(to + 16, uint4{w[4], w[5], w[6], w[7]});
    }

    int position[PARTS][2];          // of this lane's rows: the last key that each sees
#pragma unroll
    for (int a = 0; a < PARTS; a++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            position[a][half] = seen - 1 + ((warp * PARTS + a) * 16 + g + 8 * half) / count;
    // row lane % 16 of this warp's first 16, columns 8 (lane / 16): the fragment that ldmatrix makes
    const u8* my_queries = queries + (warp * PARTS * 16 + lane % 16) * QUERY_STRIDE + lane / 16 * 16;

    Scores scores(scale, soft_cap);
    float o[PARTS][T::STEPS][2][4] = {}, most[PARTS][2], sum[PARTS][2];
#pragma unroll
    for (int a = 0; a < PARTS; a++) most[a][0] = most[a][1] = MINUS_INFINITY, sum[a][0] = sum[a][1] = 0.0f;

    for (int stage = 0; page < end_page; page++, stage ^= 1) {
        copies_wait<0>();
        __syncthreads();                                             // this page is there, all have left the one before
        if (page + 1 < end_page) copy_page(stage ^ 1, page + 1, ahead);
        if (page + 2 < end_page) ahead = pages[page + 2];
        const u8* page_keys = stages + stage * STAGE;

        float s[PARTS][TILES][4] = {};
#pragma unroll
        for (int k = 0; k < T::STEPS; k += 2) {
            u32 q[2][PARTS][4];
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int a = 0; a < PARTS; a++)
                    if (k + j < T::STEPS) load_matrix_x4(q[j][a], my_queries + a * 16 * QUERY_STRIDE + (k + j) * 32);
#pragma unroll
            for (int n = 0; n < TILES; n += 2) {
                u32 b[2][2][2];
                load_keys<T, FP8>(b, page_keys + n * 8 * T::STRIDE, k, lane);
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int a = 0; a < PARTS; a++)
                        if (k + j < T::STEPS) {
                            multiply_bf16(s[a][n], q[j][a], b[j][0][0], b[j][0][1]);
                            multiply_bf16(s[a][n + 1], q[j][a], b[j][1][0], b[j][1][1]);
                        }
            }
        }

        int key = page * PAGE_TOKENS;
        bool all_seen = key + PAGE_TOKENS <= seen && key > end - 1 - window;
        u32 p[PARTS][TILES][2];
#pragma unroll
        for (int a = 0; a < PARTS; a++) {
            if (scores.capped())
#pragma unroll
                for (int n = 0; n < TILES; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) s[a][n][i] = scores.cap(s[a][n][i]);
            if (!all_seen)
#pragma unroll
                for (int n = 0; n < TILES; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int back = position[a][i / 2] - (key + 8 * n + 2 * t + i % 2);       // keys before the last seen one
                        if (back < 0 || back >= window) s[a][n][i] = MINUS_INFINITY;
                    }
            float shrink[2];
            soften<TILES>(s[a], most[a], sum[a], shrink, scores.power);
            if (__any_sync(ALL_LANES, shrink[0] != 1.0f || shrink[1] != 1.0f))
#pragma unroll
                for (int k = 0; k < T::STEPS; k++)
#pragma unroll
                    for (int n = 0; n < 2; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) o[a][k][n][i] *= shrink[i / 2];
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                p[a][n][0] = pack_bf16(s[a][n][0], s[a][n][1]);
                p[a][n][1] = pack_bf16(s[a][n][2], s[a][n][3]);
            }
        }
#pragma unroll
        for (int n = 0; n < TILES; n += 2)
#pragma unroll
            for (int k = 0; k < T::STEPS; k += 2) {
                u32 b[2][2][2];
                load_values<T, FP8>(b, page_keys + HALF + n * 8 * T::STRIDE, k, lane);
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int a = 0; a < PARTS; a++)
                        if (k + j < T::STEPS) {
                            u32 rows[4] = {p[a][n][0], p[a][n][1], p[a][n + 1][0], p[a][n + 1][1]};
                            multiply_bf16(o[a][k + j][0], rows, b[j][0][0], b[j][0][1]);
                            multiply_bf16(o[a][k + j][1], rows, b[j][1][0], b[j][1][1]);
                        }
            }
    }

#pragma unroll
    for (int a = 0; a < PARTS; a++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float factor = 1.0f / group_sum(sum[a][half]);
            int r = (warp * PARTS + a) * 16 + g + 8 * half, query = r / count;
            if (query >= query_count) continue;
            bf16* to = out + ((token + query) * static_cast<i64>(heads) + head + r % count) * HEAD + Quad<FP8>::at(t);
#pragma unroll
            for (int k = 0; k < T::STEPS; k++) {
                Quad<FP8> quad(o[a][k][0], o[a][k][1], half, factor);
                store_vector(to + k * 16, pack_bf16(quad.low[0], quad.low[1]));
                store_vector(to + k * 16 + Quad<FP8>::HIGH, pack_bf16(quad.high[0], quad.high[1]));
            }
        }
}
