// What sampling and scoring share: the exponential, ordered keys, reductions over a block, and the search for the border
// of a set.
//
// Tokens are those of backends/cpu from the same logits, bit for bit. So every product and sum that may be contracted is
// written out as one instruction, in the shape that LLVM gives the CPU's kernels, and doubles are added in the CPU's
// order.
#pragma once

#include "gpu.cuh"

constexpr int SAMPLE_THREADS = 1024;
constexpr int SAMPLE_WARPS = SAMPLE_THREADS / WARP;
constexpr int RADIX = 2048;              // bins of a round of a search, at most
constexpr u32 SIGN = 0x80000000u, EXPONENT = 0x7f800000u;
constexpr float LEAST_POWER = -87.0f, MOST_POWER = 88.0f;

// Where fields (sampling.py packs them) has what: words from its beginning.
enum Head { RECORDS, HISTORY_TOKENS, HISTORY_COUNTS, BIAS_TOKENS, BIAS_VALUES, MASKS, MASK_WORDS };

// One place, in fields: what is wanted of it.
struct Place {
    float temperature, top_p, min_p, repetition, frequency, presence;
    int top_k, position, choice, mask;                             // mask: a row of the grammar's masks, or -1
    u32 seed_low, seed_high;
    int score, top_count, place, row;                              // place: its index in the step; row: of all its logits
    int history_begin, history_end, bias_begin, bias_end;
};

// As arithmetic.py: e^x for x clamped to [-87, 88].
__device__ __forceinline__ float exponential(float x) {
    x = fminf(fmaxf(x, LEAST_POWER), MOST_POWER);
    const float rounder = 12582912.0f;
    float shifted = __fmaf_rn(x, 1.4426950408889634f, rounder);
    float n = __fsub_rn(shifted, rounder);
    float r = __fmaf_rn(n, -0.693359375f, x);
    r = __fmaf_rn(n, 2.12194440e-4f, r);
    float p = __fmaf_rn(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = __fmaf_rn(p, r, 8.3334519073e-3f);
    p = __fmaf_rn(p, r, 4.1665795894e-2f);
    p = __fmaf_rn(p, r, 1.6666665459e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    p = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
    return __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) + 127u) << 23));
}

// A key that sorts as the float does; -0 and 0 are one.
__device__ __forceinline__ u32 ordered(float value) {
    u32 bits = __float_as_uint(value);
    if (bits == SIGN) bits = 0;
    return bits & SIGN ? ~bits : bits | SIGN;
}

// The float of a key.
__device__ __forceinline__ float value_of(u32 key) { return __uint_as_float(key & SIGN ? key ^ SIGN : ~key); }

__device__ __forceinline__ bool finite(float value) { return (__float_as_uint(value) & EXPONENT) != EXPONENT; }

// The largest value wins, then the lowest id: a maximum over these finds both. BROKEN is above all finite values.
constexpr u64 BROKEN = ~0ull;
__device__ __forceinline__ u64 candidate(float value, int id) {
    return static_cast<u64>(ordered(value)) << 32 | static_cast<u32>(~id);
}
__device__ __forceinline__ int id_of(u64 best) { return static_cast<int>(~static_cast<u32>(best)); }

// The maximum over the block, the same in every thread; `slots` has SAMPLE_WARPS + 1 words.
__device__ __forceinline__ u64 block_max(u64 value, u64* slots) {
#pragma unroll
    for (int far = 16; far > 0; far >>= 1) value = max(value, __shfl_xor_sync(ALL_LANES, value, far));
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (lane == 0) slots[warp] = value;
    __syncthreads();
    if (warp == 0) {
        value = slots[lane];
#pragma unroll
        for (int far = 16; far > 0; far >>= 1) value = max(value, __shfl_xor_sync(ALL_LANES, value, far));
        if (lane == 0) slots[SAMPLE_WARPS] = value;
    }
    __syncthreads();
    return slots[SAMPLE_WARPS];
}

// The largest of x[0 .. count), and the lowest id that has it; BROKEN if one is not finite.
__device__ __forceinline__ u64 find_best(const float* x, int count, u64* slots) {
    float top = __uint_as_float(SIGN | EXPONENT);          // -inf: every finite number is larger
    u32 largest = 0;
    int id = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += SAMPLE_THREADS) {
        float value = x[i];
        largest = max(largest, __float_as_uint(value) & ~SIGN);
        if (value > top) {
            top = value;
            id = i;
        }
    }
    u64 best = largest >= EXPONENT ? BROKEN : static_cast<int>(threadIdx.x) < count ? candidate(top, id) : 0;
    return block_max(best, slots);
}

// The sum of `value` over the threads before this one; `slots` has SAMPLE_WARPS words.
__device__ __forceinline__ u32 sum_before(u32 value, u64* slots) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 sum = value;
#pragma unroll
    for (int far = 1; far < WARP; far *= 2) {
        u32 other = __shfl_up_sync(ALL_LANES, sum, far);
        if (lane >= far) sum += other;
    }
    if (lane == WARP - 1) slots[warp] = sum;
    __syncthreads();
    u32 before = 0;
    for (int w = 0; w < warp; w++) before += static_cast<u32>(slots[w]);
    __syncthreads();
    return before + sum - value;
}

// *bin += weight, as two additions that the hardware has: a compare-and-swap of 64 bits is slow where many threads meet.
// A carry goes up whenever the low half passes 2^32, whoever makes it pass.
__device__ __forceinline__ void add_to(u64* bin, u64 weight) {
    u32* half = reinterpret_cast<u32*>(bin);
    u32 low = static_cast<u32>(weight), high = static_cast<u32>(weight >> 32);
    if (low != 0) high += atomicAdd(half, low) > ~low ? 1 : 0;
    if (high != 0) atomicAdd(half + 1, high);
}
__device__ __forceinline__ void add_to(u32* bin, u32) { atomicAdd(bin, 1u); }      // weights are 1: these are counted at once

// What a search has found: the least key of the smallest set of largest values whose weights reach the target.
struct Border {
    u32 least;
    u64 above, at;         // weights of the larger keys, and of all ids that have this key
    bool reached;          // false: everything together stays below the target, and is kept
};

// weigh(i, key) -> the whole-number weight of id i and its key; weight 0: it is out already. Three rounds, each of which
// narrows the key by a histogram of its next bits. Whole numbers have no rounding: the result does not depend on who
// came first. bins: RADIX of Bin; slots: 4 words.
template <class Bin, class Weigh>
__device__ __forceinline__ Border search(Bin* bins, u64* slots, int count, u64 target, Weigh weigh) {
    Border border{0, 0, 0, true};
    int lane = threadIdx.x % WARP;
    int shift = 32;
#pragma unroll 1
    for (int round = 0; round < 3; round++) {
        int high = shift, bits = round == 2 ? 10 : 11, chunk = (1 << bits) / WARP;
        shift -= bits;
        for (int j = threadIdx.x; j < RADIX; j += SAMPLE_THREADS) bins[j] = 0;
        __syncthreads();
#pragma unroll 4
        for (int i = threadIdx.x; i < count; i += SAMPLE_THREADS) {
            u32 key;
            Bin weight = weigh(i, key);
            // keys of the round agree above bit `high`
            if (weight != 0 && (round == 0 || key >> high == border.least >> high))
                add_to(&bins[key >> shift & (1u << bits) - 1], weight);
        }
        __syncthreads();
        if (threadIdx.x < WARP) {
            Bin* mine = bins + (WARP - 1 - lane) * chunk;              // lane 0 has the largest keys
            u64 sum = 0;
            for (int j = 0; j < chunk; j++) sum += mine[(j + lane) & (chunk - 1)];
            u64 through = sum;
#pragma unroll
            for (int far = 1; far < WARP; far *= 2) {
                u64 other = __shfl_up_sync(ALL_LANES, through, far);
                if (lane >= far) through += other;
            }
            u32 crossing = __ballot_sync(ALL_LANES, border.above + through >= target);
            u32 filled = __ballot_sync(ALL_LANES, sum != 0);
            int who = crossing ? __ffs(crossing) - 1 : 31 - __clz(filled);
            if (lane == who) {
                u64 above = border.above + through - sum;
                int j = chunk - 1, last = 0;
                while (last < chunk - 1 && mine[last] == 0) last++;    // where to stop if the target is not reached
                while (j > last && above + mine[j] < target) above += mine[j--];
                slots[0] = above;
                slots[1] = mine[j];
                slots[2] = static_cast<u64>((WARP - 1 - lane) * chunk + j) << shift;
                slots[3] = crossing != 0;
            }
        }
        __syncthreads();
        border.above = slots[0];
        border.at = slots[1];
        border.least |= static_cast<u32>(slots[2]);
        border.reached = border.reached && slots[3] != 0;
        __syncthreads();
    }
    return border;
}

// The id of the `wanted`-th (from 1) of those for which is_one(i), ascending; `count` if there are fewer.
template <class IsOne>
__device__ __forceinline__ int find_nth(u64* slots, int count, u64 wanted, IsOne is_one) {
    int each = (count + SAMPLE_THREADS - 1) / SAMPLE_THREADS;
    int begin = min(count, static_cast<int>(threadIdx.x) * each), end = min(count, begin + each);
    u32 mine = 0;
    for (int i = begin; i < end; i++) mine += is_one(i) ? 1 : 0;
    u32 before = sum_before(mine, slots);
    if (threadIdx.x == 0) slots[0] = count;
    __syncthreads();
    if (before < wanted && wanted <= before + mine) {
        int i = begin;
        for (;; i++)
            if (is_one(i) && ++before == wanted) break;
        slots[0] = i;
    }
    __syncthreads();
    int found = static_cast<int>(slots[0]);
    __syncthreads();
    return found;
}
