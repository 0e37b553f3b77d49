// Runs the .cu files of backends/cuda/kernels on the CPU: g++ compiles them with this header before them.
//
// A CUDA thread is a fiber, blocks run one after another. Barriers, shuffles, cp.async, ldmatrix and mma.sync behave as on a GPU,
// but for what makes a wrong kernel visible: dynamic shared memory begins as NaNs, an asynchronous copy lands only when it is
// waited for (with seeds beyond 1: some at once, some then), fibers and blocks take turns in an order that the caller chooses,
// vectors at a wrong alignment, divergent barriers and warps, partial masks and touching memory that is not there are errors.
// emulated_device.py calls what the macro KERNEL_ENTRY makes.
#pragma once
#define EMULATED 1

#include <sys/mman.h>

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#define __global__ static
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __restrict__
#define __restrict__
// static shared memory would not be poisoned: kernels have dynamic shared memory only
#define __shared__ static_assert(false, "use SHARED");

#include "emulated_threads.h"

namespace emulated {

// What an argument is: the item of backends.cuda.device.Array that a pointer goes to ("*" for bytes of any kind), or the number.
template <class A>
constexpr const char* kind() {
    if constexpr (std::is_pointer_v<A>) {
        using To = std::remove_cv_t<std::remove_pointer_t<A>>;
        if constexpr (std::is_same_v<To, float>) return "*f32";
        else if constexpr (std::is_same_v<To, double>) return "*f64";
        else if constexpr (std::is_same_v<To, __nv_bfloat16>) return "*bf16";
        else if constexpr (std::is_same_v<To, __half>) return "*f16";
        else if constexpr (std::is_integral_v<To> && sizeof(To) == 4) return "*i32";
        else if constexpr (std::is_integral_v<To> && sizeof(To) == 8) return "*i64";
        else return "*";
    } else if constexpr (std::is_integral_v<A> && !std::is_same_v<A, bool>)
        return sizeof(A) == 4 ? "i32" : sizeof(A) == 8 ? "i64" : "no number that a launch takes";
    else
        return std::is_same_v<A, float> ? "f32" : "no number that a launch takes";
}

template <class F>
struct Call;
template <class... A>
struct Call<void (*)(A...)> {
    static constexpr size_t COUNT = sizeof...(A);
    static constexpr const char* KINDS[COUNT + 1] = {kind<A>()..., nullptr};
    template <void (*K)(A...), size_t... I>
    static void run(void** a, std::index_sequence<I...>) {
        K(*static_cast<std::remove_const_t<std::remove_reference_t<A>>*>(a[I])...);
    }
};

// ---- warp functions ------------------------------------------------------------------------------------------------------

inline Warp& my_warp() { return block.warps[current->number / 32]; }
inline int my_lane() { return current->number % 32; }
inline void whole(unsigned mask, const char* name) {
    if (mask != 0xffffffffu) fail("%s with the partial mask %08x", name, mask);
}

enum { SHUFFLE = 1, BALLOT, REDUCE, SYNC, LOAD_MATRIX, MULTIPLY };

template <class T>
inline T from_lane(T value, int lane, int site) {
    static_assert(sizeof(T) <= 64);
    auto mine = reinterpret_cast<unsigned char*>(my_warp().now().slot);
    memcpy(mine + my_lane() * sizeof(T), &value, sizeof value);
    Exchange& e = together(SHUFFLE, "a shuffle", [](Exchange&) {}, site);
    T got;
    memcpy(&got, reinterpret_cast<unsigned char*>(e.slot) + lane * sizeof(T), sizeof got);
    return got;
}

inline float bf16_bits(uint32_t word) {
    float value;
    memcpy(&value, &word, 4);
    return value;
}

// Slots hold a, b and d of each lane; sums go from k = 0 to 15 and are added to d at the end. Rows of b and d are vectors,
// as this is what big products do most.
inline void multiply_warp(Exchange& w) {
    typedef float Row __attribute__((vector_size(32)));
    alignas(32) float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        uint32_t words[6];
        memcpy(words, w.slot[lane], sizeof words);
        for (int r = 0; r < 4; r++) {
            float* to = &a[g + 8 * (r & 1)][2 * t + 8 * (r >> 1)];
            to[0] = bf16_bits(words[r] << 16), to[1] = bf16_bits(words[r] & 0xffff0000u);
        }
        for (int r = 0; r < 2; r++) {
            b[2 * t + 8 * r][g] = bf16_bits(words[4 + r] << 16);
            b[2 * t + 8 * r + 1][g] = bf16_bits(words[4 + r] & 0xffff0000u);
        }
    }
    for (int m = 0; m < 16; m++) {
        Row sum{}, one;
        for (int k = 0; k < 16; k++) {
            memcpy(&one, b[k], sizeof one);
            sum += a[m][k] * one;
        }
        memcpy(d[m], &sum, sizeof sum);
    }
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        float sums[4];
        memcpy(sums, w.slot[lane] + 24, sizeof sums);
        for (int q = 0; q < 4; q++) sums[q] += d[g + 8 * (q / 2)][2 * t + (q & 1)];
        memcpy(w.result[lane], sums, sizeof sums);
    }
}

inline void load_matrix(unsigned (&r)[4], const void* row, bool transposed) {
    auto at = static_cast<const unsigned char*>(row);
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from an address that is no multiple of 16");
    if (at < block.shared || at + 16 > block.shared + block.shared_bytes) fail("ldmatrix from outside of shared memory");
    int lane = my_lane();
    memcpy(my_warp().now().slot[lane], row, 16);
    Exchange& e = together(LOAD_MATRIX, "ldmatrix", [](Exchange&) {});
    for (int m = 0; m < 4; m++)
        if (!transposed)
            memcpy(&r[m], e.slot[8 * m + lane / 4] + 4 * (lane % 4), 4);
        else {
            uint16_t pair[2];
            for (int i = 0; i < 2; i++) memcpy(&pair[i], e.slot[8 * m + 2 * (lane % 4) + i] + 2 * (lane / 4), 2);
            memcpy(&r[m], pair, 4);
        }
}

inline void check_aligned(const void* p, size_t size) {
    if (reinterpret_cast<uintptr_t>(p) % size) fail("a vector of %zu bytes at an address that is no multiple of it", size);
}

inline unsigned char* shared_at(size_t offset) {
    if (offset % 16) fail("SHARED at an offset that is no multiple of 16");
    if (offset >= block.shared_bytes) fail("SHARED begins at byte %zu of %zu", offset, block.shared_bytes);
    return block.shared + offset;
}

}  // namespace emulated

// A file that holds kernels ends with one KERNEL_ENTRY for each of them: emulated_device.py writes these lines.
#define KERNEL_ENTRY(NAME, ...)                                                                                              \
    extern "C" int NAME(const unsigned* grid, unsigned threads, size_t shared_bytes, void** arguments, unsigned seed) {     \
        using Type = emulated::Call<decltype(&__VA_ARGS__)>;                                                                \
        return emulated::launch(                                                                                            \
            [](void* a) { Type::template run<&__VA_ARGS__>(static_cast<void**>(a), std::make_index_sequence<Type::COUNT>{}); }, \
            arguments, grid, threads, shared_bytes, seed);                                                                  \
    }                                                                                                                       \
    extern "C" const char* NAME##_argument(size_t i) {                                                                      \
        using Type = emulated::Call<decltype(&__VA_ARGS__)>;                                                                \
        return i < Type::COUNT ? Type::KINDS[i] : nullptr;                                                                  \
    }

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::block.index)
#define blockDim (emulated::block.size)
#define gridDim (emulated::block.grid)

#define SHARED(T, name, offset) T* name = reinterpret_cast<T*>(emulated::shared_at(offset))
#define CHECK_ALIGNED(T, p) emulated::check_aligned(p, alignof(T) > sizeof(T) ? alignof(T) : sizeof(T))

// These know the place in the text that they are called from: threads must meet at the same one.
#define __syncthreads() emulated::barrier(__COUNTER__)
#define __syncwarp(...) emulated::syncwarp(__COUNTER__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) emulated::shuffle(__COUNTER__, __VA_ARGS__)
#define __shfl_xor_sync(...) emulated::shuffle_xor(__COUNTER__, __VA_ARGS__)
#define __shfl_down_sync(...) emulated::shuffle_down(__COUNTER__, __VA_ARGS__)
#define __shfl_up_sync(...) emulated::shuffle_up(__COUNTER__, __VA_ARGS__)
#define __ballot_sync(...) emulated::ballot(__COUNTER__, __VA_ARGS__)
#define __reduce_max_sync(...) emulated::reduce_max(__COUNTER__, __VA_ARGS__)
namespace emulated {
inline void syncwarp(int site, unsigned mask = 0xffffffffu) {
    whole(mask, "__syncwarp");
    together(SYNC, "__syncwarp", [](Exchange&) {}, site);
}
template <class T>
inline T shuffle(int site, unsigned mask, T value, int lane) {
    whole(mask, "__shfl_sync");
    return from_lane(value, lane & 31, site);
}
template <class T>
inline T shuffle_xor(int site, unsigned mask, T value, int far) {
    whole(mask, "__shfl_xor_sync");
    return from_lane(value, my_lane() ^ far, site);
}
template <class T>
inline T shuffle_down(int site, unsigned mask, T value, int far) {
    whole(mask, "__shfl_down_sync");
    int lane = my_lane();
    return from_lane(value, lane + far < 32 ? lane + far : lane, site);
}
template <class T>
inline T shuffle_up(int site, unsigned mask, T value, int far) {
    whole(mask, "__shfl_up_sync");
    int lane = my_lane();
    return from_lane(value, lane - far >= 0 ? lane - far : lane, site);
}
inline unsigned ballot(int site, unsigned mask, int yes) {
    whole(mask, "__ballot_sync");
    my_warp().now().slot[my_lane()][0] = yes != 0;
    Exchange& e = together(BALLOT, "__ballot_sync", [](Exchange& w) {
        unsigned bits = 0;
        for (int i = 0; i < 32; i++) bits |= unsigned(w.slot[i][0]) << i;
        memcpy(w.result[0], &bits, 4);
    }, site);
    unsigned bits;
    memcpy(&bits, e.result[0], 4);
    return bits;
}
inline unsigned reduce_max(int site, unsigned mask, unsigned value) {
    whole(mask, "__reduce_max_sync");
    memcpy(my_warp().now().slot[my_lane()], &value, 4);
    Exchange& e = together(REDUCE, "__reduce_max_sync", [](Exchange& w) {
        unsigned most = 0, one;
        for (int i = 0; i < 32; i++) memcpy(&one, w.slot[i], 4), most = one > most ? one : most;
        memcpy(w.result[0], &most, 4);
    }, site);
    unsigned most;
    memcpy(&most, e.result[0], 4);
    return most;
}
}  // namespace emulated
inline void __threadfence() {}
inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline int __all_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) == 0xffffffffu; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline float __uint_as_float(unsigned x) { float f; memcpy(&f, &x, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned x; memcpy(&x, &f, 4); return x; }
inline int __float_as_int(float f) { int x; memcpy(&x, &f, 4); return x; }
inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    uint64_t both = (uint64_t(b) << 32) | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= unsigned((both >> (8 * ((s >> (4 * i)) & 7))) & 0xff) << (8 * i);
    return r;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { volatile float p = a * b; return p; }
inline float __fadd_rn(float a, float b) { volatile float s = a + b; return s; }
inline float __fsub_rn(float a, float b) { volatile float s = a - b; return s; }
inline float __fdiv_rn(float a, float b) { volatile float q = a / b; return q; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
template <class T>
inline T __ldg(const T* p) { return *p; }
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }
template <class T>
inline T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
template <class T>
inline T atomicMax(T* p, T v) { T old = *p; if (v > old) *p = v; return old; }
template <class T>
inline T atomicMin(T* p, T v) { T old = *p; if (v < old) *p = v; return old; }
template <class T>
inline T atomicExch(T* p, T v) { T old = *p; *p = v; return old; }
template <class T>
inline T atomicOr(T* p, T v) { T old = *p; *p = old | v; return old; }
template <class T>
inline T __ldcg(const T* p) { return *p; }
inline unsigned atomicInc(unsigned* p, unsigned most) { unsigned old = *p; *p = old >= most ? 0 : old + 1; return old; }
inline float fast_exp2(float x) { return std::exp2(x); }

template <class T>
inline T load_streamed(const void* p) {
    CHECK_ALIGNED(T, p);
    T v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void copy_async_16_or_zero(void* to, const void* from, bool there) {
    emulated::check_aligned(to, 16);
    if (there) emulated::check_aligned(from, 16);
    auto at = static_cast<unsigned char*>(to);
    if (at < emulated::block.shared || at + 16 > emulated::block.shared + emulated::block.shared_bytes)
        emulated::fail("cp.async to outside of shared memory");
    if (emulated::block.seed > 1 && emulated::by_chance() % 2) {      // a copy may also land at once
        if (there) memcpy(to, from, 16);
        else memset(to, 0, 16);
        return;
    }
    emulated::current->copies.push_back({to, from, there});
}
inline void copy_async_16(void* to, const void* from) { copy_async_16_or_zero(to, from, true); }
inline void copies_commit() { emulated::current->groups.push_back(emulated::current->copies.size()); }
template <int N>
inline void copies_wait() {
    emulated::Fiber* me = emulated::current;
    if (me->groups.size() <= N) return;
    size_t done = me->groups.size() - N, landed = me->groups[done - 1];
    for (size_t i = 0; i < landed; i++) {
        const emulated::Copy& copy = me->copies[i];
        if (copy.there) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    }
    me->copies.erase(me->copies.begin(), me->copies.begin() + landed);
    me->groups.erase(me->groups.begin(), me->groups.begin() + done);
    for (size_t& count : me->groups) count -= landed;
}
inline void load_matrix_x4(unsigned (&r)[4], const void* row) { emulated::load_matrix(r, row, false); }
inline void load_matrix_x4_transposed(unsigned (&r)[4], const void* row) { emulated::load_matrix(r, row, true); }
inline void multiply_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    unsigned char* mine = emulated::my_warp().now().slot[emulated::my_lane()];
    memcpy(mine, a, 16);
    memcpy(mine + 16, &b0, 4);
    memcpy(mine + 20, &b1, 4);
    memcpy(mine + 24, d, 16);
    emulated::Exchange& e = emulated::together(emulated::MULTIPLY, "mma", emulated::multiply_warp);
    memcpy(d, e.result[emulated::my_lane()], 16);
}
