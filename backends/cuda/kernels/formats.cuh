// How weights rest on the device, one struct per storage type: products, embeddings and repack.cu read and write it here only.
//
// A tile is 16 rows x 64 columns, lane 4 g + t has of its rows g and g + 8 the 16 columns from 16 t on: what it gives to
// mma.m16n8k16 as A, so that decoding happens in registers. Integers q lie in the blob in planes of 8, 4, 2 or 1 bits, each lane's
// bits together; the file's own scales and minima lie in the strip, for the lanes that use them, as bits in another order.
// A weight is (q - ZERO) scale + minimum, as gguf.quants has it. Block layouts: ggml-common.h of llama.cpp.
#pragma once

#include "gpu.cuh"

constexpr int TILE_ROWS = 16;
constexpr int TILE_COLUMNS = 64;
constexpr int SUPER_TILES = 4;       // tiles of 256 columns: a block of the K types

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

// ---- planes ----------------------------------------------------------------------------------------------------------------

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
    static __device__ __forceinline__ u32 moved(u32 word, int from) { return from > LOW ? word >> (from - LOW) : word << (LOW - from); }
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

// ---- blocks of 32 columns ---------------------------------------------------------------------------------------------------

// A file's block of 32: float16 scale, perhaps a float16 minimum, perhaps four bytes of fifth bits, integers.
// The strip has for a tile 2 blocks x 8 rows g x {row g, row g + 8} x {scale, minimum}.
template <class QUANTS, bool MINIMUM, int ZERO_POINT, bool FIFTH, bool BYTES>
struct SmallBlocks : QUANTS {
    static constexpr int BLOCK = 32, HEADER = MINIMUM ? 4 : 2, BLOCK_BYTES = HEADER + (FIFTH ? 4 : 0) + (BYTES ? 32 : 16);
    static constexpr int STRIP_TILES = 1, STRIP_BYTES = 32 * HEADER, ZERO = ZERO_POINT;
    static constexpr bool FLOATS = false, LONG_SCALE = false;

    struct Header {
        u32 words[HEADER / 2];

        __device__ __forceinline__ void clear() {
            for (int i = 0; i < HEADER / 2; i++) words[i] = 0;
        }
        static __device__ __forceinline__ int place(int lane) { return (lane % 4 / 2 * 8 + lane / 4) * 2 * HEADER; }
        __device__ __forceinline__ void read(const u8* strip, int lane) { read_words(words, strip + place(lane)); }
        __device__ __forceinline__ Factors factors(int tile, int row, int lane) const {
            if constexpr (MINIMUM) return {half_at(words[row], 0), half_at(words[row], 1)};
            return {half_at(words[0], row), 0.0f};
        }
        // block: of this row, the first one of the tile; `there` tells whether the second one is, too
        __device__ __forceinline__ void put(int row, int lane, const u8* block, bool there) {
            const u8* mine = block + lane % 4 / 2 * BLOCK_BYTES;
            bool has = lane % 4 / 2 == 0 || there;
            if constexpr (MINIMUM)
                words[row] = has ? u16_at(mine) | u16_at(mine + 2) << 16 : 0;
            else
                words[0] |= (has ? u16_at(mine) : 0) << (16 * row);
        }
        __device__ __forceinline__ void write(u8* strip, int lane) const {
            if (lane % 2 == 0) write_words(strip + place(lane), words);
        }
    };

    static __device__ __forceinline__ u32 quant(const u8* block, int column) {
        const u8* q = block + HEADER + (FIFTH ? 4 : 0);
        if constexpr (BYTES) return q[column] ^ 0x80u;
        u32 low = (q[column % 16] >> (column / 16 * 4)) & 15u;
        if constexpr (FIFTH) low |= ((block[HEADER + column / 8] >> (column % 8)) & 1u) << 4;
        return low;
    }
};

struct Q4_0 : SmallBlocks<Planes<4, 0>, false, 8, false, false> {};
struct Q4_1 : SmallBlocks<Planes<4, 0>, true, 0, false, false> {};
struct Q5_0 : SmallBlocks<Planes<4, 1>, false, 16, true, false> {};
struct Q5_1 : SmallBlocks<Planes<4, 1>, true, 0, true, false> {};
struct Q8_0 : SmallBlocks<Planes<8, 0>, false, 128, false, true> {};
struct IQ4_NL : SmallBlocks<Iq4Codes, false, 128, false, false> {};

// ---- blocks of 256 columns --------------------------------------------------------------------------------------------------

// What the types of 256 columns share: one header for four tiles.
template <class QUANTS, int BYTES, int ZERO_POINT, int STRIP, class HEADER>
struct SuperBlocks : QUANTS {
    static constexpr int BLOCK = 256, BLOCK_BYTES = BYTES, STRIP_TILES = SUPER_TILES, STRIP_BYTES = STRIP, ZERO = ZERO_POINT;
    static constexpr bool FLOATS = false, LONG_SCALE = false;
    using Header = HEADER;
};

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
        return {half_at(whole.of_row[row], 0) * small_float(both & 63u), -half_at(whole.of_row[row], 1) * small_float(both >> 6)};
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
            half_at(whole.of_row[row], 0) * small_float(both & 15u), -half_at(whole.of_row[row], 1) * small_float((both >> 4) & 15u)
        };
    }
    __device__ __forceinline__ void put(int row, int lane, const u8* block, bool) {
        whole.put(row, block);
        for (int tile = 0; tile < SUPER_TILES; tile++) fine[row] |= static_cast<u32>(block[4 * tile + lane % 4]) << (8 * tile);
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
        for (int tile = 0; tile < SUPER_TILES; tile++) put_bits(fine, 6 * (2 * tile + row), 6, BLOCK::scale(block, tile, lane % 4));
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

struct Q2_K : SuperBlocks<Planes<2, 0>, 84, 0, 320, NibblePairs> {
    static __device__ __forceinline__ u32 quant(const u8* block, int column) {
        return (block[16 + column / 128 * 32 + column % 32] >> (column % 128 / 32 * 2)) & 3u;
    }
};

struct Q3_K : SuperBlocks<Planes<2, 1>, 110, 4, 224, SixBits<SixteenScales, 108, 1>> {
    static __device__ __forceinline__ u32 quant(const u8* block, int column) {
        u32 low = (block[32 + column / 128 * 32 + column % 32] >> (column % 128 / 32 * 2)) & 3u;
        return low | ((block[column % 32] >> (column / 32)) & 1u) << 2;
    }
};

struct Q4_K : SuperBlocks<Planes<4, 0>, 144, 0, 256, SixBitPairs> {
    static __device__ __forceinline__ u32 quant(const u8* block, int column) {
        return (block[16 + column / 64 * 32 + column % 32] >> (column % 64 / 32 * 4)) & 15u;
    }
};

struct Q5_K : SuperBlocks<Planes<4, 1>, 176, 0, 256, SixBitPairs> {
    static __device__ __forceinline__ u32 quant(const u8* block, int column) {
        u32 low = (block[48 + column / 64 * 32 + column % 32] >> (column % 64 / 32 * 4)) & 15u;
        return low | ((block[16 + column % 32] >> (column / 32)) & 1u) << 4;
    }
};

struct Q6_K : SuperBlocks<Planes<4, 2>, 210, 32, 288, ByteScales> {
    static __device__ __forceinline__ u32 quant(const u8* block, int column) {
        int part = column % 128 / 32;
        u32 low = (block[column / 128 * 64 + part % 2 * 32 + column % 32] >> (part / 2 * 4)) & 15u;
        return low | ((block[128 + column / 128 * 32 + column % 32] >> (2 * part)) & 3u) << 4;
    }
};

struct IQ4_XS : SuperBlocks<Iq4Codes, 136, 128, 128, SixBits<EightScales, 0, 2>> {
    static constexpr bool LONG_SCALE = true;
    static __device__ __forceinline__ u32 quant(const u8* block, int column) {
        return (block[8 + column / 32 * 16 + column % 16] >> (column % 32 / 16 * 4)) & 15u;
    }
};

// ---- floats -----------------------------------------------------------------------------------------------------------------

struct NoHeader {
    __device__ __forceinline__ void clear() {}
    __device__ __forceinline__ void read(const u8*, int) {}
    __device__ __forceinline__ Factors factors(int, int, int) const { return {1.0f, 0.0f}; }
    __device__ __forceinline__ void put(int, int, const u8*, bool) {}
    __device__ __forceinline__ void write(u8*, int) const {}
};

// 16-bit floats: words of two columns, a row's first eight columns of all lanes, then its other eight.
template <bool BRAIN>
struct Floats {
    static constexpr int BLOCK = 8, BLOCK_BYTES = 16, TILE_BYTES = 2048, STRIP_TILES = 1, STRIP_BYTES = 0, ZERO = 0, RING = 2;
    static constexpr bool FLOATS = true, LONG_SCALE = false, WHOLE_BYTES = false, WIDE = true;
    using Header = NoHeader;

    u32 words[16];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 16; i++) words[i] = 0;
    }
    __device__ __forceinline__ void read(const u8* tile, int lane) {
#pragma unroll
        for (int v = 0; v < 4; v++) {
            uint4 four = load_streamed<uint4>(tile + v * 512 + lane * 16);
            words[4 * v] = four.x, words[4 * v + 1] = four.y, words[4 * v + 2] = four.z, words[4 * v + 3] = four.w;
        }
    }
    __device__ __forceinline__ void write(u8* tile, int lane) const {
        for (int v = 0; v < 4; v++)
            store_vector(tile + v * 512 + lane * 16, make_uint4(words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3]));
    }
    __device__ __forceinline__ void put(int row, int at, u32 q) { words[8 * row + at / 2] |= q << (at % 2 * 16); }
    static __device__ __forceinline__ u32 quant(const u8* block, int column) { return u16_at(block + 2 * column); }

    __device__ __forceinline__ float value(int row, int at) const {
        u32 word = words[8 * row + at / 2];
        if constexpr (BRAIN) return at % 2 ? high_bf16(word) : low_bf16(word);
        return half_at(word, at % 2);
    }
    __device__ __forceinline__ u32 pair(int row, int number) const {
        u32 word = words[8 * row + number];
        if constexpr (BRAIN) return word;
        return pack_bf16(half_at(word, 0), half_at(word, 1));
    }
};

struct BF16 : Floats<true> {};
struct F16 : Floats<false> {};

// ---- decoding ---------------------------------------------------------------------------------------------------------------

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
    else
        return __fmaf_rn(f.scale, static_cast<float>(static_cast<int>((tile.group(row, at / 4) >> (at % 4 * 8)) & 255u) - F::ZERO), f.minimum);
}

// ---- a matrix ---------------------------------------------------------------------------------------------------------------

__host__ __device__ constexpr int tiles_of(int columns) { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }

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

// Eight columns of a token, or zeros beyond the end of its row. Rows begin at multiples of 16 bytes, but with ANY_COLUMNS, where
// `columns` is no multiple of 8 and numbers are read one by one.
template <bool ANY_COLUMNS>
__device__ __forceinline__ uint4 load_columns(const bf16* token, int column, int columns) {
    if constexpr (!ANY_COLUMNS) {
        if (column < columns) return load_vector<uint4>(token + column);
        return make_uint4(0, 0, 0, 0);
    } else {
        u32 pairs[4] = {};
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (column + i < columns) pairs[i / 2] |= static_cast<u32>(__bfloat16_as_ushort(token[column + i])) << (i % 2 * 16);
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}
