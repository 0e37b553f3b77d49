// Sums of rows: a branch onto the residual stream, a bias onto what a product made.
//
// elementwise.py launches these. A block has some columns of one row, a thread WIDTH (1 or 4) of them.
#include "gpu.cuh"

constexpr int ROWS_THREADS = 256;

// x (T, columns) += branch
template <int WIDTH>
__global__ void __launch_bounds__(ROWS_THREADS)
add_rows(float* x, const bf16* branch, int columns) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (column >= columns) return;
    i64 place = static_cast<i64>(blockIdx.x) * columns + column;
    if constexpr (WIDTH == 4) {
        float4 v = load_vector<float4>(x + place);
        uint2 more = load_vector<uint2>(branch + place);
        v.x += low_bf16(more.x), v.y += high_bf16(more.x), v.z += low_bf16(more.y), v.w += high_bf16(more.y);
        store_vector(x + place, v);
    } else
        x[place] += __bfloat162float(branch[place]);
}

// rows (T, columns) += bias (columns)
template <int WIDTH>
__global__ void __launch_bounds__(ROWS_THREADS)
add_bias(bf16* rows, const float* bias, int columns) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (column >= columns) return;
    bf16* at = rows + static_cast<i64>(blockIdx.x) * columns + column;
    if constexpr (WIDTH == 4) {
        uint2 v = load_vector<uint2>(at);
        float4 more = load_vector<float4>(bias + column);
        v.x = pack_bf16(low_bf16(v.x) + more.x, high_bf16(v.x) + more.y);
        v.y = pack_bf16(low_bf16(v.y) + more.z, high_bf16(v.y) + more.w);
        store_vector(at, v);
    } else
        *at = __float2bfloat16(__bfloat162float(*at) + bias[column]);
}
