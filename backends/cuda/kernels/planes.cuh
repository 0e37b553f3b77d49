// Planes: a lane's 32 integers of a tile of a packed matrix, as words. formats.cuh makes storage types of them.
//
// A tile is 16 rows x 64 columns; lane 4 g + t has of its rows g and g + 8 the 16 columns from 16 t on: what it gives to
// mma.m16n8k16 as A, so that decoding happens in registers.
#pragma once

#include "gpu.cuh"

constexpr int TILE_ROWS = 16;
constexpr int TILE_COLUMNS = 64;
constexpr int SUPER_TILES = 4;       // tiles of 256 columns: a block of the K types

__host__ __device__ constexpr int tiles_of(int columns) { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }

template <int WORDS>
__device__ __forceinline__ void read_words(u32 (&words)[WORDS], const u8* p) {
    if constexpr (WORDS % 4 == 0) {
        uint4 v = load_streamed<uint4>(p);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (WORDS == 2) {
        uint2 v = load_streamed<uint2>(p);
        words[0] = v.x, words[1] = v.y;
    } else {
        words[0] = load_streamed<u32>(p);
    }
}

template <int WORDS>
__device__ __forceinline__ void write_words(u8* p, const u32 (&words)[WORDS]) {
    if constexpr (WORDS % 4 == 0)
        store_vector(p, make_uint4(words[0], words[1], words[2], words[3]));
    else if constexpr (WORDS == 2)
        store_vector(p, make_uint2(words[0], words[1]));
    else
        store_vector(p, words[0]);
}

// A lane's 32 integers of a tile: LOW bits each in one plane (8, 4 or 2), HIGH more (0, 1 or 2) in another.
// Four columns in a row are a group (row 0 or 1, number 0 to 3), which comes out as four bytes.
template <int LOW, int HIGH>
struct Planes {
    static constexpr int TILE_BYTES = (LOW + HIGH) * 128;
    static constexpr bool WHOLE_BYTES = LOW == 8;
    static constexpr int RING = LOW == 8 ? 2 : 4;    // tiles that a warp has under way
    static constexpr bool WIDE = LOW == 4 && HIGH > 0;    // decoding needs more than 80 registers

    u32 low[LOW];
    u32 high[HIGH ? HIGH : 1];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < LOW; i++) low[i] = 0;
        for (int i = 0; i < (HIGH ? HIGH : 1); i++) high[i] = 0;
    }

    __device__ __forceinline__ void read(const u8* tile, int lane) {
        if constexpr (LOW == 8) {
            u32 half[2][4];
#pragma unroll
            for (int row = 0; row < 2; row++) read_words(half[row], tile + row * 512 + lane * 16);
#pragma unroll
            for (int i = 0; i < 8; i++) low[i] = half[i / 4][i % 4];
        } else {
            read_words(low, tile + lane * LOW * 4);
        }
        if constexpr (HIGH > 0) read_words(high, tile + LOW * 128 + lane * HIGH * 4);
    }

    __device__ __forceinline__ void write(u8* tile, int lane) const {
        if constexpr (LOW == 8) {
            u32 half[2][4];
            for (int i = 0; i < 8; i++) half[i / 4][i % 4] = low[i];
            for (int row = 0; row < 2; row++) write_words(tile + row * 512 + lane * 16, half[row]);
        } else {
            write_words(tile + lane * LOW * 4, low);
        }
        if constexpr (HIGH > 0) write_words(tile + LOW * 128 + lane * HIGH * 4, high);
    }

    // Four integers, one in each byte.
    __device__ __forceinline__ u32 group(int row, int number) const {
        if constexpr (LOW == 8) return low[4 * row + number];
        u32 q;
        if constexpr (LOW == 4)
            q = (low[2 * row + number / 2] >> (number % 2 * 4)) & 0x0f0f0f0fu;
        else
            q = (low[row] >> (number * 2)) & 0x03030303u;
        if constexpr (HIGH == 1) q |= moved(high[0], 4 * row + number) & (0x01010101u << LOW);
        if constexpr (HIGH == 2) q |= moved(high[row], 2 * number) & (0x03030303u << LOW);
        return q;
    }

    // For repack.cu, on cleared planes. `at`: column of the lane's 16.
    __device__ __forceinline__ void put(int row, int at, u32 q) {
        int number = at / 4, byte = at % 4 * 8;
        u32 below = q & ((1u << LOW) - 1), above = q >> LOW;
        if constexpr (LOW == 8)
            low[4 * row + number] |= below << byte;
        else if constexpr (LOW == 4)
            low[2 * row + number / 2] |= below << (byte + number % 2 * 4);
        else
            low[row] |= below << (byte + number * 2);
        if constexpr (HIGH == 1) high[0] |= above << (byte + 4 * row + number);
        if constexpr (HIGH == 2) high[row] |= above << (byte + 2 * number);
    }

private:
    // The bit `from` of every byte at its place above the low bits; what else comes with it is masked away.
    static __device__ __forceinline__ u32 moved(u32 word, int from) {
        return from > LOW ? word >> (from - LOW) : word << (LOW - from);
    }
};

// 4-bit integers that choose from a table of 16 bytes. A lane's nibbles are in the order of its columns.
template <u32 T0, u32 T1, u32 T2, u32 T3>
struct Codes : Planes<4, 0> {
    static constexpr bool WHOLE_BYTES = true;

    __device__ __forceinline__ u32 group(int row, int number) const {
        u32 codes = low[2 * row + number / 2] >> (number % 2 * 16), within = codes & 0x7777u;
        u32 first = __byte_perm(T0, T1, within), second = __byte_perm(T2, T3, within);
        return __byte_perm(first, second, 0x3210u | ((codes & 0x8888u) >> 1));
    }

    __device__ __forceinline__ void put(int row, int at, u32 q) { low[2 * row + at / 8] |= q << (at % 8 * 4); }
};

// The 16 values of IQ4_NL, plus 128.
using Iq4Codes = Codes<0x3f2d1801u, 0x766a5d4fu, 0xa6998d81u, 0xf1d9c5b5u>;
