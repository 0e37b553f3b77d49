// Scales and minima of blocks of 256 columns: what a strip has for four tiles. formats.cuh makes storage types of them.
//
// All bits of the file's headers are there, each where the lane that needs it reads it with others of its own.
#pragma once

#include "planes.cuh"

struct Factors {
    float scale, minimum;
};

// 0 <= q < 2^23 as a float, without the slow conversion.
__device__ __forceinline__ float small_float(u32 q) { return __uint_as_float(0x4B000000u | q) - 8388608.0f; }

__device__ __forceinline__ float half_at(u32 word, int high) {
    return __half2float(__ushort_as_half(static_cast<u16>(high ? word >> 16 : word & 0xffffu)));
}

// `width` < 32 bits from bit `at` on of some words; `at` is a constant once loops are unrolled.
template <int WORDS>
__device__ __forceinline__ u32 bits_at(const u32 (&words)[WORDS], int at, int width) {
    int word = at / 32, shift = at % 32;
    u32 low = words[word] >> shift;
    if (shift + width > 32) low |= words[word + 1 < WORDS ? word + 1 : word] << (32 - shift);
    return low & ((1u << width) - 1);
}

template <int WORDS>
__device__ __forceinline__ void put_bits(u32 (&words)[WORDS], int at, int width, u32 value) {
    int word = at / 32, shift = at % 32;
    words[word] |= value << shift;
    if (shift + width > 32) words[word + 1 < WORDS ? word + 1 : word] |= value >> (32 - shift);
}

__device__ __forceinline__ u32 u16_at(const u8* p) { return p[0] | static_cast<u32>(p[1]) << 8; }

// Two float16 of each row, at 8 g of the strip; SCALE_AT is where the block has them.
template <int SCALE_AT>
struct ScaleAndMinimum {
    u32 of_row[2];

    __device__ __forceinline__ void read(const u8* strip, int lane) { read_words(of_row, strip + lane / 4 * 8); }
    __device__ __forceinline__ void put(int row, const u8* block) {
        of_row[row] = u16_at(block + SCALE_AT) | u16_at(block + SCALE_AT + 2) << 16;
    }
    __device__ __forceinline__ void write(u8* strip, int lane) const {
        if (lane % 4 == 0) write_words(strip + lane / 4 * 8, of_row);
    }
};

// One float16 of each row, at 4 g.
template <int SCALE_AT>
struct Scale {
    u32 of_rows[1];

    __device__ __forceinline__ void read(const u8* strip, int lane) { read_words(of_rows, strip + lane / 4 * 4); }
    __device__ __forceinline__ void put(int row, const u8* block) { of_rows[0] |= u16_at(block + SCALE_AT) << (16 * row); }
    __device__ __forceinline__ void write(u8* strip, int lane) const {
        if (lane % 4 == 0) write_words(strip + lane / 4 * 4, of_rows);
    }
};

// Q4_K, Q5_K: eight scales and minima of 6 bits. Pair 2g + t / 2 of lanes has 96 bits: tile c, row r at 12 (2 c + r).
struct SixBitPairs {
    ScaleAndMinimum<0> whole;
    u32 fine[3];

    __device__ __forceinline__ void clear() { whole.of_row[0] = whole.of_row[1] = fine[0] = fine[1] = fine[2] = 0; }
    __device__ __forceinline__ void read(const u8* strip, int lane) {
        whole.read(strip, lane);
#pragma unroll
        for (int i = 0; i < 3; i++) fine[i] = load_streamed<u32>(strip + 64 + i * 64 + lane / 2 * 4);
    }
    __device__ __forceinline__ Factors factors(int tile, int row, int lane) const {
        u32 both = bits_at(fine, 12 * (2 * tile + row), 12);
        return {
            half_at(whole.of_row[row], 0) * small_float(both & 63u),
            -half_at(whole.of_row[row], 1) * small_float(both >> 6),
        };
    }
    __device__ __forceinline__ void put(int row, int lane, const u8* block, bool) {
        whole.put(row, block);
        const u8* packed = block + 4;
        for (int tile = 0; tile < SUPER_TILES; tile++) {
            int s = 2 * tile + lane % 4 / 2, in = s % 4;
            u32 scale = s < 4 ? packed[in] & 63u : (packed[8 + in] & 15u) | packed[in] >> 6 << 4;
            u32 minimum = s < 4 ? packed[4 + in] & 63u : static_cast<u32>(packed[8 + in] >> 4) | packed[4 + in] >> 6 << 4;
            put_bits(fine, 12 * (2 * tile + row), 12, scale | minimum << 6);
        }
    }
    __device__ __forceinline__ void write(u8* strip, int lane) const {
        whole.write(strip, lane);
        if (lane % 2 == 0)
            for (int i = 0; i < 3; i++) store_vector(strip + 64 + i * 64 + lane / 2 * 4, fine[i]);
    }
};

// Q2_K: a byte with scale and minimum for 16 columns, a word of four tiles for each row of a lane.
struct NibblePairs {
    ScaleAndMinimum<80> whole;
    u32 fine[2];

    __device__ __forceinline__ void clear() { whole.of_row[0] = whole.of_row[1] = fine[0] = fine[1] = 0; }
    __device__ __forceinline__ void read(const u8* strip, int lane) {
        whole.read(strip, lane);
        read_words(fine, strip + 64 + lane * 8);
    }
    __device__ __forceinline__ Factors factors(int tile, int row, int lane) const {
        u32 both = fine[row] >> (8 * tile);
        return {
            half_at(whole.of_row[row], 0) * small_float(both & 15u),
            -half_at(whole.of_row[row], 1) * small_float((both >> 4) & 15u),
        };
    }
    __device__ __forceinline__ void put(int row, int lane, const u8* block, bool) {
        whole.put(row, block);
        for (int tile = 0; tile < SUPER_TILES; tile++)
            fine[row] |= static_cast<u32>(block[4 * tile + lane % 4]) << (8 * tile);
    }
    __device__ __forceinline__ void write(u8* strip, int lane) const {
        whole.write(strip, lane);
        write_words(strip + 64 + lane * 8, fine);
    }
};

// Q6_K: a signed byte for 16 columns, plus 128 here.
struct ByteScales {
    Scale<208> whole;
    u32 fine[2];

    __device__ __forceinline__ void clear() { whole.of_rows[0] = fine[0] = fine[1] = 0; }
    __device__ __forceinline__ void read(const u8* strip, int lane) {
        whole.read(strip, lane);
        read_words(fine, strip + 32 + lane * 8);
    }
    __device__ __forceinline__ Factors factors(int tile, int row, int lane) const {
        return {half_at(whole.of_rows[0], row) * (small_float((fine[row] >> (8 * tile)) & 255u) - 128.0f), 0.0f};
    }
    __device__ __forceinline__ void put(int row, int lane, const u8* block, bool) {
        whole.put(row, block);
        for (int tile = 0; tile < SUPER_TILES; tile++)
            fine[row] |= (block[192 + 4 * tile + lane % 4] ^ 0x80u) << (8 * tile);
    }
    __device__ __forceinline__ void write(u8* strip, int lane) const {
        whole.write(strip, lane);
        write_words(strip + 32 + lane * 8, fine);
    }
};

// Q3_K, IQ4_XS: scales of 6 bits, less 32. 48 bits for each LANES lanes: tile c, row r at 6 (2 c + r), 32 of them in a word.
template <class BLOCK, int SCALE_AT, int LANES>
struct SixBits {
    static constexpr int SHORT_AT = 32 + 128 / LANES;
    Scale<SCALE_AT> whole;
    u32 fine[2];

    __device__ __forceinline__ void clear() { whole.of_rows[0] = fine[0] = fine[1] = 0; }
    __device__ __forceinline__ void read(const u8* strip, int lane) {
        whole.read(strip, lane);
        fine[0] = load_streamed<u32>(strip + 32 + lane / LANES * 4);
        fine[1] = load_vector<u16>(strip + SHORT_AT + lane / LANES * 2);
    }
    __device__ __forceinline__ Factors factors(int tile, int row, int lane) const {
        return {half_at(whole.of_rows[0], row) * (small_float(bits_at(fine, 6 * (2 * tile + row), 6)) - 32.0f), 0.0f};
    }
    __device__ __forceinline__ void put(int row, int lane, const u8* block, bool) {
        whole.put(row, block);
        for (int tile = 0; tile < SUPER_TILES; tile++)
            put_bits(fine, 6 * (2 * tile + row), 6, BLOCK::scale(block, tile, lane % 4));
    }
    __device__ __forceinline__ void write(u8* strip, int lane) const {
        whole.write(strip, lane);
        if (lane % LANES) return;
        store_vector(strip + 32 + lane / LANES * 4, fine[0]);
        store_vector(strip + SHORT_AT + lane / LANES * 2, static_cast<u16>(fine[1]));
    }
};

struct SixteenScales {
    static __device__ __forceinline__ u32 scale(const u8* block, int tile, int t) {
        const u8* packed = block + 96;
        int s = 4 * tile + t;
        u32 low = s < 8 ? packed[s] & 15u : static_cast<u32>(packed[s - 8] >> 4);
        return low | ((packed[8 + s % 4] >> (s / 4 * 2)) & 3u) << 4;
    }
};

struct EightScales {
    static __device__ __forceinline__ u32 scale(const u8* block, int tile, int t) {
        int s = 2 * tile + t / 2;
        return ((block[4 + s / 2] >> (s % 2 * 4)) & 15u) | ((u16_at(block + 2) >> (2 * s)) & 3u) << 4;
    }
};
