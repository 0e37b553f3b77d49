// Draws tokens from logits: penalties, bias, grammar, temperature, top-k, top-p, min-p, draw. sampling.py launches it.
//
// One block works on one place after another, alone: the same tokens as backends/cpu/kernels/sampling.py, whatever the
// company. A set is cut by counting (top-k) or by summing whole numbers (top-p) in a radix search over ordered keys;
// nothing is sorted. Masses are added as doubles in spans of 512 ids, span after span, because that is the order of the
// CPU's sums.
#include "sampling.cuh"

constexpr int SPAN = 512, MOST_SPANS = 512;
constexpr float FORBIDDEN = -1e30f;
enum Status { FINE, NOT_FINITE, NOTHING_ALLOWED };

// The block's shared memory. Bins are u64, u32 or double, one after the other.
struct Room {
    u64* bins;             // RADIX
    double* spans;         // MOST_SPANS, and behind them the total
    float* staged;         // SPAN
    u64* slots;            // SAMPLE_WARPS + 1
};
constexpr int SPANS_AT = RADIX * 8, STAGED_AT = SPANS_AT + (MOST_SPANS + 2) * 8, SLOTS_AT = STAGED_AT + SPAN * 4;
constexpr int ROOM_BYTES = SLOTS_AT + (SAMPLE_WARPS + 2) * 8;

// A place's settings where they are needed by all of its passes, and its numbers: x as they are drawn from, mass = e^(z).
struct Row {
    const float* x;        // (V,)
    float* mass;           // (stride,) zeros from V on
    int vocabulary, stride;
    float top, cold;       // the largest x, and 1 / temperature
    __device__ __forceinline__ float heat(float logit) const { return __fmul_rn(__fsub_rn(logit, top), cold); }     // z
};

// A multiple of 2^-24 in [0, 1): Philox4x32-10 of the counter (position, choice, 0, 0).
__device__ __forceinline__ double uniform(const Place& place) {
    u32 a = place.position, b = place.choice, c = 0, d = 0, k = place.seed_low, m = place.seed_high;
    for (int round = 0; round < 10; round++) {
        u32 high_0 = __umulhi(0xD2511F53u, a), low_0 = 0xD2511F53u * a;
        u32 high_1 = __umulhi(0xCD9E8D57u, c), low_1 = 0xCD9E8D57u * c;
        a = high_1 ^ b ^ k, b = low_1, c = high_0 ^ d ^ m, d = low_0;
        k += 0x9E3779B9u, m += 0xBB67AE85u;
    }
    return static_cast<double>(a >> 8) * (1.0 / 16777216.0);
}

// x = the raw logits, penalised and biased; false if a raw one is not finite.
__device__ __forceinline__ bool modify(
    const float* raw, float* x, int count, const Place& place, const u32* fields, u64* slots) {
    u64 bad = 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += SAMPLE_THREADS) {
        float value = raw[i];
        bad |= finite(value) ? 0 : 1;
        x[i] = value;
    }
    bad = block_max(bad, slots);                      // its barriers also end the copy
    const int* tokens = reinterpret_cast<const int*>(fields + fields[HISTORY_TOKENS]);
    const u32* counts = fields + fields[HISTORY_COUNTS];
    for (int e = place.history_begin + threadIdx.x; e < place.history_end; e += SAMPLE_THREADS) {
        u32 count = counts[e] >> 1, in_prompt = counts[e] & 1;
        if (count == 0 && in_prompt == 0) continue;   // an entry that resolve.cu added to another one of its token
        float* at = x + tokens[e];
        float value = *at > 0.0f ? __fdiv_rn(*at, place.repetition) : __fmul_rn(*at, place.repetition);
        if (count > 0) value = __fsub_rn(value, __fmaf_rn(place.frequency, static_cast<float>(count), place.presence));
        *at = value;
    }
    __syncthreads();
    const int* biased = reinterpret_cast<const int*>(fields + fields[BIAS_TOKENS]);
    const float* values = reinterpret_cast<const float*>(fields + fields[BIAS_VALUES]);
    for (int e = place.bias_begin + threadIdx.x; e < place.bias_end; e += SAMPLE_THREADS)
        x[biased[e]] = __fadd_rn(x[biased[e]], values[e]);      // no token stands twice in a place's bias
    __syncthreads();
    return bad == 0;
}

// Forbid what the grammar does not allow; false if that is everything.
__device__ __forceinline__ bool apply_mask(float* x, int count, const u32* mask, u64* slots) {
    u64 allowed = 0;
    for (int i = threadIdx.x; i < count; i += SAMPLE_THREADS) {
        if (mask[i >> 5] >> (i & 31) & 1) allowed = 1;
        else x[i] = FORBIDDEN;
    }
    return block_max(allowed, slots) != 0;            // its barriers also end the writing
}

// Sums of the spans, each by one thread in ascending id, and their total by another one: both in the CPU's order.
__device__ __forceinline__ double total_mass(const Row& row, const Room& room) {
    int spans = row.stride / SPAN;
    for (int n = threadIdx.x; n < spans; n += SAMPLE_THREADS) {
        const float* from = row.mass + n * SPAN;
        double total = 0.0;
#pragma unroll 1
        for (int i = 0; i < SPAN; i += 16) {
            float4 part[4];
#pragma unroll
            for (int k = 0; k < 4; k++) part[k] = load_vector<float4>(from + i + 4 * k);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                total = __dadd_rn(total, part[k].x);
                total = __dadd_rn(total, part[k].y);
                total = __dadd_rn(total, part[k].z);
                total = __dadd_rn(total, part[k].w);
            }
        }
        room.spans[n] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
#pragma unroll 8
        for (int n = 0; n < spans; n++) total = __dadd_rn(total, room.spans[n]);
        room.spans[MOST_SPANS] = total;
    }
    __syncthreads();
    return room.spans[MOST_SPANS];
}

// Where a set ends: keys above `least` are in it, and ids up to `last` that have this very key.
struct Kept {
    u32 least;
    int last;
    __device__ __forceinline__ bool has(u32 key, int id) const { return key > least || (key == least && id <= last); }
};

// The top_k largest of those whose mass is not 0, by counting.
__device__ __forceinline__ Kept cut_by_count(const Row& row, const Room& room, u32 wanted) {
    u32* bins = reinterpret_cast<u32*>(room.bins);
    Border border = search(bins, room.slots, row.vocabulary, wanted, [&](int i, u32& key) -> u32 {
        key = ordered(row.x[i]);
        return row.heat(row.x[i]) >= LEAST_POWER;
    });
    u64 ties = wanted - border.above;
    if (border.at <= ties) return {border.least, row.vocabulary};
    return {border.least, find_nth(room.slots, row.vocabulary, ties, [&](int i) {
        return ordered(row.x[i]) == border.least;
    })};
}

// The CPU's own loop, by one thread: for where its rounding may matter.
__device__ __noinline__ void cut_slowly(const Row row, double* bins, double target, u64* slots) {
    u32 prefix = 0;
    int shift = 32;
    double above = 0.0;
    for (int round = 0; round < 3; round++) {
        int high = shift, bits = round == 2 ? 10 : 11, count = 1 << bits;
        shift -= bits;
        for (int j = 0; j < count; j++) bins[j] = 0.0;
        for (int i = 0; i < row.vocabulary; i++)
            if (row.mass[i] > 0.0f) {
                u32 key = ordered(row.x[i]);
                double& bin = bins[key >> shift & count - 1];
                if (round == 0 || key >> high == prefix >> high) bin = __dadd_rn(bin, row.mass[i]);
            }
        int j = count - 1;
        while (j > 0 && __dadd_rn(above, bins[j]) < target) above = __dadd_rn(above, bins[j--]);
        while (j < count - 1 && bins[j] == 0.0) above = __dsub_rn(above, bins[++j]);
        prefix |= static_cast<u32>(j) << shift;
    }
    double unit = 1.0;
    for (int i = 0; i < row.vocabulary; i++)
        if (row.mass[i] > 0.0f && ordered(row.x[i]) == prefix) {
            unit = row.mass[i];
            break;
        }
    double ties = ceil(__ddiv_rn(__dsub_rn(target, above), unit));
    slots[0] = prefix;
    slots[1] = ties < 1.0 ? 1 : static_cast<u64>(min(ties, 4294967295.0));
}

// The smallest set of the largest whose mass reaches top_p of the total.
//
// The CPU adds doubles in ascending id within a bin. Where all masses that count are multiples of one power of two, and
// their sum is below 2^53 of it, no addition rounds: then whole numbers in any order give the CPU's sums. Masses below
// `little` cannot be in the set, since all of them together do not bring the rest below the target; a search that leaves
// them out has few to count.
__device__ __forceinline__ Kept cut_by_mass(const Row& row, const Room& room, float top_p) {
    double total = total_mass(row, room);
    double target = __dmul_rn(static_cast<double>(top_p), total);
    float little = static_cast<float>((1.0 - static_cast<double>(top_p)) * total * 0.2 / row.vocabulary);
    int scale = 61;                                                    // masses in units of 2^-scale: their sum is below 2^62
    for (double bound = 2.0; bound <= total; bound += bound) scale--;
    float factor = __uint_as_float(static_cast<u32>(127 + scale) << 23);
    u64 goal = static_cast<u64>(ceil(target * static_cast<double>(factor)));
    Border border = search(room.bins, room.slots, row.vocabulary, goal, [&](int i, u32& key) -> u64 {
        float mass = row.mass[i];
        if (mass <= little) return 0;
        key = ordered(row.x[i]);
        return static_cast<u64>(mass * factor);
    });
    float unit = exponential(row.heat(value_of(border.least)));            // equal logits have equal masses
    // larger logits may have masses a rounding smaller: multiples of half a unit's last bit
    int spare = static_cast<int>(__float_as_uint(unit) >> 23) - 127 - 24 + scale;
    u64 sum = border.above + border.at;
    bool exact = border.reached && unit > 1.5f * little && spare >= 0 && (spare >= 10 || sum >> (53 + spare) == 0);
    u64 ties, there;
    if (exact) {
        double above = static_cast<double>(border.above) / static_cast<double>(factor);
        double whole = ceil(__ddiv_rn(__dsub_rn(target, above), static_cast<double>(unit)));
        ties = whole < 1.0 ? 1 : static_cast<u64>(whole);
        there = border.at / static_cast<u64>(unit * factor);
    } else {
        if (threadIdx.x == 0) cut_slowly(row, reinterpret_cast<double*>(room.bins), target, room.slots);
        __syncthreads();
        border.least = static_cast<u32>(room.slots[0]);
        ties = room.slots[1];
        there = BROKEN;
        __syncthreads();
    }
    if (there <= ties) return {border.least, row.vocabulary};
    return {border.least, find_nth(room.slots, row.vocabulary, ties, [&](int i) {
        return row.mass[i] > 0.0f && ordered(row.x[i]) == border.least;
    })};
}

// Inverse of the cumulated mass in ascending id: the first id at which it passes u times the total. Right in thread 0.
__device__ __forceinline__ int draw(const Row& row, const Room& room, double u) {
    int spans = row.stride / SPAN, token = 0, n = 0;
    double passed = 0.0, target = __dmul_rn(u, total_mass(row, room));
    for (;;) {
        if (threadIdx.x == 0) {
            for (; n < spans; n++) {
                double through = __dadd_rn(passed, room.spans[n]);
                if (room.spans[n] != 0.0 && (through > target || n + 1 == spans)) break;
                passed = through;
            }
            room.slots[0] = n;
        }
        __syncthreads();
        int span = static_cast<int>(room.slots[0]);
        if (span >= spans) break;
        for (int i = threadIdx.x; i < SPAN; i += SAMPLE_THREADS) room.staged[i] = row.mass[span * SPAN + i];
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 0; i < SPAN; i++) {
                float mass = room.staged[i];
                if (mass > 0.0f) {
                    token = n * SPAN + i;
                    passed = __dadd_rn(passed, mass);
                    if (passed > target) break;
                }
            }
            n = passed > target ? spans : n + 1;
        }
    }
    return token;
}

// The token of a place whose temperature is not 0; right in thread 0.
__device__ __forceinline__ int choose(const Row& row, const Room& room, const Place& place) {
    bool few = place.top_k > 0 && place.top_k < row.vocabulary;
    Kept kept{0, row.vocabulary};
    if (few) kept = cut_by_count(row, room, place.top_k);
#pragma unroll 4
    for (int i = threadIdx.x; i < row.stride; i += SAMPLE_THREADS) {
        float mass = 0.0f;
        if (i < row.vocabulary && (!few || kept.has(ordered(row.x[i]), i))) {
            float z = row.heat(row.x[i]);
            if (z >= LEAST_POWER) mass = exponential(z);
        }
        row.mass[i] = mass;
    }
    __syncthreads();
    bool cut = place.top_p < 1.0f;
    kept = {0, row.vocabulary};
    if (cut) kept = cut_by_mass(row, room, place.top_p);
    if (cut || place.min_p > 0.0f) {
        for (int i = threadIdx.x; i < row.vocabulary; i += SAMPLE_THREADS) {
            float mass = row.mass[i];
            if (mass > 0.0f && (mass < place.min_p || (cut && !kept.has(ordered(row.x[i]), i)))) row.mass[i] = 0.0f;
        }
        __syncthreads();
    }
    return draw(row, room, uniform(place));
}

// logits (rows, V); fields: what sampling.py packed; scratch (gridDim.x, 2, stride), stride = V rounded up to whole
// spans; newest, tokens, status (S,): results. For the records first .. first + count, whose rows begin at first_row.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
sample(const float* logits, const u32* fields, float* scratch, int* newest, int* tokens, int* status, int vocabulary,
       int first, int count, int first_row) {
    SHARED(u64, bins, 0);
    SHARED(double, spans, SPANS_AT);
    SHARED(float, staged, STAGED_AT);
    SHARED(u64, slots, SLOTS_AT);
    Room room{bins, spans, staged, slots};
    int stride = (vocabulary + SPAN - 1) / SPAN * SPAN;
    float* own = scratch + static_cast<i64>(blockIdx.x) * 2 * stride;
    const Place* records = reinterpret_cast<const Place*>(fields + fields[RECORDS]);
    for (int n = first + blockIdx.x; n < first + count; n += gridDim.x) {
        const Place place = records[n];
        const float* x = logits + static_cast<i64>(place.row - first_row) * vocabulary;
        int token = 0, code = FINE;
        if (place.history_begin < place.history_end || place.bias_begin < place.bias_end || place.mask >= 0) {
            if (!modify(x, own, vocabulary, place, fields, slots)) code = NOT_FINITE;
            else if (place.mask >= 0) {
                const u32* mask = fields + fields[MASKS] + static_cast<i64>(place.mask) * fields[MASK_WORDS];
                if (!apply_mask(own, vocabulary, mask, slots)) code = NOTHING_ALLOWED;
            }
            x = own;
        }
        if (code == FINE) {
            u64 best = find_best(x, vocabulary, slots);
            if (best == BROKEN) code = NOT_FINITE;
            else if (place.temperature <= 0.0f) token = id_of(best);
            else {
                Row row{x, own + stride, vocabulary, stride, x[id_of(best)], __fdiv_rn(1.0f, place.temperature)};
                token = choose(row, room, place);
            }
        }
        if (threadIdx.x == 0) {
            newest[place.place] = token;
            tokens[place.place] = token;
            status[place.place] = code;
        }
        __syncthreads();
    }
}
