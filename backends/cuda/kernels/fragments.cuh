// Packed weights as the kernels use them: bfloat16 operands of a product, single weights, a way through 16 rows of a matrix.
//
// product_few.cu, product_many.cu and embedding.cu stand on this.
#pragma once

#include "formats.cuh"

// Byte `number` of a group as a float: 1 + q / LIFT, put together from bytes.
template <class F>
constexpr float LIFT = F::WHOLE_BYTES ? 32768.0f : 128.0f;

template <class F>
__device__ __forceinline__ float lifted(u32 group, int number) {
    if constexpr (F::WHOLE_BYTES) return __uint_as_float(__byte_perm(group, 0x3F800000u, 0x7604u | number << 4));
    return __uint_as_float(__byte_perm(group, 0x3F000000u, 0x7044u | number << 8));
}

// (q - ZERO) scale + minimum = LIFT scale (1 + q / LIFT) + rest: one operation a weight. It is exact before the rounding to
// bfloat16 where there is no minimum, and off by 2^-17 scale at most where there is one.
template <class F>
__device__ __forceinline__ Factors lifted_factors(Factors f) {
    return {f.scale * LIFT<F>, __fmaf_rn(-(LIFT<F> + F::ZERO), f.scale, f.minimum)};
}

// Half of a lane's 16 columns of one of its rows (`row`, `half` 0 or 1) as pairs of bfloat16.
template <class F>
__device__ __forceinline__ void decode(const F& tile, int row, int half, Factors lifted_f, u32 (&pairs)[4]) {
    if constexpr (F::FLOATS) {
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[i] = tile.pair(row, 4 * half + i);
    } else {
#pragma unroll
        for (int number = 0; number < 2; number++) {
            u32 group = tile.group(row, 2 * half + number);
            if constexpr (!F::WHOLE_BYTES) group |= 0x80808080u;
            float w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float q = lifted<F>(group, i);
                if constexpr (F::LONG_SCALE)
                    w[i] = (q - (1.0f + F::ZERO / LIFT<F>)) * lifted_f.scale;    // a scale of 17 bits leaves `rest` no room
                else
                    w[i] = __fmaf_rn(lifted_f.scale, q, lifted_f.minimum);
            }
            pairs[2 * number] = pack_bf16(w[0], w[1]);
            pairs[2 * number + 1] = pack_bf16(w[2], w[3]);
        }
    }
}

// The A operands of two of a tile's four products: columns 16 t + 8 half + {0 .. 3 | 4 .. 7}.
template <class F>
__device__ __forceinline__ void decode_half(const F& tile, int half, const Factors (&f)[2], u32 (&a)[2][4]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        u32 pairs[4];
        decode(tile, row, half, f[row], pairs);
#pragma unroll
        for (int k = 0; k < 2; k++) a[k][row] = pairs[2 * k], a[k][row + 2] = pairs[2 * k + 1];
    }
}

// One weight as gguf.quants.dequantize has it, all bits.
template <class F>
__device__ __forceinline__ float weight(const F& tile, int row, Factors f, int at) {
    if constexpr (F::FLOATS)
        return tile.value(row, at);
    else {
        int q = static_cast<int>((tile.group(row, at / 4) >> (at % 4 * 8)) & 255u) - F::ZERO;
        return __fmaf_rn(f.scale, static_cast<float>(q), f.minimum);
    }
}

// ---- a matrix ------------------------------------------------------------------------------------------------------------

// A place in 16 rows of a matrix, in front of 256 columns. Tiles lie along K; those beyond the end read as zeros.
template <class F>
struct Cursor {
    const u8 *blob, *strip;
    int left;                        // tiles from here to the end, or less than none

    Cursor() = default;
    __device__ __forceinline__ Cursor(const u8* blob, const u8* strip, i64 row_tile, int tiles)
        : blob(blob + row_tile * tiles * F::TILE_BYTES), strip(strip + row_tile * (tiles / F::STRIP_TILES) * F::STRIP_BYTES),
          left(tiles) {}

    __device__ __forceinline__ void advance(int supers) {
        blob += static_cast<i64>(supers) * (SUPER_TILES * F::TILE_BYTES);
        strip += static_cast<i64>(supers) * (SUPER_TILES / F::STRIP_TILES * F::STRIP_BYTES);
        left -= supers * SUPER_TILES;
    }
    __device__ __forceinline__ void read(F& tile, int number, int lane) const {
        if (number < left)
            tile.read(blob + number * F::TILE_BYTES, lane);
        else
            tile.clear();
    }
    __device__ __forceinline__ void read_header(typename F::Header& header, int number, int lane) const {
        if (number < left)
            header.read(strip + number / F::STRIP_TILES * F::STRIP_BYTES, lane);
        else
            header.clear();
    }
};

// Eight columns of a token, or zeros beyond the end of its row. Rows begin at multiples of 16 bytes, but with ANY_COLUMNS,
// where `columns` is no multiple of 8 and numbers are read one by one.
template <bool ANY_COLUMNS>
__device__ __forceinline__ uint4 load_columns(const bf16* token, int column, int columns) {
    if constexpr (!ANY_COLUMNS) {
        if (column < columns) return load_vector<uint4>(token + column);
        return make_uint4(0, 0, 0, 0);
    } else {
        u32 pairs[4] = {};
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (column + i < columns)
                pairs[i / 2] |= static_cast<u32>(__bfloat16_as_ushort(token[column + i])) << (i % 2 * 16);
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}
