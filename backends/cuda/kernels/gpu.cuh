// What every kernel of this folder stands on: types, warps, shared memory, asynchronous copies, matrix products.
//
// The same files are compiled by NVRTC for a GPU and by g++ for tests (EMULATED, see tests/cuda/emulated.h, which defines the
// second half of this header for the CPU). So the rules: all shared memory is dynamic (SHARED), vectors are read and
// written by load_vector and store_vector, warp functions are called by whole warps, PTX stands in this file only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

using bf16 = __nv_bfloat16;
using f16 = __half;
using i64 = long long;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

#ifndef EMULATED

// T* name: the block's dynamic shared memory from a byte offset on (a constant, a multiple of 16). One per kernel and offset.
#define SHARED(T, name, offset)                               \
    extern __shared__ __align__(128) unsigned char shared_memory[]; \
    T* name = reinterpret_cast<T*>(shared_memory + (offset))

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, visible after copies_wait and a barrier. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// The same, or zeros where `there` is false: nothing is read then.
__device__ __forceinline__ void copy_async_16_or_zero(void* to, const void* from, bool there) {
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most N of this thread's committed groups are under way.
template <int N>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void load_matrix_x4_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8). Lane l = 4 g + t has a: rows g, g + 8 (a0, a1; a2, a3: columns + 8) x columns 2t, 2t + 1;
// b: rows 2t, 2t + 1 (b1: + 8) of column g; d: row g (d2, d3: g + 8), columns 2t, 2t + 1.
__device__ __forceinline__ void multiply_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2 ^ x to about 2 units in the last place; 0 for -inf and where the result is no normal number.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What is read once, past the first cache; T is a u32, uint2 or uint4. No kernel under way may write there.
template <class T>
__device__ __forceinline__ T load_streamed(const void* p);
template <>
__device__ __forceinline__ u32 load_streamed<u32>(const void* p) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)));
    return v;
}
template <>
__device__ __forceinline__ uint2 load_streamed<uint2>(const void* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(__cvta_generic_to_global(p)));
    return v;
}
template <>
__device__ __forceinline__ uint4 load_streamed<uint4>(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(p)));
    return v;
}

#define CHECK_ALIGNED(T, p)

#endif  // EMULATED

template <class T>
__device__ __forceinline__ T load_vector(const void* p) {
    CHECK_ALIGNED(T, p);
    return *reinterpret_cast<const T*>(p);
}

template <class T>
__device__ __forceinline__ void store_vector(void* p, const T& value) {
    CHECK_ALIGNED(T, p);
    *reinterpret_cast<T*>(p) = value;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int far = 16; far > 0; far >>= 1) v += __shfl_xor_sync(ALL_LANES, v, far);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int far = 16; far > 0; far >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, far));
    return v;
}

// The sum over a block of whole warps, the same in every thread; `room` has 33 floats of shared memory.
__device__ __forceinline__ float block_sum(float v, float* room) {
    v = warp_sum(v);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    if (lane == 0) room[warp] = v;
    __syncthreads();
    if (warp == 0) {
        float total = warp_sum(lane < warps ? room[lane] : 0.0f);
        if (lane == 0) room[32] = total;
    }
    __syncthreads();
    return room[32];
}

// Two numbers as one register, the first one in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<u32*>(&both);
}

__device__ __forceinline__ float low_bf16(u32 both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high_bf16(u32 both) { return __uint_as_float(both & 0xffff0000u); }
