// Unsigned integers that sort as floats do, and back; -0 and 0 are one key.
namespace rillet {

inline uint key_of(float number) {
    const uint bits = as_type<uint>(number);
    if (bits == 0x80000000u) return bits;            // -0 as 0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline float number_of(uint key) { return as_type<float>(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

}  // namespace rillet
