// Instructions that CUDA C++ has no name for, or none without headers that NVRTC would have to find: barriers and bulk
// copies of compute capability 9.0, loads that see what other multiprocessors write, numbers of 16 bits, matrix units.
// All that is assembly is here: tests/cuda_on_cpu.h says the same in C++, so that kernels run without a GPU.

#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

__device__ __forceinline__ unsigned char* block_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

// The compiler does not know it any more, which would make an address again wherever it is used.
__device__ __forceinline__ void hide(u32& value) { asm volatile("mov.u32 %0, %0;" : "+r"(value)); }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Barriers of some of a block's threads

template <int NAME, int COUNT>
__device__ __forceinline__ void sync() {
    asm volatile("bar.sync %0, %1;" ::"n"(NAME), "n"(COUNT) : "memory");
}

template <int NAME, int COUNT>
__device__ __forceinline__ void arrive() {
    asm volatile("bar.arrive %0, %1;" ::"n"(NAME), "n"(COUNT) : "memory");
}

// Barriers in shared memory, that wait for bytes too

__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void initialize(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
    asm volatile(
        "{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again;}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Both of two barriers that lie next to each other: the latency of one look.
__device__ __forceinline__ void wait_for_both(u32 barrier, u32 parity) {
    asm volatile(
        "{.reg .pred p, q; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; "
        "mbarrier.try_wait.parity.shared::cta.b64 q, [%0 + 8], %1; and.pred p, p, q; @!p bra again;}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// A bulk copy into shared memory, which the barrier then knows of.
__device__ __forceinline__ void fetch(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(0x12f0000000000000ull)  // evict first
        : "memory");
}

__device__ __forceinline__ void fetch_into_l2(const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Numbers of 16 bits

__device__ __forceinline__ float number(u32 bits) {
    float y;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(bits));
    return y;
}

__device__ __forceinline__ u32 half(float x) {
    u32 y;
    asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float rounded(float x) { return number(half(x)); }

__device__ __forceinline__ float2 pair(u32 bits) { return make_float2(number(bits & 0xffff), number(bits >> 16)); }

__device__ __forceinline__ u32 halves(float x, float y) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(y), "f"(x));
    return v;
}

__device__ __forceinline__ u32 product_of_halves(u32 a, u32 b) {
    u32 y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// Of each half, as integers without sign.
__device__ __forceinline__ u32 larger_halves(u32 a, u32 b) {
    u32 y;
    asm("max.u16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// Loads: from global memory past the L1 cache, from shared memory by its own addresses

__device__ __forceinline__ u64 load(const u64* p) {
    u64 v;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ u32 load(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ u16 load(const u16* p) {
    u16 v;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ ulonglong2 load_two(const u64* p) {
    ulonglong2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ u32 load_shared_word(u32 address) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

// Writes for others to see; nothing else becomes visible with it.
__device__ __forceinline__ void store(u64* p, u64 value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// Adds 1, or makes 0 of `last`; what was there before.
__device__ __forceinline__ u32 count_up(u32* p, u32 last) {
    u32 before;
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(last) : "memory");
    return before;
}

// Programmatic dependent launch: the next kernel may begin; the one before has ended, and all that it wrote is there.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_launch_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Matrix units: d = a b + c, of bytes, 16 by 32 by 8

__device__ __forceinline__ void multiply_bytes(int (&d)[4], uint4 a, u32 b0, u32 b1, const int (&c)[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
