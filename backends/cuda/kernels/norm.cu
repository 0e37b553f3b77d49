// RMS norms of rows: y = x / sqrt(mean(x^2) + epsilon) * weight, with what is added to the residual stream x before. One block
// per row; x is float32, a branch bfloat16.
//
// elementwise.py launches these. A row's sums have one order, whatever else is in the step: the number of threads depends on the
// columns only. A thread keeps its part of the row in registers; of rows too long for that, the rest is read again.
#include "gpu.cuh"

constexpr int MOST_THREADS = 1024;
constexpr int KEPT = 4;               // groups of WIDTH columns that a thread keeps

enum Join { NOTHING, ADD, ADD_NORMED };

template <int WIDTH>
struct Group {
    float at[WIDTH];
};

template <int WIDTH>
__device__ __forceinline__ Group<WIDTH> load_group(const float* p) {
    Group<WIDTH> group;
    if constexpr (WIDTH == 4) {
        float4 four = load_vector<float4>(p);
        group.at[0] = four.x, group.at[1] = four.y, group.at[2] = four.z, group.at[3] = four.w;
    } else
        group.at[0] = *p;
    return group;
}

template <int WIDTH>
__device__ __forceinline__ Group<WIDTH> load_group(const bf16* p) {
    Group<WIDTH> group;
    if constexpr (WIDTH == 4) {
        uint2 two = load_vector<uint2>(p);
        group.at[0] = low_bf16(two.x), group.at[1] = high_bf16(two.x), group.at[2] = low_bf16(two.y), group.at[3] = high_bf16(two.y);
    } else
        group.at[0] = __bfloat162float(*p);
    return group;
}

template <int WIDTH>
__device__ __forceinline__ void store_group(float* p, const Group<WIDTH>& group) {
    if constexpr (WIDTH == 4)
        store_vector(p, make_float4(group.at[0], group.at[1], group.at[2], group.at[3]));
    else
        *p = group.at[0];
}

template <int WIDTH>
__device__ __forceinline__ void store_group(bf16* p, const Group<WIDTH>& group) {
    if constexpr (WIDTH == 4)
        store_vector(p, make_uint2(pack_bf16(group.at[0], group.at[1]), pack_bf16(group.at[2], group.at[3])));
    else
        *p = __float2bfloat16(group.at[0]);
}

template <int WIDTH>
__device__ __forceinline__ float squares_of(const Group<WIDTH>& group) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) sum += group.at[i] * group.at[i];
    return sum;
}

// What a branch adds to x at a group of columns.
template <int WIDTH>
__device__ __forceinline__ Group<WIDTH> branch_group(const bf16* branch, const float* bias, int column) {
    Group<WIDTH> group = load_group<WIDTH>(branch + column);
    if (bias) {
        Group<WIDTH> more = load_group<WIDTH>(bias + column);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) group.at[i] += more.at[i];
    }
    return group;
}

// x (T, columns). NOTHING: y row i is the norm of x row at[i] (i if `at` is null). ADD: x += branch + bias, ADD_NORMED:
// x += the norm of (branch + bias) by branch_weight; then y = the norm of x, unless y is null. `bias` may be null.
template <Join JOIN, class Out, int WIDTH>
__global__ void __launch_bounds__(MOST_THREADS)
norm_rows(float* x, const int* at, const bf16* branch, const float* bias, const float* branch_weight, const float* weight,
          Out* y, int columns, float epsilon) {
    SHARED(float, room, 0);
    int groups = columns / WIDTH, threads = blockDim.x;
    i64 to = static_cast<i64>(blockIdx.x) * columns;
    i64 from = at ? static_cast<i64>(at[blockIdx.x]) * columns : to;
    x += from;
    branch += to;
    float branch_scale = 1.0f;
    if constexpr (JOIN == ADD_NORMED) {
        float squares = 0.0f;
        for (int g = threadIdx.x; g < groups; g += threads) squares += squares_of(branch_group<WIDTH>(branch, bias, g * WIDTH));
        branch_scale = rsqrtf(block_sum(squares, room) / columns + epsilon);
    }
    auto joined = [&](int column) {
        Group<WIDTH> value = load_group<WIDTH>(x + column);
        if constexpr (JOIN != NOTHING) {
            Group<WIDTH> more = branch_group<WIDTH>(branch, bias, column);
            if constexpr (JOIN == ADD_NORMED) {
                Group<WIDTH> factors = load_group<WIDTH>(branch_weight + column);
#pragma unroll
                for (int i = 0; i < WIDTH; i++) more.at[i] *= branch_scale * factors.at[i];
            }
#pragma unroll
            for (int i = 0; i < WIDTH; i++) value.at[i] += more.at[i];
            store_group(x + column, value);
        }
        return value;
    };
    Group<WIDTH> kept[KEPT];
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int g = threadIdx.x + k * threads;
        if (g < groups) {
            kept[k] = joined(g * WIDTH);
            squares += squares_of(kept[k]);
        }
    }
    for (int g = threadIdx.x + KEPT * threads; g < groups; g += threads) squares += squares_of(joined(g * WIDTH));
    if (!y) return;
    float scale = rsqrtf(block_sum(squares, room) / columns + epsilon);
    auto write = [&](Group<WIDTH> value, int column) {
        Group<WIDTH> factors = load_group<WIDTH>(weight + column);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) value.at[i] *= scale * factors.at[i];
        store_group(y + to + column, value);
    };
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int g = threadIdx.x + k * threads;
        if (g < groups) write(kept[k], g * WIDTH);
    }
    for (int g = threadIdx.x + KEPT * threads; g < groups; g += threads) write(load_group<WIDTH>(x + g * WIDTH), g * WIDTH);
}
