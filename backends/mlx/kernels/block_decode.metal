// GGUF blocks, read eight neighbouring weights at a time: what all products with native blocks stand on.
//
// A row is made of units of 32 weights; a block has 8 units or is one. A block of 8 is two parts, a part four rounds of a unit
// each; i is 0, 8, 16 or 24 of a unit. So eight lanes, each with a part and an i, read every byte of codes once in four rounds.
// A weight is step * code - below; codes come as bytes. Blocks begin at multiples of 16 (Q4_K, Q5_K), of 8 (IQ4_XS), of 4
// (Q2_K, Q4_1, Q5_1) and of 2 (the others). KIND: the number that metal_products.py gives a type. Formats: ggml-common.h.
#define UNROLLED _Pragma("clang loop unroll(full)")      // loops over arrays that must stay in registers

namespace rillet {

template <int KIND> struct Block;

inline float half_at(const device uint8_t* from) { return float(*reinterpret_cast<const device half*>(from)); }
inline uint pair_at(const device uint8_t* from) { return *reinterpret_cast<const device ushort*>(from); }

// Eight bytes at a multiple of ALIGNED, in the widest loads that it allows.
template <int ALIGNED> inline uint2 eight_at(const device uint8_t* from) {
    if (ALIGNED == 8) return *reinterpret_cast<const device uint2*>(from);
    uint2 all;
    if (ALIGNED == 4) {
        all.x = *reinterpret_cast<const device uint*>(from);
        all.y = *reinterpret_cast<const device uint*>(from + 4);
    } else {
        all.x = pair_at(from) | pair_at(from + 2) << 16;
        all.y = pair_at(from + 4) | pair_at(from + 6) << 16;
    }
    return all;
}

// Blocks that are one unit have no parts and rounds.
struct Unit {
    static constant constexpr int UNITS = 1;
};
struct Units {
    static constant constexpr int UNITS = 8;
};

// 84 bytes: 16 of scale and minimum (4 bits each), 64 of weights (2 bits), scale of scales, scale of minima.
template <> struct Block<2> : Units {
    static constant constexpr int BYTES = 84;
    static uint2 codes(const device uint8_t* block, int part, int round, int i) {
        return eight_at<4>(block + 16 + 32 * part + i) >> uint(2 * round) & 0x03030303u;
    }
    static void scale(const device uint8_t* block, int part, int round, int i, thread float& step, thread float& below) {
        const uint both = block[8 * part + 2 * round + i / 16];
        step = half_at(block + 80) * float(both & 15);
        below = half_at(block + 82) * float(both >> 4);
    }
};

// 110 bytes: 32 of high bits (0 means minus 4), 64 of weights (2 bits), 12 of scales (6 bits, minus 32), scale of scales.
template <> struct Block<3> : Units {
    static constant constexpr int BYTES = 110;
    static uint2 codes(const device uint8_t* block, int part, int round, int i) {
        const uint2 low = eight_at<2>(block + 32 + 32 * part + i) >> uint(2 * round) & 0x03030303u;
        return low | (eight_at<2>(block + i) >> uint(4 * part + round) & 0x01010101u) << 2u;
    }
    static void scale(const device uint8_t* block, int part, int round, int i, thread float& step, thread float& below) {
        const int number = 8 * part + 2 * round + i / 16;
        const uint low4 = block[96 + number % 8] >> (number / 8 * 4) & 15;
        const uint high2 = block[104 + number % 4] >> (number / 4 * 2) & 3;
        step = half_at(block + 108) * float(int(low4 | high2 << 4) - 32);
        below = 4.0f * step;
    }
};

// The 8 scales and 8 minima of Q4_K and Q5_K: 6 bits each in 12 bytes, behind the block's own two. The last four have their
// low 4 bits in the third word, their high 2 in the first and the second one.
struct Pairs {
    static void scale(const device uint8_t* block, int part, int round, thread float& step, thread float& below) {
        const device uint* words = reinterpret_cast<const device uint*>(block);
        const uint first = words[1], second = words[2], third = words[3];
        const uint scales = part == 0 ? first & 0x3F3F3F3Fu : (third & 0x0F0F0F0Fu) | (first >> 2 & 0x30303030u);
        const uint minima = part == 0 ? second & 0x3F3F3F3Fu : (third >> 4 & 0x0F0F0F0Fu) | (second >> 2 & 0x30303030u);
        step = half_at(block) * float(scales >> 8 * round & 255);
        below = half_at(block + 2) * float(minima >> 8 * round & 255);
    }
};

// 144 bytes: scale of scales, scale of minima, 12 of scales and minima, 128 of weights (4 bits).
template <> struct Block<4> : Units {
    static constant constexpr int BYTES = 144;
    static uint2 codes(const device uint8_t* block, int part, int round, int i) {
        return eight_at<8>(block + 16 + 64 * part + round / 2 * 32 + i) >> uint(round % 2 * 4) & 0x0F0F0F0Fu;
    }
    static void scale(const device uint8_t* block, int part, int round, int, thread float& step, thread float& below) {
        Pairs::scale(block, part, round, step, below);
    }
};

// 176 bytes: as Q4_K, with 32 of high bits before the weights.
template <> struct Block<5> : Units {
    static constant constexpr int BYTES = 176;
    static uint2 codes(const device uint8_t* block, int part, int round, int i) {
        const uint2 low = eight_at<8>(block + 48 + 64 * part + round / 2 * 32 + i) >> uint(round % 2 * 4) & 0x0F0F0F0Fu;
        return low | (eight_at<8>(block + 16 + i) >> uint(4 * part + round) & 0x01010101u) << 4u;
    }
    static void scale(const device uint8_t* block, int part, int round, int, thread float& step, thread float& below) {
        Pairs::scale(block, part, round, step, below);
    }
};

// 210 bytes: 128 of low 4 bits, 64 of high 2 bits, 16 of scales (int8), scale of scales. Weights are minus 32.
template <> struct Block<6> : Units {
    static constant constexpr int BYTES = 210;
    static uint2 codes(const device uint8_t* block, int part, int round, int i) {
        const uint2 low = eight_at<2>(block + 64 * part + round % 2 * 32 + i) >> uint(round / 2 * 4) & 0x0F0F0F0Fu;
        return low | (eight_at<2>(block + 128 + 32 * part + i) >> uint(2 * round) & 0x03030303u) << 4u;
    }
    static void scale(const device uint8_t* block, int part, int round, int i, thread float& step, thread float& below) {
        const uint byte = block[192 + 8 * part + 2 * round + i / 16];
        step = half_at(block + 208) * float(int(byte << 24) >> 24);
        below = 32.0f * step;
    }
};

// 16 bytes of 4 bits at a multiple of ALIGNED: the low ones are the first 16 weights of a unit, the high ones the others.
template <int ALIGNED> inline uint2 nibbles_at(const device uint8_t* from, int i) {
    return eight_at<ALIGNED>(from + i % 16) >> uint(i / 16 * 4) & 0x0F0F0F0Fu;
}

// Bits i to i + 7 of 32, each the fifth of a byte.
inline uint2 fifth_bits(uint bits, int i) {
    const uint eight = bits >> uint(i);
    uint2 spread;                        // bit k of four comes to byte k: 4 copies, 7 apart
    spread.x = (eight & 15u) * 0x00204081u & 0x01010101u;
    spread.y = (eight >> 4 & 15u) * 0x00204081u & 0x01010101u;
    return spread << 4u;
}

// The 16 levels of IQ4_NL and IQ4_XS, plus 128.
constant constexpr uint8_t LEVELS[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
inline uint levels_of(uint four) {
    return LEVELS[four & 15] | uint(LEVELS[four >> 8 & 15]) << 8 | uint(LEVELS[four >> 16 & 15]) << 16
        | uint(LEVELS[four >> 24 & 15]) << 24;
}
inline uint2 levels_of(uint2 codes) {
    uint2 levels;
    levels.x = levels_of(codes.x);
    levels.y = levels_of(codes.y);
    return levels;
}

// Q4_0, 18 bytes: scale, 16 of weights (4 bits, minus 8).
template <> struct Block<40> : Unit {
    static constant constexpr int BYTES = 18;
    static uint2 codes(const device uint8_t* block, int, int, int i) { return nibbles_at<2>(block + 2, i); }
    static void scale(const device uint8_t* block, int, int, int, thread float& step, thread float& below) {
        step = half_at(block);
        below = 8.0f * step;
    }
};

// Q4_1, 20 bytes: scale, what is added, 16 of weights (4 bits).
template <> struct Block<41> : Unit {
    static constant constexpr int BYTES = 20;
    static uint2 codes(const device uint8_t* block, int, int, int i) { return nibbles_at<4>(block + 4, i); }
    static void scale(const device uint8_t* block, int, int, int, thread float& step, thread float& below) {
        step = half_at(block);
        below = -half_at(block + 2);
    }
};

// Q5_0, 22 bytes: scale, 4 of fifth bits, 16 of the others; minus 16.
template <> struct Block<50> : Unit {
    static constant constexpr int BYTES = 22;
    static uint2 codes(const device uint8_t* block, int, int, int i) {
        return nibbles_at<2>(block + 6, i) | fifth_bits(pair_at(block + 2) | pair_at(block + 4) << 16, i);
    }
    static void scale(const device uint8_t* block, int, int, int, thread float& step, thread float& below) {
        step = half_at(block);
        below = 16.0f * step;
    }
};

// Q5_1, 24 bytes: scale, what is added, 4 of fifth bits, 16 of the others.
template <> struct Block<51> : Unit {
    static constant constexpr int BYTES = 24;
    static uint2 codes(const device uint8_t* block, int, int, int i) {
        return nibbles_at<4>(block + 8, i) | fifth_bits(*reinterpret_cast<const device uint*>(block + 4), i);
    }
    static void scale(const device uint8_t* block, int, int, int, thread float& step, thread float& below) {
        step = half_at(block);
        below = -half_at(block + 2);
    }
};

// Q8_0, 34 bytes: scale, 32 of weights (int8, here plus 128).
template <> struct Block<80> : Unit {
    static constant constexpr int BYTES = 34;
    static uint2 codes(const device uint8_t* block, int, int, int i) { return eight_at<2>(block + 2 + i) ^ 0x80808080u; }
    static void scale(const device uint8_t* block, int, int, int, thread float& step, thread float& below) {
        step = half_at(block);
        below = 128.0f * step;
    }
};

// IQ4_NL, 18 bytes: scale, 16 of levels (4 bits).
template <> struct Block<90> : Unit {
    static constant constexpr int BYTES = 18;
    static uint2 codes(const device uint8_t* block, int, int, int i) { return levels_of(nibbles_at<2>(block + 2, i)); }
    static void scale(const device uint8_t* block, int, int, int, thread float& step, thread float& below) {
        step = half_at(block);
        below = 128.0f * step;
    }
};

// IQ4_XS, 136 bytes: scale of scales, 2 of the scales' high 2 bits, 4 of their low 4, 128 of levels. Scales are minus 32.
template <> struct Block<91> : Units {
    static constant constexpr int BYTES = 136;
    static uint2 codes(const device uint8_t* block, int part, int round, int i) {
        return levels_of(nibbles_at<8>(block + 8 + 64 * part + 16 * round, i));
    }
    static void scale(const device uint8_t* block, int part, int round, int, thread float& step, thread float& below) {
        const int unit = 4 * part + round;
        const uint low4 = block[4 + unit / 2] >> (unit % 2 * 4) & 15;
        const uint high2 = pair_at(block + 2) >> (2 * unit) & 3;
        step = half_at(block) * float(int(low4 | high2 << 4) - 32);
        below = 128.0f * step;
    }
};

inline float code_at(uint2 codes, int j) { return float((j < 4 ? codes.x : codes.y) >> j % 4 * 8 & 255); }

}  // namespace rillet
