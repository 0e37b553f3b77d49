// How weights rest on the device, one struct for each storage type. repack.cu makes it so, fragments.cuh decodes it.
//
// Integers q lie in the blob in planes, the file's own scales and minima in the strip, as bits in another order. A weight is
// (q - ZERO) scale + minimum, as gguf.quants has it. Block layouts: ggml-common.h of llama.cpp.
#pragma once

#include "strips.cuh"

// ---- blocks of 32 columns ------------------------------------------------------------------------------------------------

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

// ---- blocks of 256 columns -----------------------------------------------------------------------------------------------

// What the types of 256 columns share: one header for four tiles.
template <class QUANTS, int BYTES, int ZERO_POINT, int STRIP, class HEADER>
struct SuperBlocks : QUANTS {
    static constexpr int BLOCK = 256, BLOCK_BYTES = BYTES, STRIP_TILES = SUPER_TILES, STRIP_BYTES = STRIP, ZERO = ZERO_POINT;
    static constexpr bool FLOATS = false, LONG_SCALE = false;
    using Header = HEADER;
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

// ---- floats --------------------------------------------------------------------------------------------------------------

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
    static constexpr int BLOCK = 8, BLOCK_BYTES = 16, TILE_BYTES = 2048, RING = 2;
    static constexpr int STRIP_TILES = 1, STRIP_BYTES = 0, ZERO = 0;
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
            store_vector(
                tile + v * 512 + lane * 16, make_uint4(words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3])
            );
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
