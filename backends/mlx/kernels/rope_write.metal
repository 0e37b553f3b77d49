// Queries and keys, normed for each head if NORM, are turned by their positions; keys and values then go to their slots of
// the pools in place, as write_cache writes them (the token says when). A slot outside of the pool is left out. The three
// come as the one product they are made by: a token's H heads of queries, KV of keys, KV of values.
//
// Bytes read for each output number: the number itself, once; 8 bytes of table for two numbers (from cache).
// Launch: a simdgroup has one head of one token, keys and values of one KV head together; a lane holds up to 4 pairs in
// registers, so nothing is exchanged but the sum of squares and the largest number. GROUP simdgroups in a threadgroup.
// A frequency is a part of a turn in 64 bits (high, low): position times it, without whole turns, is exact at any position.
// T: numbers of qkv and turned; C: of the pools. qkv (tokens, H + 2 KV, D); turned (tokens, H, D); positions, slots (tokens
// or more); table (ROTARY / 2 or more, 2). HALVES: pairs are (i, i + ROTARY / 2), else (2 i, 2 i + 1).
constexpr int PAIRS = (D / 2 + 31) / 32;
const int lane = thread_index_in_simdgroup;
const int pair = threadgroup_position_in_grid.x * GROUP + simdgroup_index_in_threadgroup;
if (thread_position_in_grid.x == 0) token[0] = 1.0f;
if (pair >= qkv_shape[0] * (H + KV)) return;
const int row = pair / (H + KV), head = pair % (H + KV);
const bool query = head < H;
const int slot = slots[row];
const bool kept = slot >= 0 && slot < key_pool_shape[0];
if (!query && !kept) return;
for (int which = 0; which < (query ? 1 : 2); which++) {
    const bool turns = which == 0;
    const device T* from = qkv + (size_t(row) * (H + 2 * KV) + head + (turns ? 0 : KV)) * D;
    float one[PAIRS], two[PAIRS];
    int first[PAIRS], second[PAIRS];
    float squares = 0.0f;
    for (int i = 0; i < PAIRS; i++) {
        const int number = lane + 32 * i;
        const bool halves = HALVES && number < ROTARY / 2;
        first[i] = halves ? number : 2 * number;
        second[i] = halves ? number + ROTARY / 2 : 2 * number + 1;
        const bool inside = number < D / 2;
        one[i] = inside ? float(from[first[i]]) : 0.0f;
        two[i] = inside ? float(from[second[i]]) : 0.0f;
        squares += one[i] * one[i] + two[i] * two[i];
    }
    if (NORM && turns) {
        const float factor = precise::rsqrt(simd_sum(squares) / float(D) + epsilon);
        for (int i = 0; i < PAIRS; i++) {
            if (lane + 32 * i >= D / 2) continue;
            one[i] *= factor * (query ? float(q_weight[first[i]]) : float(k_weight[first[i]]));
            two[i] *= factor * (query ? float(q_weight[second[i]]) : float(k_weight[second[i]]));
        }
    }
    for (int i = 0; i < PAIRS; i++) {
        const int number = lane + 32 * i;
        if (!turns || number >= ROTARY / 2) continue;
        const uint position = uint(positions[row]);
        const uint turn = position * table[2 * number] + uint(ulong(position) * ulong(table[2 * number + 1]) >> 32);
        const float angle = float(int(turn)) * 1.46291808e-9f;    // 2 pi / 2^32: from -pi to pi
        const float c = precise::cos(angle) * stretch, s = precise::sin(angle) * stretch;
        const float x = one[i], y = two[i];
        one[i] = x * c - y * s;
        two[i] = y * c + x * s;
    }
    if (query) {
        device T* to = turned + (size_t(row) * H + head) * D;
        for (int i = 0; i < PAIRS; i++) {
            if (lane + 32 * i >= D / 2) continue;
            to[first[i]] = T(one[i]);
            to[second[i]] = T(two[i]);
        }
        continue;
    }
    const size_t place = size_t(slot) * KV + head - H;
    float inverse = 1.0f;
    if (rillet::Cache<C>::scaled) {
        float largest = 0.0f;
        for (int i = 0; i < PAIRS; i++) largest = max(largest, max(abs(one[i]), abs(two[i])));
        largest = simd_max(largest);
        inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        if (lane == 0) const_cast<device float*>(turns ? key_scales : value_scales)[place] = largest / 127.0f;
    }
    device C* to = const_cast<device C*>(turns ? key_pool : value_pool) + place * D;
    for (int i = 0; i < PAIRS; i++) {
        if (lane + 32 * i >= D / 2) continue;
        to[first[i]] = rillet::narrow<C>(one[i] * inverse);
        to[second[i]] = rillet::narrow<C>(two[i] * inverse);
    }
}
