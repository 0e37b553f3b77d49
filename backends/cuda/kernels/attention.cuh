// What both attention kernels share: tiles of keys and values in shared memory, their fragments, the softmax along a row.
//
// A page holds 32 tokens; those of one (layer, keys or values, kv head) are neighbours. Rows of shared memory have an odd
// number of 16-byte pieces, so that the eight rows of an ldmatrix lie in different banks. E4M3 numbers become bfloat16 in
// registers: a lane then has other columns than with a bfloat16 cache, which queries (order_query) and results (Quad)
// follow.
#pragma once

#include "gpu.cuh"

constexpr int PAGE_TOKENS = 32;
#define MINUS_INFINITY __uint_as_float(0xff800000u)
constexpr float LOG2_E = 1.4426950408889634f;

template <int HEAD, bool FP8>
struct Tile {
    static_assert(HEAD % 16 == 0 && HEAD <= 256, "a multiple of 16 up to 256");
    static constexpr int STEPS = HEAD / 16;                  // products of 16 columns
    static constexpr int ROW_BYTES = HEAD * (FP8 ? 1 : 2);
    static constexpr int PIECES = ROW_BYTES / 16;
    static constexpr int STRIDE = (PIECES | 1) * 16;         // bytes from a token to the next in shared memory
};

// Rows of a page into shared memory, by THREADS threads: zeros for tokens outside of [first, end), whatever lies there.
template <class T, int TOKENS, int THREADS>
__device__ __forceinline__ void copy_tokens(u8* to, const u8* from, int token, int first, int end, int thread) {
    constexpr int COUNT = TOKENS * T::PIECES;
#pragma unroll
    for (int n = 0; n < (COUNT + THREADS - 1) / THREADS; n++) {
        int i = n * THREADS + thread;
        if (COUNT % THREADS != 0 && i >= COUNT) break;
        int row = i / T::PIECES, piece = i % T::PIECES;
        bool there = token + row >= first && token + row < end;
        copy_async_16_or_zero(to + row * T::STRIDE + piece * 16, from + i * 16, there);
    }
}

// The E4M3 numbers in bytes 1 and 3 as two bfloat16: their exponent moved into the larger one, then put right by 2^120.
__device__ __forceinline__ u32 widen_e4m3(u32 bytes) {
    u32 bits = (bytes & 0x80008000u) | ((bytes >> 4) & 0x07f007f0u);
    u32 power = 0x7b807b80u;
    __nv_bfloat162 both = __hmul2(*reinterpret_cast<__nv_bfloat162*>(&bits), *reinterpret_cast<__nv_bfloat162*>(&power));
    return *reinterpret_cast<u32*>(&both);
}

// B fragments of 16 keys for the products `step` and step + 1: b[product][8 keys][2]. An odd last product stands alone.
template <class T, bool FP8>
__device__ __forceinline__ void load_keys(u32 (&b)[2][2][2], const u8* keys, int step, int lane) {
    int matrix = lane / 8, row = lane % 8;
    u32 r[4];
    if constexpr (FP8) {
        int column = min(step + matrix / 2, T::STEPS - 1);
        load_matrix_x4(r, keys + (matrix % 2 * 8 + row) * T::STRIDE + column * 16);
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                b[k][n][0] = widen_e4m3(r[2 * k + n] << 8);
                b[k][n][1] = widen_e4m3(r[2 * k + n]);
            }
    } else {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            if (step + k >= T::STEPS) break;
            load_matrix_x4(r, keys + (matrix / 2 * 8 + row) * T::STRIDE + (step + k) * 32 + matrix % 2 * 16);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                b[k][n][0] = r[2 * n];
                b[k][n][1] = r[2 * n + 1];
            }
        }
    }
}

// B fragments of 16 tokens' values for the columns 16 step to 16 step + 31: b[16 columns][8 columns][2].
template <class T, bool FP8>
__device__ __forceinline__ void load_values(u32 (&b)[2][2][2], const u8* values, int step, int lane) {
    int matrix = lane / 8, row = lane % 8;
    u32 r[4];
    if constexpr (FP8) {
        int column = min(step + matrix / 2, T::STEPS - 1);
        load_matrix_x4_transposed(r, values + (matrix % 2 * 8 + row) * T::STRIDE + column * 16);
#pragma unroll
        for (int k = 0; k < 2; k++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                b[k][0][i] = widen_e4m3(r[2 * k + i] << 8);      // even columns
                b[k][1][i] = widen_e4m3(r[2 * k + i]);           // odd columns
            }
    } else {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            if (step + k >= T::STEPS) break;
            load_matrix_x4_transposed(r, values + (matrix % 2 * 8 + row) * T::STRIDE + (step + k) * 32 + matrix / 2 * 16);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                b[k][n][0] = r[2 * n];
                b[k][n][1] = r[2 * n + 1];
            }
        }
    }
}

// What softmax needs to know of scores: 2^(score * power) are their exponentials, after the cap if there is one.
struct Scores {
    float power, inner;              // of cap tanh(scale x / cap): inner = scale / cap; 0: no cap

    __device__ __forceinline__ Scores(float scale, float cap)
        : power((cap > 0.0f ? cap : scale) * LOG2_E), inner(cap > 0.0f ? scale / cap : 0.0f) {}

    __device__ __forceinline__ bool capped() const { return inner != 0.0f; }
    // tanh x = 1 - 2 / (e^2x + 1): its limits are right, near 0 its error is that of numbers near 1, which is far below
    // bfloat16's
    __device__ __forceinline__ float cap(float x) const {
        return 1.0f - __fdividef(2.0f, fast_exp2(x * inner * (2.0f * LOG2_E)) + 1.0f);
    }
};

// Online softmax of two rows (g and g + 8 of a product), their scores spread over the four lanes of a group. Scores become
// exponentials; `most` and this lane's share of `sum` go on; what was added up before has to be multiplied by `shrink`.
template <int TILES>
__device__ __forceinline__ void soften(
    float (&s)[TILES][4], float (&most)[2], float (&sum)[2], float (&shrink)[2], float power
) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = most[half];
#pragma unroll
        for (int n = 0; n < TILES; n++) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
        float base = top == MINUS_INFINITY ? 0.0f : top * power;     // nothing visible yet: exponentials of -inf stay 0
        shrink[half] = fast_exp2(most[half] * power - base);
        most[half] = top;
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < TILES; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& x = s[n][2 * half + i];
                x = fast_exp2(x * power - base);
                added += x;
            }
        sum[half] = sum[half] * shrink[half] + added;
    }
}

__device__ __forceinline__ float group_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// Sixteen numbers of a query as load_keys' products want them: with E4M3 keys the even ones, then the odd ones.
template <bool FP8>
__device__ __forceinline__ void order_query(u32 (&w)[8]) {
    if constexpr (FP8) {
        u32 even[4], odd[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            even[i] = __byte_perm(w[2 * i], w[2 * i + 1], 0x5410);
            odd[i] = __byte_perm(w[2 * i], w[2 * i + 1], 0x7632);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            w[i] = even[i];
            w[4 + i] = odd[i];
        }
    }
}

// Four numbers of a row's result that this lane has after load_values' products, and the columns (of 16) where they belong.
template <bool FP8>
struct Quad {
    float low[2], high[2];           // columns `at`, at + 1; and at + 2, at + 3 (E4M3) or at + 8, at + 9
    __device__ __forceinline__ Quad(const float (&a)[4], const float (&b)[4], int half, float factor) {
        low[0] = a[2 * half] * factor;
        low[1] = (FP8 ? b[2 * half] : a[2 * half + 1]) * factor;
        high[0] = (FP8 ? a[2 * half + 1] : b[2 * half]) * factor;
        high[1] = b[2 * half + 1] * factor;
    }
    static __device__ __forceinline__ int at(int t) { return FP8 ? 4 * t : 2 * t; }
    static constexpr int HIGH = FP8 ? 2 : 8;
};
