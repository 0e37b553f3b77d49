// The gate of a feed-forward: activation(gate) * up, elementwise, float32 inside.
//
// elementwise.py launches it. A block has some columns of one row.
#include "gpu.cuh"

constexpr int GATED_THREADS = 256;

enum Activation { SILU, GELU_TANH };

// Both activations are gate * sigmoid(z): z = gate, or twice sqrt(2 / pi) (gate + 0.044715 gate^3) (Hendrycks, Gimpel 2016).
template <Activation ACTIVATION>
__device__ __forceinline__ float activated(float gate) {
    float z = gate;
    if constexpr (ACTIVATION == GELU_TANH) z = 1.5957691216f * gate * (1.0f + 0.044715f * gate * gate);
    return gate / (1.0f + __expf(-z));
}

template <Activation ACTIVATION>
__device__ __forceinline__ u32 gated_pair(u32 gate, u32 up) {
    return pack_bf16(activated<ACTIVATION>(low_bf16(gate)) * low_bf16(up), activated<ACTIVATION>(high_bf16(gate)) * high_bf16(up));
}

// gate_up (T, 2 columns): a row's gates, then its ups; out (T, columns). A thread has WIDTH (1 or 8) columns.
template <Activation ACTIVATION, int WIDTH>
__global__ void __launch_bounds__(GATED_THREADS)
gated(const bf16* gate_up, bf16* out, int columns) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDTH;
    if (column >= columns) return;
    i64 row = blockIdx.x;
    const bf16* gate = gate_up + row * 2 * columns + column;
    bf16* to = out + row * columns + column;
    if constexpr (WIDTH == 8) {
        uint4 g = load_vector<uint4>(gate), u = load_vector<uint4>(gate + columns), made;
        made.x = gated_pair<ACTIVATION>(g.x, u.x), made.y = gated_pair<ACTIVATION>(g.y, u.y);
        made.z = gated_pair<ACTIVATION>(g.z, u.z), made.w = gated_pair<ACTIVATION>(g.w, u.w);
        store_vector(to, made);
    } else
        *to = __float2bfloat16(activated<ACTIVATION>(__bfloat162float(*gate)) * __bfloat162float(gate[columns]));
}
