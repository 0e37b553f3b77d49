// Runs the .cu files of backends/cuda/kernels on the CPU: g++ compiles them with this header before them.
//
// A CUDA thread is a fiber, blocks run one after another. Barriers, shuffles, cp.async, ldmatrix and mma.sync behave as on a GPU,
// but for what makes a wrong kernel visible: dynamic shared memory begins as NaNs, an asynchronous copy lands only when it is
// waited for, fibers take turns in an order that the caller chooses, vectors at a wrong alignment, divergent barriers, partial
// masks and touching memory that is not there are errors. emulated_device.py calls what the macro KERNEL_ENTRY makes.
#pragma once
#define EMULATED 1

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
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __restrict__
#define __restrict__
// static shared memory would not be poisoned: kernels have dynamic shared memory only
#define __shared__ static_assert(false, "use SHARED");

namespace emulated {

constexpr size_t STACK_BYTES = 128 << 10;

struct Copy { void* to; const void* from; bool there; };

struct Fiber {
    void* stack_pointer = nullptr;
    uint3 thread{};
    int number = 0;
    bool done = false;
    std::vector<char> stack;
    std::vector<Copy> copies;
    std::vector<size_t> groups;      // how many of the copies belong to the groups committed so far
};

struct Warp {
    unsigned generation = 0;
    int arrived = 0, alive = 0;
    int what = 0;                    // the warp function that its threads are in: all must be in the same one
    alignas(16) unsigned char slot[32][64];
    alignas(16) unsigned char result[32][64];
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<int> order;          // turn -> thread; place -> turn
    std::vector<int> place;
    dim3 size, grid;
    uint3 index{};
    int threads = 0, alive = 0, arrived = 0;
    unsigned generation = 0;
    std::vector<unsigned char> memory;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    long idle = 0;                   // turns since a thread came further
    void* main_stack = nullptr;
};

static Block block;
static Fiber* current;
static void (*entry)(void*);
static void* entry_arguments;
static char message[512];
static sigjmp_buf way_out;
static volatile bool running = false;

extern "C" void emulated_swap(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulated_swap
.hidden emulated_swap
emulated_swap:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl emulated_swap
.hidden emulated_swap
emulated_swap:
 sub sp, sp, #160
 stp x19, x20, [sp, #0]
 stp x21, x22, [sp, #16]
 stp x23, x24, [sp, #32]
 stp x25, x26, [sp, #48]
 stp x27, x28, [sp, #64]
 stp x29, x30, [sp, #80]
 stp d8, d9, [sp, #96]
 stp d10, d11, [sp, #112]
 stp d12, d13, [sp, #128]
 stp d14, d15, [sp, #144]
 mov x9, sp
 str x9, [x0]
 mov sp, x1
 ldp x19, x20, [sp, #0]
 ldp x21, x22, [sp, #16]
 ldp x23, x24, [sp, #32]
 ldp x25, x26, [sp, #48]
 ldp x27, x28, [sp, #64]
 ldp x29, x30, [sp, #80]
 ldp d8, d9, [sp, #96]
 ldp d10, d11, [sp, #112]
 ldp d12, d13, [sp, #128]
 ldp d14, d15, [sp, #144]
 add sp, sp, #160
 ret
)");
#else
#error "the emulated device switches fibers on x86-64 and aarch64 only"
#endif

// Leave the kernel with an error; its fibers are never resumed.
[[noreturn]] inline void fail(const char* format, ...) {
    char what[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    if (current)
        snprintf(message, sizeof message, "%s (block %u, %u, %u, thread %d)", what, block.index.x, block.index.y, block.index.z, current->number);
    else
        snprintf(message, sizeof message, "%s", what);
    siglongjmp(way_out, 1);
}

inline void go(Fiber* to) {
    Fiber* from = current;
    current = to;
    if (from != to) emulated_swap(&from->stack_pointer, to->stack_pointer);
}

inline Fiber* after(int number) {
    int turn = block.place[number];
    for (int k = 1; k <= block.threads; k++) {
        Fiber& next = block.fibers[block.order[(turn + k) % block.threads]];
        if (!next.done) return &next;
    }
    return nullptr;
}

inline void yield(const char* where) {
    if (++block.idle > 4L * block.threads + 64) fail("no thread comes further: some wait in %s, others never come there", where);
    go(after(current->number));
}

inline void release_block() {
    if (block.alive > 0 && block.arrived >= block.alive) {
        block.arrived = 0;
        block.generation++;
    }
}

inline void barrier() {
    unsigned generation = block.generation;
    block.arrived++;
    block.idle = 0;
    release_block();
    while (block.generation == generation) yield("__syncthreads");
}

// All 32 threads of a warp come here with the same `what`; the last one does work() from slots to results, then all go on. A
// result stays until all have come to the next warp function, so that each has read its own by then.
template <class Work>
inline void together(int what, const char* name, Work work) {
    Warp& warp = block.warps[current->number / 32];
    if (warp.arrived == 0) warp.what = what;
    if (warp.what != what) fail("a warp's threads are in different functions, one of them %s", name);
    unsigned generation = warp.generation;
    warp.arrived++;
    block.idle = 0;
    if (warp.arrived == warp.alive) {
        if (warp.alive != 32) fail("%s by %d threads of a warp: all 32 must come", name, warp.alive);
        work(warp);
        warp.arrived = 0;
        warp.generation++;
    }
    while (warp.generation == generation) yield(name);
}

static void thread_main() {
    entry(entry_arguments);
    Fiber* me = current;
    me->done = true;
    block.idle = 0;
    block.alive--;
    Warp& warp = block.warps[me->number / 32];
    warp.alive--;
    if (warp.arrived) fail("a thread ends while others of its warp wait for it");
    release_block();
    if (Fiber* next = after(me->number)) {
        current = next;
        emulated_swap(&me->stack_pointer, next->stack_pointer);
    } else {
        void* unused;
        current = nullptr;
        emulated_swap(&unused, block.main_stack);
    }
    abort();
}

inline void prepare_stack(Fiber& fiber) {
    if (fiber.stack.empty()) fiber.stack.resize(STACK_BYTES);
    uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack.data()) + STACK_BYTES) & ~uintptr_t(15);
    void** place = reinterpret_cast<void**>(top);
#if defined(__x86_64__)
    *--place = nullptr;
    *--place = reinterpret_cast<void*>(thread_main);
    for (int k = 0; k < 6; k++) *--place = nullptr;
#else
    place -= 20;
    memset(place, 0, 160);
    place[11] = reinterpret_cast<void*>(thread_main);    // x30
#endif
    fiber.stack_pointer = place;
}

inline void run_block(uint3 index) {
    block.index = index;
    block.alive = block.threads;
    block.arrived = 0;
    block.idle = 0;
    for (Warp& warp : block.warps) warp.arrived = warp.alive = 0;
    memset(block.shared, 0xFF, block.shared_bytes);
    for (int i = 0; i < block.threads; i++) {
        Fiber& fiber = block.fibers[i];
        fiber.number = i;
        fiber.thread = {unsigned(i), 0, 0};
        fiber.done = false;
        fiber.copies.clear();
        fiber.groups.clear();
        block.warps[i / 32].alive++;
        prepare_stack(fiber);
    }
    current = &block.fibers[block.order[0]];
    emulated_swap(&block.main_stack, current->stack_pointer);
}

// Turns: 0 ascending, 1 descending, else shuffled by the seed.
inline void choose_order(int threads, unsigned seed) {
    block.order.resize(threads);
    block.place.resize(threads);
    for (int i = 0; i < threads; i++) block.order[i] = seed == 1 ? threads - 1 - i : i;
    if (seed > 1) {
        uint64_t state = seed * 0x9E3779B97F4A7C15ull;
        for (int i = threads - 1; i > 0; i--) {
            state = state * 6364136223846793005ull + 1442695040888963407ull;
            std::swap(block.order[i], block.order[(state >> 33) % (i + 1)]);
        }
    }
    for (int turn = 0; turn < threads; turn++) block.place[block.order[turn]] = turn;
}

inline void on_fault(int, siginfo_t* info, void*) {
    if (!running) {
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    snprintf(
        message, sizeof message, "memory that is not there was touched: address %p (block %u, %u, %u, thread %d)", info->si_addr,
        block.index.x, block.index.y, block.index.z, current ? current->number : -1);
    siglongjmp(way_out, 1);
}

inline int launch(void (*kernel)(void*), void* arguments, const unsigned* grid, unsigned threads, size_t shared_bytes, unsigned seed) {
    static std::vector<char> signal_stack(64 << 10);
    entry = kernel;
    entry_arguments = arguments;
    block.size = dim3(threads);
    block.grid = dim3(grid[0], grid[1], grid[2]);
    block.threads = threads;
    block.fibers.resize(threads);
    block.warps.resize((threads + 31) / 32);
    block.memory.resize(shared_bytes + 128);
    block.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block.memory.data()) + 127) & ~uintptr_t(127));
    block.shared_bytes = shared_bytes;
    choose_order(threads, seed);
    message[0] = 0;

    stack_t stack{}, old_stack{};
    stack.ss_sp = signal_stack.data();
    stack.ss_size = signal_stack.size();
    struct sigaction action{}, old_segv{}, old_bus{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaltstack(&stack, &old_stack);
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
    running = true;
    int failed = sigsetjmp(way_out, 1);
    if (!failed)
        for (unsigned z = 0; z < grid[2]; z++)
            for (unsigned y = 0; y < grid[1]; y++)
                for (unsigned x = 0; x < grid[0]; x++) run_block({x, y, z});
    running = false;
    current = nullptr;
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&old_stack, nullptr);
    return failed;
}

template <class F>
struct Call;
template <class... A>
struct Call<void (*)(A...)> {
    static constexpr size_t COUNT = sizeof...(A);
    static constexpr size_t SIZES[COUNT + 1] = {sizeof(A)..., 0};
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

enum { SHUFFLE = 1, BALLOT, SYNC, LOAD_MATRIX, MULTIPLY };

template <class T>
inline T from_lane(T value, int lane) {
    static_assert(sizeof(T) <= 64);
    Warp& warp = my_warp();
    memcpy(warp.slot[my_lane()], &value, sizeof value);
    together(SHUFFLE, "a shuffle", [](Warp& w) { memcpy(w.result, w.slot, sizeof w.slot); });
    T got;
    memcpy(&got, warp.result[lane], sizeof got);
    return got;
}

inline float bf16_at(const unsigned char* p) {
    uint16_t half;
    memcpy(&half, p, 2);
    uint32_t word = uint32_t(half) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

inline void multiply_warp(Warp& w) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 2; i++) {
            int g = lane / 4, t = lane % 4;
            for (int r = 0; r < 4; r++) a[g + 8 * (r & 1)][2 * t + i + 8 * (r >> 1)] = bf16_at(w.slot[lane] + 4 * r + 2 * i);
            for (int r = 0; r < 2; r++) b[2 * t + i + 8 * r][g] = bf16_at(w.slot[lane] + 16 + 4 * r + 2 * i);
        }
    float d[16][8];
    for (int m = 0; m < 16; m++) {
        for (int n = 0; n < 8; n++) d[m][n] = 0;
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) d[m][n] += a[m][k] * b[k][n];
    }
    for (int lane = 0; lane < 32; lane++)
        for (int q = 0; q < 4; q++) {
            float before;
            memcpy(&before, w.slot[lane] + 24 + 4 * q, 4);
            float after = before + d[lane / 4 + 8 * (q / 2)][lane % 4 * 2 + (q & 1)];
            memcpy(w.result[lane] + 4 * q, &after, 4);
        }
}

inline void load_matrix(unsigned (&r)[4], const void* row, bool transposed) {
    Warp& warp = my_warp();
    auto at = static_cast<const unsigned char*>(row);
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from an address that is no multiple of 16");
    if (at < block.shared || at + 16 > block.shared + block.shared_bytes) fail("ldmatrix from outside of shared memory");
    memcpy(warp.slot[my_lane()], row, 16);
    together(LOAD_MATRIX, "ldmatrix", [](Warp& w) { memcpy(w.result, w.slot, sizeof w.slot); });
    int lane = my_lane();
    for (int m = 0; m < 4; m++)
        if (!transposed)
            memcpy(&r[m], warp.result[8 * m + lane / 4] + 4 * (lane % 4), 4);
        else {
            uint16_t pair[2];
            for (int i = 0; i < 2; i++) memcpy(&pair[i], warp.result[8 * m + 2 * (lane % 4) + i] + 2 * (lane / 4), 2);
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
    extern "C" size_t NAME##_argument(size_t i) {                                                                           \
        using Type = emulated::Call<decltype(&__VA_ARGS__)>;                                                                \
        return i < Type::COUNT ? Type::SIZES[i] : 0;                                                                        \
    }
extern "C" const char* emulated_message() { return emulated::message; }

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::block.index)
#define blockDim (emulated::block.size)
#define gridDim (emulated::block.grid)

#define SHARED(T, name, offset) T* name = reinterpret_cast<T*>(emulated::shared_at(offset))
#define CHECK_ALIGNED(T, p) emulated::check_aligned(p, alignof(T) > sizeof(T) ? alignof(T) : sizeof(T))

inline void __syncthreads() { emulated::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulated::whole(mask, "__syncwarp");
    emulated::together(emulated::SYNC, "__syncwarp", [](emulated::Warp&) {});
}
inline void __threadfence() {}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane) {
    emulated::whole(mask, "__shfl_sync");
    return emulated::from_lane(value, lane & 31);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int far) {
    emulated::whole(mask, "__shfl_xor_sync");
    return emulated::from_lane(value, emulated::my_lane() ^ far);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int far) {
    emulated::whole(mask, "__shfl_down_sync");
    int lane = emulated::my_lane();
    return emulated::from_lane(value, lane + far < 32 ? lane + far : lane);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, int far) {
    emulated::whole(mask, "__shfl_up_sync");
    int lane = emulated::my_lane();
    return emulated::from_lane(value, lane - far >= 0 ? lane - far : lane);
}
inline unsigned __ballot_sync(unsigned mask, int yes) {
    emulated::whole(mask, "__ballot_sync");
    emulated::Warp& warp = emulated::my_warp();
    warp.slot[emulated::my_lane()][0] = yes != 0;
    emulated::together(emulated::BALLOT, "__ballot_sync", [](emulated::Warp& w) {
        unsigned bits = 0;
        for (int i = 0; i < 32; i++) bits |= unsigned(w.slot[i][0]) << i;
        memcpy(w.result[0], &bits, 4);
    });
    unsigned bits;
    memcpy(&bits, warp.result[0], 4);
    return bits;
}
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
inline double __dadd_rn(double a, double b) { return a + b; }
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
inline T atomicExch(T* p, T v) { T old = *p; *p = v; return old; }
template <class T>
inline T atomicOr(T* p, T v) { T old = *p; *p = old | v; return old; }

inline void copy_async_16_or_zero(void* to, const void* from, bool there) {
    emulated::check_aligned(to, 16);
    if (there) emulated::check_aligned(from, 16);
    auto at = static_cast<unsigned char*>(to);
    if (at < emulated::block.shared || at + 16 > emulated::block.shared + emulated::block.shared_bytes)
        emulated::fail("cp.async to outside of shared memory");
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
    emulated::Warp& warp = emulated::my_warp();
    unsigned char* mine = warp.slot[emulated::my_lane()];
    memcpy(mine, a, 16);
    memcpy(mine + 16, &b0, 4);
    memcpy(mine + 20, &b1, 4);
    memcpy(mine + 24, d, 16);
    emulated::together(emulated::MULTIPLY, "mma", emulated::multiply_warp);
    memcpy(d, warp.result[emulated::my_lane()], 16);
}
