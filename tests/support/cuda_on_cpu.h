// What kernels need of CUDA C++ and of hopper.cuh, on the CPU: a kernel that includes "hopper.cuh" compiles as C++ when
// this file has that name beside it.
//
// Every thread of every block is a fiber.  They run one at a time and in an order that is drawn anew in every round;
// now and then a warp stands still for some rounds.  Threads of a warp that the hardware would keep together wait for each
// other.  A bulk copy takes a while that is drawn, too.  Fibers that wait without end are an error.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct ulonglong2 { u64 x, y; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

namespace cpu {

struct Index { u32 x; };

struct Meeting {  // where a number of threads wait for each other
    int arrived = 0;
    u64 turn = 0;
    void arrive(int count) {
        if (++arrived == count) arrived = 0, turn++;
    }
};

struct Warp {
    Meeting meeting;
    u32 words[32][8];
    int asleep = 0;
};

struct Barrier {
    int expected, pending;
    long bytes = 0;
    u32 phase = 0;
    void settle() {
        if (pending == 0 && bytes == 0) pending = expected, phase ^= 1;
    }
};

struct Copy {
    unsigned char* to;
    const void* from;
    u32 bytes;
    Barrier* barrier;
};

struct Block {
    std::unique_ptr<unsigned char[]> storage;
    unsigned char* memory;
    std::map<int, Meeting> named;
    std::map<u32, Barrier> barriers;
    std::vector<Warp> warps;
    std::vector<Copy> copies;
};

struct Thread {
    Index thread, block;
    Block* in;
    ucontext_t context;  // to begin with; then `here`
    jmp_buf here;
    std::unique_ptr<char[]> stack;
    bool begun = false, ended = false;
    // It need not be resumed while the turn or the phase that it waits for is still this one.
    const u64* turn = nullptr;
    const u32* phase = nullptr;
    u64 old = 0;
    bool asleep() const { return in->warps[thread.x / 32].asleep; }
    bool waits() const { return (turn && *turn == old) || (phase && *phase == old); }
};

inline Thread* current;
inline Index grid;
inline ucontext_t start;
inline jmp_buf scheduler;
inline u64 progress;  // grows whenever something happens that others may wait for
inline std::function<void()> kernel;

// swapcontext asks the system for the mask of signals at every switch, which costs most of the time; these do not.
inline void yield() {
    if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}
inline void resume(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.here, 1);
    thread.begun = true;
    swapcontext(&start, &thread.context);
}

inline Warp& warp() { return current->in->warps[current->thread.x / 32]; }
inline int lane() { return current->thread.x % 32; }

inline void meet(Meeting& meeting, int count) {
    u64 turn = meeting.turn;
    meeting.arrive(count), progress++;
    current->turn = &meeting.turn, current->old = turn;
    while (meeting.turn == turn) yield();
    current->turn = nullptr;
}

inline void enter() {
    kernel();
    current->ended = true, progress++;
    _longjmp(scheduler, 1);
}

// True if all threads came to their end.
inline bool run(u32 blocks, u32 threads, size_t shared, u32 seed, std::function<void()> body) {
    kernel = body, grid = {blocks};
    std::mt19937 draw(seed);
    std::vector<Block> all(blocks);
    std::vector<std::unique_ptr<Thread>> fibers;
    for (u32 b = 0; b < blocks; b++) {
        all[b].storage.reset(new unsigned char[shared + 128]);
        std::fill_n(all[b].storage.get(), shared + 128, 0xff);  // NaN, or too large, whatever it is read as
        all[b].memory = all[b].storage.get() + (128 - (size_t)all[b].storage.get() % 128);
        all[b].warps.resize((threads + 31) / 32);
        for (u32 t = 0; t < threads; t++) {
            auto fiber = std::make_unique<Thread>();
            fiber->thread = {t}, fiber->block = {b}, fiber->in = &all[b];
            const size_t size = 32768;
            fiber->stack.reset(new char[size]);
            getcontext(&fiber->context);
            fiber->context.uc_stack.ss_sp = fiber->stack.get(), fiber->context.uc_stack.ss_size = size;
            makecontext(&fiber->context, enter, 0);
            fibers.push_back(std::move(fiber));
        }
    }
    const u32 rounds_a_copy = 1 + draw() % 50;
    for (int idle = 0; idle < 2000;) {
        const u64 before = progress;
        bool any = false;
        std::shuffle(fibers.begin(), fibers.end(), draw);
        if (draw() % 50 == 0) {
            std::vector<Warp>& warps = all[draw() % blocks].warps;
            warps[draw() % warps.size()].asleep = draw() % (draw() % 8 ? 200 : 1000);
        }
        for (auto& fiber : fibers) {
            if (fiber->ended) continue;
            any = true;
            if (!fiber->asleep() && !fiber->waits()) resume(*fiber);
        }
        if (!any) return true;
        for (Block& block : all)
            for (Warp& warp : block.warps) warp.asleep = max(warp.asleep - 1, 0);
        for (Block& block : all)
            for (size_t i = 0; i < block.copies.size();) {
                if (draw() % rounds_a_copy) { i++; continue; }
                Copy copy = block.copies[i];
                std::memcpy(copy.to, copy.from, copy.bytes);
                copy.barrier->bytes -= copy.bytes, copy.barrier->settle(), progress++;
                block.copies.erase(block.copies.begin() + i);
            }
        idle = progress == before ? idle + 1 : 0;
    }
    return false;
}

template <class T> T exchange(T value, int from) {
    std::memcpy(warp().words[lane()], &value, sizeof value);
    meet(warp().meeting, 32);
    std::memcpy(&value, warp().words[from], sizeof value);
    meet(warp().meeting, 32);
    return value;
}

inline void multiply(int (&d)[4], uint4 a, u32 b0, u32 b1, const int (&c)[4]) {
    const u32 mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
    std::memcpy(warp().words[lane()], mine, sizeof mine);
    meet(warp().meeting, 32);
    int result[4];
    for (int i = 0; i < 4; i++) {
        int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2, sum = c[i];
        for (int k = 0; k < 32; k++) {
            int byte = k % 4 * 8, quad = k % 16 / 4, upper = k / 16;
            u32 left = warp().words[row % 8 * 4 + quad][row / 8 + 2 * upper] >> byte & 0xff;
            u32 right = warp().words[column * 4 + quad][4 + upper] >> byte & 0xff;
            sum += (int)left * (signed char)right;
        }
        result[i] = sum;
    }
    meet(warp().meeting, 32);
    std::memcpy(d, result, sizeof result);
}

}  // namespace cpu

#define threadIdx (cpu::current->thread)
#define blockIdx (cpu::current->block)
#define gridDim (cpu::grid)

template <class T> T __shfl_xor_sync(u32, T value, int lanes) { return cpu::exchange(value, cpu::lane() ^ lanes); }
template <class T> T __shfl_down_sync(u32, T value, int lanes) {
    return cpu::exchange(value, cpu::lane() + lanes < 32 ? cpu::lane() + lanes : cpu::lane());
}
inline void __syncwarp() { cpu::meet(cpu::warp().meeting, 32); }
inline u32 __byte_perm(u32 a, u32 b, u32 which) {
    u64 both = a | (u64)b << 32;
    u32 y = 0;
    for (int i = 0; i < 4; i++) y |= (u32)(both >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return y;
}
template <class To, class From> To cast_bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __int_as_float(int x) { return cast_bits<float>(x); }
inline float __uint_as_float(u32 x) { return cast_bits<float>(x); }
inline int __float2int_rn(float x) { return (int)std::nearbyint(x); }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// hopper.cuh

inline unsigned char* block_memory() { return cpu::current->in->memory; }
inline void hide(u32&) {}
inline u32 shared_address(const void* p) { return (u32)((const unsigned char*)p - block_memory()); }

template <int NAME, int COUNT> void sync() { cpu::meet(cpu::current->in->named[NAME], COUNT); }
template <int NAME, int COUNT> void arrive() { cpu::current->in->named[NAME].arrive(COUNT), cpu::progress++; }

inline void show_barriers() {}
inline cpu::Barrier& barrier_at(u32 address) { return cpu::current->in->barriers[address]; }
inline void initialize(u32 address, u32 arrivals) {
    barrier_at(address) = cpu::Barrier{(int)arrivals, (int)arrivals};
}
inline void expect(u32 address, u32 bytes) {
    barrier_at(address).bytes += bytes, barrier_at(address).pending--, barrier_at(address).settle(), cpu::progress++;
}
inline void arrive(u32 address) { barrier_at(address).pending--, barrier_at(address).settle(), cpu::progress++; }
inline void wait(u32 address, u32 parity) {
    const u32& phase = barrier_at(address).phase;
    cpu::current->phase = &phase, cpu::current->old = parity;
    while (phase == parity) cpu::yield();
    cpu::current->phase = nullptr;
}
inline void wait_for_both(u32 address, u32 parity) { wait(address, parity), wait(address + 8, parity); }
inline void fetch(u32 to, const void* from, u32 bytes, u32 barrier) {
    // Until it is there, nobody may read it.
    std::fill_n(block_memory() + to, bytes, 0xff);
    cpu::current->in->copies.push_back({block_memory() + to, from, bytes, &barrier_at(barrier)});
}
inline void fetch_into_l2(const void* from, u32 bytes) {
    u32 sum = 0;
    for (u32 i = 0; i < bytes; i++) sum += ((const volatile unsigned char*)from)[i];
}

inline float number(u32 bits) { return (float)cast_bits<_Float16>((u16)bits); }
inline u32 half(float x) { return cast_bits<u16>((_Float16)x); }
inline float rounded(float x) { return number(half(x)); }
inline float2 pair(u32 bits) { return {number(bits & 0xffff), number(bits >> 16)}; }
inline u32 halves(float x, float y) { return half(x) | half(y) << 16; }
inline u32 product_of_halves(u32 a, u32 b) {
    float2 x = pair(a), y = pair(b);
    return halves(x.x * y.x, x.y * y.y);
}
inline u32 larger_halves(u32 a, u32 b) { return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16; }

// Whoever looks again and again lets the others on.
template <class T> T load(const T* p) {
    T value = *p;
    cpu::yield();
    return value;
}
inline ulonglong2 load_two(const u64* p) {
    u64 x = load(p);
    return {x, load(p + 1)};
}
inline void store(u64* p, u64 value) { *p = value, cpu::progress++; }
inline uint4 load_shared(u32 address) { return *(const uint4*)(block_memory() + address); }
inline u32 load_shared_word(u32 address) { return *(const u32*)(block_memory() + address); }
inline void store_shared(u32 address, float value) { *(float*)(block_memory() + address) = value; }
inline u32 count_up(u32* p, u32 last) {
    u32 before = *p;
    *p = before >= last ? 0 : before + 1;
    return before;
}
inline void launch_dependents() {}
inline void wait_for_launch_before() {}

inline void multiply_bytes(int (&d)[4], uint4 a, u32 b0, u32 b1, const int (&c)[4]) { cpu::multiply(d, a, b0, b1, c); }
