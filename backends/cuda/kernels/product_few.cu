// out = x W^T for up to 8 tokens (a step of few sequences; an expert's tokens): as fast as the weights can be read.
//
// products.py launches this. A block has 16 rows of W. Its warps take every so-many-th 256 columns, weights straight into
// registers with RING tiles under way, and are summed in shared memory in their order: a result does not depend on timing.
#include "fragments.cuh"

constexpr int FEW_WARPS = 8;
constexpr int FEW_TOKENS = 8;

// A lane's 16 columns of its token, or zeros; past the end of the row nothing is read.
template <bool ANY_COLUMNS>
__device__ __forceinline__ void read_token(u32 (&b)[8], const bf16* token, int column, int columns) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint4 v = token ? load_columns<ANY_COLUMNS>(token, column + 8 * half, columns) : make_uint4(0, 0, 0, 0);
        b[4 * half] = v.x, b[4 * half + 1] = v.y, b[4 * half + 2] = v.z, b[4 * half + 3] = v.w;
    }
}

// x (?, columns) bf16, x_stride apart; out (?, rows) bf16 or float32, out_stride apart. Grid: (token tiles, row tiles).
// Tokens are 0 .. tokens - 1, or, with `tiles` (n, 3) i32 {expert, first, count}, those of a tile: of x the rows
// source[first ...] (null: first ...), of out the rows first ...; an expert < 0 or a count of 0 is nothing to do.
template <class F, bool ANY_COLUMNS>
__global__ void __launch_bounds__(FEW_WARPS * WARP, F::WIDE ? 2 : 3)
product_few(
    const bf16* x, i64 x_stride, const u8* blob, const u8* strip, i64 blob_bytes, i64 strip_bytes, void* out, i64 out_stride,
    int out_float, int rows, int columns, int tokens, const int* tiles, const int* source
) {
    SHARED(float, room, 0);
    int first = blockIdx.x * FEW_TOKENS, count = tokens - first;
    if (tiles) {
        int expert = tiles[3 * blockIdx.x];
        first = tiles[3 * blockIdx.x + 1], count = tiles[3 * blockIdx.x + 2];
        if (expert < 0 || count <= 0) return;
        blob += expert * blob_bytes, strip += expert * strip_bytes;
    }
    count = min(count, FEW_TOKENS);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int g = lane / 4, t = lane % 4, all = tiles_of(columns), supers = (all + SUPER_TILES - 1) / SUPER_TILES;
    const bf16* token = nullptr;
    if (g < count) token = x + (source ? source[first + g] : first + g) * x_stride;

    Cursor<F> here(blob, strip, blockIdx.y, all);
    here.advance(warp);
    F ring[F::RING];
    typename F::Header headers[SUPER_TILES / F::STRIP_TILES], next_headers[SUPER_TILES / F::STRIP_TILES];
    u32 b[8], next_b[8];
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < F::RING; i++) here.read(ring[i], i, lane);
#pragma unroll
    for (int i = 0; i < SUPER_TILES; i += F::STRIP_TILES) here.read_header(next_headers[i / F::STRIP_TILES], i, lane);
    read_token<ANY_COLUMNS>(b, token, SUPER_TILES * warp * TILE_COLUMNS + 16 * t, columns);

    for (int super = warp; super < supers; super += warps) {
        Cursor<F> next = here;
        next.advance(warps);
#pragma unroll
        for (int i = 0; i < SUPER_TILES; i += F::STRIP_TILES) {
            headers[i / F::STRIP_TILES] = next_headers[i / F::STRIP_TILES];
            next.read_header(next_headers[i / F::STRIP_TILES], i, lane);
        }
#pragma unroll
        for (int in = 0; in < SUPER_TILES; in++) {
            int after = in + 1 < SUPER_TILES ? SUPER_TILES * super + in + 1 : SUPER_TILES * (super + warps);
            read_token<ANY_COLUMNS>(next_b, token, after * TILE_COLUMNS + 16 * t, columns);
            Factors factors[2];
#pragma unroll
            for (int row = 0; row < 2; row++)
                factors[row] = lifted_factors<F>(headers[in / F::STRIP_TILES].factors(in % F::STRIP_TILES, row, lane));
            u32 a[2][2][4];
            decode_half(ring[in % F::RING], 0, factors, a[0]);
            decode_half(ring[in % F::RING], 1, factors, a[1]);
            int later = in + F::RING;
            (later < SUPER_TILES ? here : next).read(ring[in % F::RING], later % SUPER_TILES, lane);
#pragma unroll
            for (int k = 0; k < 4; k++) multiply_bf16(sums, a[k / 2][k % 2], b[2 * k], b[2 * k + 1]);
#pragma unroll
            for (int i = 0; i < 8; i++) b[i] = next_b[i];
        }
        here = next;
    }

    float* mine = room + warp * FEW_TOKENS * TILE_ROWS;
#pragma unroll
    for (int i = 0; i < 4; i++) mine[(2 * t + i % 2) * TILE_ROWS + g + i / 2 * 8] = sums[i];
    __syncthreads();
    for (int i = threadIdx.x; i < FEW_TOKENS * TILE_ROWS; i += blockDim.x) {
        int number = i / TILE_ROWS, row = blockIdx.y * TILE_ROWS + i % TILE_ROWS;
        if (number >= count || row >= rows) continue;
        float sum = 0.0f;
        for (int w = 0; w < warps; w++) sum += room[w * FEW_TOKENS * TILE_ROWS + i];
        i64 at = (first + number) * out_stride + row;
        if (out_float)
            static_cast<float*>(out)[at] = sum;
        else
            static_cast<bf16*>(out)[at] = __float2bfloat16(sum);
    }
}
