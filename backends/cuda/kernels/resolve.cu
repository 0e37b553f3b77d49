// Puts in what the ticket before drew: a token -1 - s becomes newest[s]. sampling.py launches these before anything of a step
// reads tokens or history, and before the step's own draws go to newest.
#include "sampling.cuh"

constexpr int RESOLVE_THREADS = 256;

// tokens (count,), in place.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) resolve_tokens(int* tokens, const int* newest, int count) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < count && tokens[i] < 0) tokens[i] = newest[-1 - tokens[i]];
}

// The history in fields, in place; one block per record. Where the token stands in another entry of the place, the first
// of them gets the counts of all, and the others count nothing.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) resolve_history(u32* fields, const int* newest) {
    SHARED(int, room, 0);    // next reference, first entry of its token, counts, whether in the prompt
    const Place& place = reinterpret_cast<const Place*>(fields + fields[RECORDS])[blockIdx.x];
    int* tokens = reinterpret_cast<int*>(fields + fields[HISTORY_TOKENS]);
    u32* counts = fields + fields[HISTORY_COUNTS];
    int begin = place.history_begin, end = place.history_end, after = begin;
    for (int round = begin; round < end && after < end; round++) {        // once for each reference, and once to find no more
        if (threadIdx.x == 0) {
            room[0] = end;
            room[1] = end;
            room[2] = room[3] = 0;
        }
        __syncthreads();
        for (int e = after + threadIdx.x; e < end; e += THREADS)
            if (tokens[e] < 0) {
                atomicMin(&room[0], e);
                break;
            }
        __syncthreads();
        int reference = room[0];
        if (reference >= end) break;
        int token = newest[-1 - tokens[reference]];
        __syncthreads();
        for (int e = begin + threadIdx.x; e < end; e += THREADS)
            if (e == reference || tokens[e] == token) {
                tokens[e] = token;
                atomicMin(&room[1], e);
                atomicAdd(&room[2], static_cast<int>(counts[e] >> 1));
                atomicOr(&room[3], static_cast<int>(counts[e] & 1));
                counts[e] = 0;
            }
        __syncthreads();
        if (threadIdx.x == 0) counts[room[1]] = static_cast<u32>(room[2]) << 1 | static_cast<u32>(room[3]);
        after = reference + 1;                  // no barrier: only thread 0 goes on to write to room before the next one
    }
}
