// Logprobs of the raw model: of a place's token, and of the most probable alternatives. sampling.py launches it.
//
// One block per place. The sums have one order; alternatives are found by the search that top-k uses, and only those are
// sorted.
#include "sampling.cuh"

constexpr int MOST_ALTERNATIVES = 128;
constexpr int PARTS_AT = RADIX * 4, SLOTS_AT = PARTS_AT + (SAMPLE_WARPS + 2) * 8;
constexpr int FOUND_AT = SLOTS_AT + (SAMPLE_WARPS + 2) * 8;
constexpr int SCORE_BYTES = FOUND_AT + MOST_ALTERNATIVES * 8 + 16;

// log of the sum of e^(x - top), the same in every thread; parts: SAMPLE_WARPS + 1.
__device__ __forceinline__ double log_sum(const float* x, int count, float top, double* parts) {
    double sum = 0.0;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += SAMPLE_THREADS) sum += static_cast<double>(exponential(x[i] - top));
#pragma unroll
    for (int far = 16; far > 0; far >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, far);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (int w = 0; w < SAMPLE_WARPS; w++) total += parts[w];
        parts[SAMPLE_WARPS] = log(total);
    }
    __syncthreads();
    return parts[SAMPLE_WARPS];
}

// logits (rows, V); logprobs (S,), top_ids and top_logprobs (S, width): results; drawn (S,): tokens of `sample`. For the
// records first .. first + gridDim.x, whose rows begin at first_row.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
score(const float* logits, const u32* fields, const int* drawn, float* logprobs, int* top_ids, float* top_logprobs,
      int vocabulary, int width, int first, int first_row) {
    SHARED(u32, bins, 0);
    SHARED(double, parts, PARTS_AT);
    SHARED(u64, slots, SLOTS_AT);
    SHARED(u64, found, FOUND_AT);
    SHARED(int, filled, FOUND_AT + MOST_ALTERNATIVES * 8);
    const Place place = reinterpret_cast<const Place*>(fields + fields[RECORDS])[first + blockIdx.x];
    const float* x = logits + static_cast<i64>(place.row - first_row) * vocabulary;
    int* ids = top_ids + static_cast<i64>(place.place) * width;
    float* values = top_logprobs + static_cast<i64>(place.place) * width;
    int wanted = min(place.top_count, min(vocabulary, width));
    for (int j = max(0, wanted) + threadIdx.x; j < width; j += SAMPLE_THREADS) {
        ids[j] = -1;
        values[j] = __uint_as_float(0xff800000u);
    }
    if (wanted < 0) {
        if (threadIdx.x == 0) logprobs[place.place] = __uint_as_float(0x7fc00000u);
        return;
    }
    u64 best = find_best(x, vocabulary, slots);
    float top = best == BROKEN ? 0.0f : x[id_of(best)];           // a broken place fails the step: here it only must not hang
    double floor = static_cast<double>(top) + log_sum(x, vocabulary, top, parts);
    if (threadIdx.x == 0) {
        int token = place.score >= 0 ? place.score : drawn[place.place];
        logprobs[place.place] = static_cast<float>(static_cast<double>(x[token]) - floor);
        *filled = 0;
    }
    if (wanted <= 0) return;
    Border border = search(bins, slots, vocabulary, wanted, [&](int i, u32& key) -> u32 {
        key = ordered(x[i]);
        return 1;
    });
    u64 ties = wanted - border.above;
    int last = vocabulary;
    if (border.at > ties) last = find_nth(slots, vocabulary, ties, [&](int i) { return ordered(x[i]) == border.least; });
    for (int i = threadIdx.x; i < vocabulary; i += SAMPLE_THREADS) {
        u32 key = ordered(x[i]);
        if (key > border.least || (key == border.least && i <= last))
            found[atomicAdd(filled, 1)] = candidate(x[i], i);
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < wanted) {                  // its rank among them: all differ, whatever their order is
        u64 mine = found[threadIdx.x];
        int rank = 0;
        for (int j = 0; j < wanted; j++) rank += found[j] > mine ? 1 : 0;
        ids[rank] = id_of(mine);
        values[rank] = static_cast<float>(static_cast<double>(x[id_of(mine)]) - floor);
    }
}
