// Attention of rows with one query: one block for a row, up to 16 heads of one kv head, and a share of the context.
//
// attention.py launches it. The heads are the 16 rows of a product, so that keys and values are read once for all of
// them. Each warp takes every WARPS-th tile of 16 tokens through stages of its own: the block meets only at the end. With
// more than one split, the block that comes last adds up what the others left, in the order of the splits: the sum has
// one order.
#include "attention.cuh"

constexpr int TOKENS = 16;           // of a tile
constexpr int TILES_OF_PAGE = PAGE_TOKENS / TOKENS;
constexpr int HEAD_ROWS = 16;
constexpr int LEAST_PAGES = 2;       // of a split: a tile for every warp
constexpr int MOST_SPLITS = 64;

// attention.py has the same rules: as many stages as fit in 72 KB, so that a multiprocessor of an H100 has three blocks
__device__ constexpr int decode_warps(int head) { return head <= 128 ? 4 : 2; }
__device__ constexpr int decode_stages(int bytes) { return bytes * 6 <= 73728 ? 6 : bytes * 3 > 73728 ? 2 : 73728 / bytes; }

// qkv (T, (heads + 2 kv_heads) HEAD) bf16, out (T, heads HEAD) bf16. Row b's query is the token row_starts[b]; it sees
// the last `window` of kv_lengths[b] tokens. `pool`: keys of page 0, kv head 0 of the layer. Grid (rows, kv_heads *
// passes of 16 heads, splits). Only with splits: partials (rows, heads, splits, HEAD), then (rows, heads, splits, 2):
// maxima in powers of two and sums of exponentials; counters (rows, grid.y), zero before and after.
template <int HEAD, bool FP8>
__global__ void __launch_bounds__(decode_warps(HEAD) * WARP)
attend_decode(
    const bf16* qkv, const u8* pool, i64 page_bytes, const int* row_starts, const int* kv_lengths, const int* page_tables,
    const int* table_width, bf16* out, float* partials, u32* counters, int heads, int kv_heads, int window, float scale,
    float soft_cap
) {
    using T = Tile<HEAD, FP8>;
    constexpr int WARPS = decode_warps(HEAD), THREADS = WARPS * WARP;
    constexpr int HALF = TOKENS * T::STRIDE, STAGE = 2 * HALF;       // bytes: keys, values
    constexpr int STAGES = decode_stages(WARPS * STAGE);
    SHARED(u8, memory, 0);

    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    int row = blockIdx.x, split = blockIdx.z, splits = gridDim.z;
    int group = heads / kv_heads, passes = (group + HEAD_ROWS - 1) / HEAD_ROWS;
    int kv_head = blockIdx.y / passes, pass = blockIdx.y % passes;
    int head = kv_head * group + pass * HEAD_ROWS;
    int count = min(HEAD_ROWS, group - pass * HEAD_ROWS);

    // this split's pages, those before the window left out
    int length = kv_lengths[row], first = max(0, length - window);
    int first_page = first / PAGE_TOKENS, end_page = (length + PAGE_TOKENS - 1) / PAGE_TOKENS;
    int share = max(LEAST_PAGES, (end_page - first_page + splits - 1) / splits);
    int begin = first_page + split * share, end = min(begin + share, end_page);
    int end_tile = min(end * TILES_OF_PAGE, (length + TOKENS - 1) / TOKENS);
    int tile = max(begin * TILES_OF_PAGE, first / TOKENS) + warp;

    const int* pages = page_tables + static_cast<i64>(row) * *table_width;
    const u8* keys = pool + static_cast<i64>(kv_head) * PAGE_TOKENS * T::ROW_BYTES;
    i64 to_values = static_cast<i64>(kv_heads) * PAGE_TOKENS * T::ROW_BYTES;
    u8* stages = memory + warp * STAGES * STAGE;

    auto page_of = [&](int tile) { return tile < end_tile ? pages[tile / TILES_OF_PAGE] : 0; };
    auto copy_tile = [&](int stage, int tile, int page) {
        if (tile < end_tile) {
            const u8* from = keys + page * page_bytes + tile % TILES_OF_PAGE * (TOKENS * T::ROW_BYTES);
            u8* to = stages + stage * STAGE;
            copy_tokens<T, TOKENS, WARP>(to, from, tile * TOKENS, first, length, lane);
            copy_tokens<T, TOKENS, WARP>(to + HALF, from + to_values, tile * TOKENS, first, length, lane);
        }
        copies_commit();
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) copy_tile(s, tile + s * WARPS, page_of(tile + s * WARPS));
    int ahead = tile + (STAGES - 1) * WARPS;                         // the next tile to copy, and its page
    int page_ahead = page_of(ahead);

    // queries straight into fragments, rows without a head being zeros; those of large heads are kept in shared memory
    constexpr bool KEPT = HEAD > 128;
    u8* kept = memory + WARPS * STAGES * STAGE + lane * 16;
    u32 q[KEPT ? 1 : T::STEPS][4];
    i64 columns = static_cast<i64>(heads + 2 * kv_heads) * HEAD;
    const bf16* query = qkv + row_starts[row] * columns + static_cast<i64>(head) * HEAD;
#pragma unroll
    for (int k = 0; k < T::STEPS; k++) {
        u32 (&to)[4] = q[KEPT ? 0 : k];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const bf16* from = query + (g + 8 * half) * HEAD + k * 16;
            bool there = g + 8 * half < count;
            u32 low = there ? load_vector<u32>(from + Quad<FP8>::at(t)) : 0u;
            u32 high = there ? load_vector<u32>(from + Quad<FP8>::at(t) + Quad<FP8>::HIGH) : 0u;
            to[half] = FP8 ? __byte_perm(low, high, 0x5410) : low;
            to[2 + half] = FP8 ? __byte_perm(low, high, 0x7632) : high;
        }
        if (KEPT && k % WARPS == warp) store_vector(kept + k * WARP * 16, uint4{to[0], to[1], to[2], to[3]});
    }
    if (KEPT) __syncthreads();

    Scores scores(scale, soft_cap);
    float o[T::STEPS][2][4] = {}, most[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {};
    for (int stage = 0; tile < end_tile; tile += WARPS) {
        copies_wait<STAGES - 2>();
        __syncwarp();                                                // the tile is there, all have left the stage before
        copy_tile(stage == 0 ? STAGES - 1 : stage - 1, ahead, page_ahead);
        ahead += WARPS;
        page_ahead = page_of(ahead);
        const u8* tile_keys = stages + stage * STAGE;
        stage = stage == STAGES - 1 ? 0 : stage + 1;

        float s[2][4] = {};
#pragma unroll
        for (int k = 0; k < T::STEPS; k += 2) {
            u32 b[2][2][2];
            load_keys<T, FP8>(b, tile_keys, k, lane);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (k + j >= T::STEPS) break;
                u32 (&a)[4] = q[KEPT ? 0 : k + j];
                if constexpr (KEPT) {
                    uint4 found = load_vector<uint4>(kept + (k + j) * WARP * 16);
                    a[0] = found.x, a[1] = found.y, a[2] = found.z, a[3] = found.w;
                }
                multiply_bf16(s[0], a, b[j][0][0], b[j][0][1]);
                multiply_bf16(s[1], a, b[j][1][0], b[j][1][1]);
            }
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int token = tile * TOKENS + 8 * n + 2 * t + i % 2;
                if (scores.capped()) s[n][i] = scores.cap(s[n][i]);
                if (token < first || token >= length) s[n][i] = MINUS_INFINITY;
            }
        float shrink[2];
        soften<2>(s, most, sum, shrink, scores.power);
        u32 p[4];
#pragma unroll
        for (int i = 0; i < 4; i++) p[i] = pack_bf16(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int k = 0; k < T::STEPS; k += 2) {
            u32 b[2][2][2];
            load_values<T, FP8>(b, tile_keys + HALF, k, lane);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (k + j >= T::STEPS) break;
#pragma unroll
                for (int n = 0; n < 2; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) o[k + j][n][i] *= shrink[i / 2];
                    multiply_bf16(o[k + j][n], p, b[j][n][0], b[j][n][1]);
                }
            }
        }
    }

    // the warps' shares: (WARPS, 16, HEAD) sums, (WARPS, 16) maxima in powers of two, (WARPS, 16) sums of exponentials
    __syncthreads();
    float* shares = reinterpret_cast<float*>(memory);
    float* maxima = shares + WARPS * HEAD_ROWS * HEAD;
    float* sums = maxima + WARPS * HEAD_ROWS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int r = warp * HEAD_ROWS + g + 8 * half;
        float total = group_sum(sum[half]);
        if (t == 0) {
            maxima[r] = most[half] == MINUS_INFINITY ? MINUS_INFINITY : most[half] * scores.power;
            sums[r] = total;
        }
        if (g + 8 * half < count)
#pragma unroll
            for (int k = 0; k < T::STEPS; k++) {
                Quad<FP8> quad(o[k][0], o[k][1], half, 1.0f);
                float* to = shares + r * HEAD + k * 16 + Quad<FP8>::at(t);
                store_vector(to, float2{quad.low[0], quad.low[1]});
                store_vector(to + Quad<FP8>::HIGH, float2{quad.high[0], quad.high[1]});
            }
    }
    __syncthreads();
    i64 place = static_cast<i64>(row) * heads + head;                // of `partials`, in units of `splits`
    i64 all = static_cast<i64>(gridDim.x) * heads * splits;
    bf16* result = out + row_starts[row] * (static_cast<i64>(heads) * HEAD) + static_cast<i64>(head) * HEAD;
    for (int i = threadIdx.x; i < count * HEAD / 4; i += THREADS) {
        int r = i / (HEAD / 4), column = i % (HEAD / 4) * 4;
        float top = maxima[r];
#pragma unroll
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, maxima[w * HEAD_ROWS + r]);
        float4 value = {0.0f, 0.0f, 0.0f, 0.0f};
        float total = 0.0f;
        if (top != MINUS_INFINITY)
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                float factor = fast_exp2(maxima[w * HEAD_ROWS + r] - top);
                float4 part = load_vector<float4>(shares + (w * HEAD_ROWS + r) * HEAD + column);
                value.x += factor * part.x;
                value.y += factor * part.y;
                value.z += factor * part.z;
                value.w += factor * part.w;
                total += factor * sums[w * HEAD_ROWS + r];
            }
        if (splits == 1) {
            float by = 1.0f / total;
            uint2 words = {pack_bf16(value.x * by, value.y * by), pack_bf16(value.z * by, value.w * by)};
            store_vector(result + r * HEAD + column, words);
        } else {
            i64 at = (place + r) * splits + split;
            if (top != MINUS_INFINITY) store_vector(partials + at * HEAD + column, value);
            if (column == 0) store_vector(partials + all * HEAD + 2 * at, float2{top, total});
        }
    }
    if (splits == 1) return;

    // the last block of this row and these heads adds the splits up
    __threadfence();
    __syncthreads();
    u32* ticket = reinterpret_cast<u32*>(memory);
    if (threadIdx.x == 0) *ticket = atomicInc(counters + static_cast<i64>(row) * gridDim.y + blockIdx.y, splits - 1);
    __syncthreads();
    u32 before = *ticket;
    if (before != splits - 1) return;
    __threadfence();
    __syncthreads();
    float* weights = reinterpret_cast<float*>(memory);               // (16, MOST_SPLITS)
    for (int r = warp; r < count; r += WARPS) {
        const float* from = partials + all * HEAD + 2 * (place + r) * splits;
        float2 a = {MINUS_INFINITY, 0.0f}, b = a;
        if (lane < splits) a = __ldcg(reinterpret_cast<const float2*>(from) + lane);
        if (lane + WARP < splits) b = __ldcg(reinterpret_cast<const float2*>(from) + lane + WARP);
        float top = warp_max(fmaxf(a.x, b.x));
        float low = fast_exp2(a.x - top), high = fast_exp2(b.x - top);
        float factor = 1.0f / warp_sum(low * a.y + high * b.y);
        weights[r * MOST_SPLITS + lane] = low * factor;
        weights[r * MOST_SPLITS + WARP + lane] = high * factor;
    }
    __syncthreads();                // weights are there
    for (int i = threadIdx.x; i < count * HEAD / 4; i += THREADS) {
        int r = i / (HEAD / 4), column = i % (HEAD / 4) * 4;
        const float* from = partials + (place + r) * splits * HEAD + column;
        float4 value = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
        for (int s = 0; s < splits; s++) {
            float factor = weights[r * MOST_SPLITS + s];
            float4 part = {0.0f, 0.0f, 0.0f, 0.0f};
            if (factor != 0.0f)                                      // else it may never have been written
                part = __ldcg(reinterpret_cast<const float4*>(from + static_cast<i64>(s) * HEAD));
            value.x += factor * part.x;
            value.y += factor * part.y;
            value.z += factor * part.z;
            value.w += factor * part.w;
        }
        store_vector(result + r * HEAD + column, uint2{pack_bf16(value.x, value.y), pack_bf16(value.z, value.w)});
    }
}
