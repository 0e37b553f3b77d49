// RMS norms of rows: y = x / sqrt(mean(x^2) + epsilon) * weight. One block per row; x is float32, y bfloat16.
//
// elementwise.py launches these. A row's sum has one order, whatever else is in the step.
#include "gpu.cuh"

constexpr int NORM_THREADS = 256;

// x (T, columns); y (T, columns) = the norm of x, or with `branch` (T, columns) of x + branch, which is also written to x.
template <bool ADD>
__global__ void __launch_bounds__(NORM_THREADS)
rms_norm(float* x, const bf16* branch, const float* weight, bf16* y, int columns, float epsilon) {
    SHARED(float, room, 0);
    i64 start = static_cast<i64>(blockIdx.x) * columns;
    float squares = 0.0f;
    for (int c = threadIdx.x; c < columns; c += NORM_THREADS) {
        float value = x[start + c];
        if constexpr (ADD) {
            value += __bfloat162float(branch[start + c]);
            x[start + c] = value;
        }
        squares += value * value;
    }
    float scale = rsqrtf(block_sum(squares, room) / columns + epsilon);
    for (int c = threadIdx.x; c < columns; c += NORM_THREADS)
        y[start + c] = __float2bfloat16(x[start + c] * scale * weight[c]);
}
