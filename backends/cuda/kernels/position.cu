// Where a token stands: cosines and sines of a step's positions; rotated queries and keys; keys and values into their
// pages.
//
// rope.py launches these. Numbers are float32 between the load and the one rounding at the end.
#include "gpu.cuh"

constexpr int POSITION_THREADS = 256;
constexpr int PAGE_TOKENS = 32;

// rotations (T, pairs, 2): factor x (cosine, sine) of positions (T) x frequencies (pairs). The angle is float64 until it
// lies in [-pi, pi]: at position 200,000 a float32 angle would be wrong in its third decimal.
__global__ void __launch_bounds__(POSITION_THREADS)
make_rotations(const int* positions, const double* frequencies, float factor, float* rotations, int tokens, int pairs) {
    u32 i = blockIdx.x * POSITION_THREADS + threadIdx.x;             // far below 2^32
    if (i >= static_cast<u32>(tokens) * pairs) return;
    double angle = positions[i / pairs] * frequencies[i % pairs];
    angle -= 6.283185307179586476925 * rint(angle * 0.15915494309189533577);
    float sine, cosine;
    sincosf(static_cast<float>(angle), &sine, &cosine);
    store_vector(rotations + 2 * static_cast<i64>(i), float2{factor * cosine, factor * sine});
}

// Two neighbours into a page.
template <bool FP8>
__device__ __forceinline__ void store_pair(u8* page, int column, float low, float high) {
    if constexpr (FP8)
        store_vector<u16>(page + column, __nv_cvt_float2_to_fp8x2(float2{low, high}, __NV_SATFINITE, __NV_E4M3));
    else
        store_vector(page + 2 * column, pack_bf16(low, high));
}

// Each head of qkv (T, (heads + 2 kv_heads) head_size), one warp for one: plus bias (columns); queries and keys normed,
// times their norms' weights (head_size), and rotated in their first `rotary` numbers, pairs being (2i, 2i + 1) or (i, i
// + rotary / 2); queries go back to where they were, keys and values to slots (T) of `pool`, which begins with the keys
// of page 0. Null: no bias, no norm. A lane has PIECES pieces of two words, so that both numbers of a pair are its own:
// head_size <= 128 PIECES, all sizes multiples of 4.
template <int PIECES, bool INTERLEAVED, bool FP8>
__global__ void __launch_bounds__(POSITION_THREADS)
rotate_and_write(
    bf16* qkv, const float* bias, const float* query_norm, const float* key_norm, float epsilon, const float* rotations,
    const int* slots, u8* pool, i64 page_bytes, int tokens, int heads, int kv_heads, int head_size, int rotary
) {
    u32 all = heads + 2 * kv_heads, number = blockIdx.x * (POSITION_THREADS / WARP) + threadIdx.x / WARP;
    int lane = threadIdx.x % WARP, token = number / all, head = number % all;
    if (token >= tokens) return;
    bool is_query = head < heads, is_value = head >= heads + kv_heads;
    const float* norm = is_query ? query_norm : is_value ? nullptr : key_norm;
    i64 start = (static_cast<i64>(token) * all + head) * head_size;

    float x[PIECES][4];              // two neighbours, two neighbours
    int column[PIECES][2];           // where they stand
    float squares = 0.0f;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        int piece = p * WARP + lane;
        bool turns = 4 * piece < rotary && !INTERLEAVED;
        column[p][0] = turns ? 2 * piece : 4 * piece;
        column[p][1] = turns ? 2 * piece + rotary / 2 : 4 * piece + 2;
        bool there = 4 * piece < head_size;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 word = there ? load_vector<u32>(qkv + start + column[p][i]) : 0u;
            x[p][2 * i] = low_bf16(word);
            x[p][2 * i + 1] = high_bf16(word);
            if (there && bias) {
                float2 add = load_vector<float2>(bias + static_cast<i64>(head) * head_size + column[p][i]);
                x[p][2 * i] += add.x;
                x[p][2 * i + 1] += add.y;
            }
            squares += x[p][2 * i] * x[p][2 * i] + x[p][2 * i + 1] * x[p][2 * i + 1];
        }
    }
    if (norm) {
        float scale = rsqrtf(warp_sum(squares) / head_size + epsilon);
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (4 * (p * WARP + lane) < head_size) {
                    float2 weight = load_vector<float2>(norm + column[p][i]);
                    x[p][2 * i] *= scale * weight.x;
                    x[p][2 * i + 1] *= scale * weight.y;
                }
    }
    int slot = slots[token];
    u8* page = pool + slot / PAGE_TOKENS * page_bytes;
    int width = FP8 ? 1 : 2, kv_head = head - heads;                 // values' heads follow those of keys, in pages too
    page += (static_cast<i64>(kv_head) * PAGE_TOKENS + slot % PAGE_TOKENS) * head_size * width;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        int piece = p * WARP + lane;
        if (4 * piece >= head_size) continue;
        if (4 * piece < rotary && !is_value) {
            // of the pairs 2 piece and 2 piece + 1: numbers (0, 2) and (1, 3) with halves, (0, 1) and (2, 3) with
            // neighbours
            float4 turn = load_vector<float4>(rotations + static_cast<i64>(token) * rotary + 4 * piece);
            constexpr int FIRST = INTERLEAVED ? 1 : 2, SECOND = INTERLEAVED ? 2 : 1;
            float a = x[p][0], b = x[p][FIRST], c = x[p][SECOND], d = x[p][3];
            x[p][0] = a * turn.x - b * turn.y;
            x[p][FIRST] = b * turn.x + a * turn.y;
            x[p][SECOND] = c * turn.z - d * turn.w;
            x[p][3] = d * turn.z + c * turn.w;
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (is_query)
                store_vector(qkv + start + column[p][i], pack_bf16(x[p][2 * i], x[p][2 * i + 1]));
            else
                store_pair<FP8>(page, column[p][i], x[p][2 * i], x[p][2 * i + 1]);
    }
}
