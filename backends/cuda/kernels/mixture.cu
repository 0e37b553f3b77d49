// Mixture of experts: which experts a token goes to, the order in which the tokens of an expert lie together, and the sum of the
// answers. mixture.py launches these.
//
// Nothing depends on which thread comes first: a token's experts are bits of a table (chunks of 32 tokens, experts), and where it
// stands is how many bits are before its own. Counts stay on the device, launches depend on the number of tokens only.
#include "gpu.cuh"

constexpr int CHUNK = 32;             // tokens of a block, one per warp
constexpr int CHUNK_THREADS = CHUNK * WARP;
constexpr int MOST_EXPERTS = 512;
constexpr int COMBINE_THREADS = 256;

// The same order as the numbers have, and back; 0 is below all of them and stands for "not there". NaN is the least.
__device__ __forceinline__ u32 ordered(float x) {
    if (x != x) return 1;
    u32 bits = __float_as_uint(x + 0.0f);        // -0 is 0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_order(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

__device__ __forceinline__ u32 warp_max_u32(u32 v) {
#if defined(EMULATED) || __CUDA_ARCH__ >= 800
    return __reduce_max_sync(ALL_LANES, v);
#else
#pragma unroll
    for (int far = 16; far > 0; far >>= 1) v = max(v, __shfl_xor_sync(ALL_LANES, v, far));
    return v;
#endif
}

// What `group` and `route` share: the block of chunk blockIdx.x sets source and place of its tokens, that of chunk 0 also tiles.
// words[e]: the bits of expert e in this chunk. `chosen` (chunks, experts) has those of all chunks if there is more than one.
__device__ __forceinline__ void group_chunk(
    const u32* words, const u32* chosen, const int* experts, int* source, int* place, int* tiles, int tokens, int expert_count,
    int each, int tile_tokens, int tile_count) {
    SHARED(int, totals, MOST_EXPERTS * 4);       // of an expert: its tokens,
    SHARED(int, before, MOST_EXPERTS * 8);       // those of them in the chunks before,
    SHARED(int, starts, MOST_EXPERTS * 12);      // its first position,
    SHARED(int, first_tiles, MOST_EXPERTS * 16); // its first tile
    int chunk = blockIdx.x, chunks = gridDim.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int e = threadIdx.x; e < expert_count; e += CHUNK_THREADS) {
        totals[e] = chunks == 1 ? __popc(words[e]) : 0;
        before[e] = 0;
    }
    __syncthreads();
    if (chunks > 1) {
        int parts = CHUNK_THREADS / expert_count, part = threadIdx.x / expert_count, e = threadIdx.x % expert_count;
        int all = 0, earlier = 0;
        if (part < parts)
            for (int c = part; c < chunks; c += parts) {
                int here = __popc(chosen[static_cast<i64>(c) * expert_count + e]);
                all += here;
                if (c < chunk) earlier += here;
            }
        if (all) atomicAdd(&totals[e], all);     // whole numbers: any order gives the same sum
        if (earlier) atomicAdd(&before[e], earlier);
        __syncthreads();
    }
    if (warp == 0) {
        int positions = 0, tiles_before = 0;
        for (int first = 0; first < expert_count; first += WARP) {
            int e = first + lane, count = e < expert_count ? totals[e] : 0, needed = (count + tile_tokens - 1) / tile_tokens;
            int count_sum = count, needed_sum = needed;
#pragma unroll
            for (int far = 1; far < WARP; far *= 2) {
                int c = __shfl_up_sync(ALL_LANES, count_sum, far), n = __shfl_up_sync(ALL_LANES, needed_sum, far);
                if (lane >= far) count_sum += c, needed_sum += n;
            }
            if (e < expert_count) {
                starts[e] = positions + count_sum - count;
                first_tiles[e] = tiles_before + needed_sum - needed;
            }
            positions += __shfl_sync(ALL_LANES, count_sum, WARP - 1);
            tiles_before += __shfl_sync(ALL_LANES, needed_sum, WARP - 1);
        }
        if (lane == 0) first_tiles[MOST_EXPERTS] = tiles_before;
    }
    __syncthreads();
    int token = chunk * CHUNK + warp;
    if (token < tokens && lane < each) {
        i64 entry = static_cast<i64>(token) * each + lane;
        int e = experts[entry], position = starts[e] + before[e] + __popc(words[e] & ((1u << warp) - 1));
        place[entry] = position;
        source[position] = token;
    }
    if (chunk > 0) return;
    for (int e = threadIdx.x; e < expert_count; e += CHUNK_THREADS)
        for (int done = 0, tile = first_tiles[e]; done < totals[e]; done += tile_tokens, tile++) {
            tiles[3 * tile] = e;
            tiles[3 * tile + 1] = starts[e] + done;
            tiles[3 * tile + 2] = min(tile_tokens, totals[e] - done);
        }
    for (int i = 3 * first_tiles[MOST_EXPERTS] + threadIdx.x; i < 3 * tile_count; i += CHUNK_THREADS) tiles[i] = 0;
}

// logits (T, experts) -> experts, shares (T, each): the most probable ones, ties to the lowest, in ascending order, with their
// shares of the softmax over all, or over the chosen ones. With one chunk also what `group` makes; else `chosen` for it.
// A lane has PER_LANE logits of a token.
template <bool NORMALIZE, int PER_LANE>
__global__ void __launch_bounds__(CHUNK_THREADS)
route(const float* logits, int* experts, float* shares, u32* chosen, int* source, int* place, int* tiles, int tokens,
      int expert_count, int each, int tile_tokens, int tile_count) {
    SHARED(u32, words, 0);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, token = blockIdx.x * CHUNK + warp;
    for (int e = threadIdx.x; e < expert_count; e += CHUNK_THREADS) words[e] = 0;
    __syncthreads();
    if (token < tokens) {
        const float* row = logits + static_cast<i64>(token) * expert_count;
        u32 keys[PER_LANE];
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            int e = lane + i * WARP;
            keys[i] = e < expert_count ? ordered(row[e]) : 0;
        }
        float best = 0.0f, mine = 0.0f;
        int my_expert = 0;
        for (int c = 0; c < each; c++) {
            u32 key = 0;
            int e = 0;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++)
                if (keys[i] > key) key = keys[i], e = lane + i * WARP;
            u32 most = warp_max_u32(key);
            e = static_cast<int>(~warp_max_u32(key == most ? ~static_cast<u32>(e) : 0));     // the lowest of equals
#pragma unroll
            for (int i = 0; i < PER_LANE; i++)
                if (e == lane + i * WARP) keys[i] = 0;
            if (c == 0) best = from_order(most);
            if (c == lane) my_expert = e, mine = from_order(most);
        }
        float power = lane < each ? expf(mine - best) : 0.0f, sum = power;
        if constexpr (!NORMALIZE) {                  // and those not chosen
#pragma unroll
            for (int i = 0; i < PER_LANE; i++)
                if (keys[i]) sum += expf(from_order(keys[i]) - best);
        }
        sum = warp_sum(sum);
        int rank = 0;
        for (int c = 0; c < each; c++) rank += __shfl_sync(ALL_LANES, my_expert, c) < my_expert;
        if (lane < each) {
            i64 entry = static_cast<i64>(token) * each + rank;
            experts[entry] = my_expert;
            shares[entry] = power / sum;
            atomicOr(&words[my_expert], 1u << warp);
        }
    }
    __syncthreads();
    if (gridDim.x == 1) {
        group_chunk(words, nullptr, experts, source, place, tiles, tokens, expert_count, each, tile_tokens, tile_count);
        return;
    }
    for (int e = threadIdx.x; e < expert_count; e += CHUNK_THREADS) chosen[static_cast<i64>(blockIdx.x) * expert_count + e] = words[e];
}

// What route made -> source (T each): position -> token, positions ordered by expert, within one by token; place (T, each): the
// positions of a token; tiles (tile_count, 3): expert, first position, count <= tile_tokens, those not needed with count 0.
__global__ void __launch_bounds__(CHUNK_THREADS)
group(const int* experts, const u32* chosen, int* source, int* place, int* tiles, int tokens, int expert_count, int each,
      int tile_tokens, int tile_count) {
    SHARED(u32, words, 0);
    for (int e = threadIdx.x; e < expert_count; e += CHUNK_THREADS) words[e] = chosen[static_cast<i64>(blockIdx.x) * expert_count + e];
    group_chunk(words, chosen, experts, source, place, tiles, tokens, expert_count, each, tile_tokens, tile_count);
}

// out (T, columns) = sum of shares (T, each) x answers (T each, columns) at the token's places, in that order, and
// sigmoid(shared_logits (T)) x shared (T, columns) unless that is null. A thread has WIDTH (1 or 8) columns.
template <int WIDTH>
__global__ void __launch_bounds__(COMBINE_THREADS)
combine(const bf16* answers, const int* place, const float* shares, const bf16* shared, const float* shared_logits, bf16* out,
        int each, int columns) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (column >= columns) return;
    i64 token = blockIdx.x;
    float sums[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; i++) sums[i] = 0.0f;
    auto add = [&](const bf16* from, float share) {
        if constexpr (WIDTH == 8) {
            uint4 v = load_vector<uint4>(from);
            u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sums[2 * i] += share * low_bf16(pairs[i]);
                sums[2 * i + 1] += share * high_bf16(pairs[i]);
            }
        } else
            sums[0] += share * __bfloat162float(*from);
    };
#pragma unroll 4
    for (int c = 0; c < each; c++)
        add(answers + static_cast<i64>(place[token * each + c]) * columns + column, shares[token * each + c]);
    if (shared) add(shared + token * columns + column, 1.0f / (1.0f + expf(-shared_logits[token])));
    bf16* to = out + token * columns + column;
    if constexpr (WIDTH == 8)
        store_vector(to, make_uint4(pack_bf16(sums[0], sums[1]), pack_bf16(sums[2], sums[3]), pack_bf16(sums[4], sums[5]), pack_bf16(sums[6], sums[7])));
    else
        *to = __float2bfloat16(sums[0]);
}
