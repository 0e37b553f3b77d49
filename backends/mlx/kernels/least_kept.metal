// The least logit that top-k and top-p keep of each row, and how many of that one, without a sort: a threadgroup has a row.
//
// Logits become keys that sort as they do. Rounds find the key by 3 bits at a time, from the top: each adds up, by the next
// bits, the numbers (for top-k) or masses (for top-p, over what top-k left) of all keys that agree so far.
// Bytes read for each logit: 4 in each of 11 rounds for top-k, 12 for top-p; a row of any vocabulary stays in the cache.
// Launch: 512 threads for each row. x (rows, COUNT) float; settings (rows, 8) float: largest logit, 1 / temperature, top_p,
// top_k, and nothing. least (rows) float, ties (rows) int: of what equals least, so many are kept.
#include "keys.metal"
constexpr int BITS = 3, BINS = 1 << BITS, ROUNDS = 11;
threadgroup float parts[32 * BINS];
const int lane = thread_index_in_simdgroup, mine = simdgroup_index_in_threadgroup, groups = simdgroups_per_threadgroup;
const int thread_at = thread_index_in_threadgroup, step = threads_per_threadgroup.x;
const int row = threadgroup_position_in_grid.x;
const device float* numbers = x + size_t(row) * COUNT;
const float highest = settings[row * 8], sharp = settings[row * 8 + 1], top_p = settings[row * 8 + 2];
const float top_k = settings[row * 8 + 3];

uint lowest = 0;                                     // the key that top-k ends at; no logit has key 0
float allowed = float(COUNT), held = 0.0f;           // how many of it are kept, and their mass
for (int by_mass = top_k < float(COUNT) ? 0 : 1; by_mass < (top_p < 1.0f ? 2 : 1); by_mass++) {
    float target = top_k, above = 0.0f;              // what is wanted of the largest keys; what lies above the known bits
    if (by_mass) {
        float mass = 0.0f;
        for (int at = thread_at; at < COUNT; at += step) {
            if (rillet::key_of(numbers[at]) > lowest) mass += precise::exp((numbers[at] - highest) * sharp);
        }
        mass = simd_sum(mass);
        if (lane == 0) parts[mine] = mass;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        target = top_p * (simd_sum(lane < groups ? parts[lane] : 0.0f) + held);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    uint found = 0;
    for (int round = ROUNDS - 1; round >= 0; round--) {
        const int shift = round * BITS;
        const uint known = round == ROUNDS - 1 ? 0u : 0xFFFFFFFFu << (shift + BITS);
        float sums[BINS];
        for (int bin = 0; bin < BINS; bin++) sums[bin] = 0.0f;
        for (int at = thread_at; at < COUNT; at += step) {
            const float number = numbers[at];
            const uint key = rillet::key_of(number);
            if ((key & known) != found || key <= lowest) continue;
            const float weight = by_mass ? precise::exp((number - highest) * sharp) : 1.0f;
            const int its = key >> shift & (BINS - 1);
            for (int bin = 0; bin < BINS; bin++) sums[bin] += bin == its ? weight : 0.0f;
        }
        for (int bin = 0; bin < BINS; bin++) {
            const float sum = simd_sum(sums[bin]);
            if (lane == 0) parts[mine * BINS + bin] = sum;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int bin = 0; bin < BINS; bin++) sums[bin] = simd_sum(lane < groups ? parts[lane * BINS + bin] : 0.0f);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const int of_lowest = (lowest & known) == found && by_mass ? int(lowest >> shift & (BINS - 1)) : -1;
        for (int bin = 0; bin < BINS; bin++) sums[bin] += bin == of_lowest ? held : 0.0f;
        int chosen = 0;                              // the highest bin that reaches the target; if rounding keeps the sum
        float passed = 0.0f, before = above;         // below it, the lowest one with anything in it
        bool reached = false;
        for (int bin = BINS - 1; bin >= 0; bin--) {
            if (reached || !(sums[bin] > 0.0f)) continue;
            reached = above + passed + sums[bin] >= target;
            chosen = bin;
            before = above + passed;
            passed += sums[bin];
        }
        above = before;
        found |= uint(chosen) << shift;
    }
    const float unit = by_mass ? precise::exp((rillet::number_of(found) - highest) * sharp) : 1.0f;
    const float most = by_mass && found != lowest ? float(COUNT) : allowed;
    allowed = min(max(1.0f, ceil((target - above) / unit)), most);
    lowest = found;
    held = allowed * precise::exp((rillet::number_of(found) - highest) * sharp);
}
if (thread_at == 0) {
    least[row] = lowest == 0 ? -INFINITY : rillet::number_of(lowest);       // a row that is not cut keeps all
    ties[row] = int(allowed);
}
