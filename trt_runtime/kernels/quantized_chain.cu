// Products with int4 weights that follow one another, for one token, in one launch.  quantized_chain.py says how it is
// launched and packing.py how the codes lie.
//
// A block has one multiprocessor to itself.  One warp does nothing but have weights brought into a ring of shared
// memory, product after product: nobody writes weights, so it waits for nothing but room.  Sixteen warps multiply.  Three
// finish: they add up what those have of a row, and do what follows a product, while the next tiles are multiplied.
// Between two products every block needs the results of all others; meanwhile the ring fills, so that the memory does
// not stand still.  Results travel in words of two numbers and a tag that says of which launch they are: who reads them
// sees by the tag whether they are there, and nobody has to wait until what he wrote is visible to all.
//
// The matrix units multiply bytes.  The numbers of a group of the input become integers below 2^30, times one power of
// two, and those four bytes with signs: the four are columns of one operand.  The codes, where they are in their bytes,
// are the other.  So the sum of a group is exact, up to what an input has below 2^-30 of the group's largest.
//
// An input with a norm is taken as a whole, another panel by panel: when the first of `down`'s columns are multiplied,
// the last of them need not have been made.
//
// Defined by the host: SHARED_BYTES and BLOCK_THREADS of a block.

#include "hopper.cuh"

struct Product {
    const uint4* weight;    // [tiles, units, 32]: 16 rows by 64 columns a unit; if gated, tiles of `up` after `gate`'s
    const uint4* scale;     // fp16 [tiles, groups, 16]
    const u64* input;       // fp16 [columns]; or null: the results of the product before
    const u64* norm;        // fp16 [columns]: RMSNorm's weight; or null
    const u16* bias;        // fp16 [rows], if gated [2 * rows]; or null
    const u16* residual;    // fp16 [rows]; or null
    const u64* earlier;     // residual among the results of an earlier product; or null
    u64* results;           // [rows / 2]: for later products of this launch; or null
    u16* out;               // fp16 [rows]; or null
    int rows, columns;
    int first;              // the block that has the first tile
    int gated;
    int weight_in_float;
    float eps;
};

// Memory that a later launch reads, and how much of it each block has brought into L2: multiples of 16 bytes.
struct Prefetch {
    const unsigned char* memory;
    u32 bytes, share;
};

struct Chain {
    Product products[4];
    Prefetch prefetch[4];
    u32* counters;          // this launch's tag, from 1 on, and blocks that have ended
    int count;
};

constexpr int WARPS = 16, THREADS = 32 * WARPS;  // that multiply
constexpr int GROUP = 128, TILE = 16, UNIT = 64;
constexpr int STAGE_GROUPS = WARPS, PANEL = 2 * STAGE_GROUPS;
constexpr int GROUP_BYTES = GROUP * TILE / 2, SCALE_BYTES = 2 * TILE;
constexpr int CODE_BYTES = STAGE_GROUPS * GROUP_BYTES, STAGE_BYTES = CODE_BYTES + STAGE_GROUPS * SCALE_BYTES;
constexpr int COLUMNS = 2 * PANEL * GROUP;  // of digits that there is room for
constexpr int STAGES = 10;
// Stages that are asked for and not yet there.  More would keep the memory no busier, but the results waiting.
constexpr int UNDER_WAY = 2;
// Tiles whose sums are added up together, and the threads that do it: one a row.
constexpr int SLOTS = 6, FINISHERS = SLOTS * TILE;
constexpr int ALL_THREADS = THREADS + FINISHERS + 32;

struct Memory {
    uint4 ring[STAGES][STAGE_BYTES / 16];
    uint4 digits[COLUMNS / UNIT][4][4];     // [unit, digit, run of 16 columns]
    float factors[COLUMNS / GROUP];
    float parts[2][SLOTS][TILE][WARPS + 1];
    alignas(16) float squares[WARPS];
    u64 full[STAGES], empty[STAGES];
    u64 ready[2], added[2];                 // of parts: the sums are there, or are not needed any more
};

static_assert(sizeof(Memory) == SHARED_BYTES && ALL_THREADS == BLOCK_THREADS, "the host launches other blocks");

__device__ __forceinline__ void join() { sync<1, THREADS>(); }

// Four results, if they are there.
__device__ __forceinline__ bool load_results(u64& four, const u64* p, u32 tag) {
    const ulonglong2 v = load_two(p);
    four = (u32)v.x | v.y << 32;
    return (u32)(v.x >> 32) == tag && (u32)(v.y >> 32) == tag;
}

// 240 less what each byte has in its high nibble.
__device__ __forceinline__ uint4 less_high(uint4 words) {
    const u32 high = 0xf0f0f0f0;
    return make_uint4(~words.x & high, ~words.y & high, ~words.z & high, ~words.w & high);
}

__device__ __forceinline__ uint4 all_of(u32 byte) {
    const u32 word = byte * 0x01010101;
    return make_uint4(word, word, word, word);
}

// 1.5 * 2^23: a float whose bits, as an integer, can be added to: numbers below 2^22 become floats by its subtraction.
constexpr int FLOAT_BITS = 0x4b400000;
constexpr float FLOAT_ZERO = 0x1.8p23f;

// What a thread keeps of a group of the input.  A byte holds codes of two columns, x and z, as lo + 16 hi.  In four
// columns of the result the matrix units add lo + 16 hi times the digits of x (`low`) and 240 - 16 hi times those
// (`both`), in the other four 240 - 16 hi times the digits of z (`both`): that is lo x + 240 x, and 240 z - 16 hi z.
// `start` is what turns them into (lo - 8) x and -16 (hi - 8) z, as bits of a float.
struct Group {
    uint4 low, both;
    int start[4];
    float factor;
};

__device__ __forceinline__ void take(Group& group, const Memory& memory, int g, bool inside, int lane) {
    const uint4 none = make_uint4(0, 0, 0, 0);
    uint4 a = none, b = none;
    group.factor = 0;
    if (inside) {
        a = memory.digits[2 * g][lane / 4 % 4][lane % 4], b = memory.digits[2 * g + 1][lane / 4 % 4][lane % 4];
        group.factor = memory.factors[g];
    }
    group.low = lane < 16 ? make_uint4(a.x, a.y, b.x, b.y) : none;
    group.both = lane < 16 ? group.low : make_uint4(a.z, a.w, b.z, b.w);
    // 248 x, and 112 z.
    int d[4] = {0, 0, 0, 0};
    multiply_bytes(d, all_of(136), group.low.x, group.low.y, d);
    multiply_bytes(d, all_of(136), group.low.z, group.low.w, d);
    multiply_bytes(d, all_of(112), group.both.x, group.both.y, d);
    multiply_bytes(d, all_of(112), group.both.z, group.both.w, d);
    for (int j = 0; j < 4; j++) group.start[j] = FLOAT_BITS - d[j];
}

__device__ __forceinline__ float value(int sum) { return __int_as_float(sum) - FLOAT_ZERO; }

// Two groups' sums of this thread's two rows and two digits.
__device__ __forceinline__ void add(
    float (&sums)[4], const Group& g, uint4 a0, uint4 a1, u32 a_scale, const Group& h, uint4 b0, uint4 b1, u32 b_scale
) {
    int d[4], e[4];
    multiply_bytes(d, a0, g.low.x, g.low.y, g.start);
    multiply_bytes(e, b0, h.low.x, h.low.y, h.start);
    multiply_bytes(d, less_high(a0), g.both.x, g.both.y, d);
    multiply_bytes(e, less_high(b0), h.both.x, h.both.y, e);
    multiply_bytes(d, a1, g.low.z, g.low.w, d);
    multiply_bytes(e, b1, h.low.z, h.low.w, e);
    multiply_bytes(d, less_high(a1), g.both.z, g.both.w, d);
    multiply_bytes(e, less_high(b1), h.both.z, h.both.w, e);
    float g_upper = number(a_scale & 0xffff) * g.factor, g_lower = number(a_scale >> 16) * g.factor;
    float h_upper = number(b_scale & 0xffff) * h.factor, h_lower = number(b_scale >> 16) * h.factor;
    sums[0] = g_upper * value(d[0]), sums[1] = g_upper * value(d[1]);
    sums[2] = g_lower * value(d[2]), sums[3] = g_lower * value(d[3]);
    sums[0] += h_upper * value(e[0]), sums[1] += h_upper * value(e[1]);
    sums[2] += h_lower * value(e[2]), sums[3] += h_lower * value(e[3]);
}

// The tiles of a product that this block has are taken some at a time, those panel of columns by panel.  Of gate and up
// fewer, so that results are there early.
struct Work {
    int tiles, groups, start, batch;
    __device__ Work(const Product& p)
        : tiles((p.rows + TILE - 1) / TILE), groups(p.columns / GROUP),
          start((int)blockIdx.x - p.first + ((int)blockIdx.x < p.first ? gridDim.x : 0)), batch(p.gated ? 2 : SLOTS) {}
    __device__ int count(int base) const {
        int n = 0;
#pragma unroll
        for (int j = 0; j < SLOTS; j++) n += j < batch && base + j * (int)gridDim.x < tiles;
        return n;
    }
};

__device__ void bring_weights(const Chain& chain, u32 ring, u32 full, u32 empty) {
    int stage = 0, parity = 1, landed = 0, landed_parity = 0, issued = 0;
#pragma unroll 1
    for (int i = 0; i < chain.count; i++) {
        const Product& p = chain.products[i];
        const Work work(p);
        const uint4 *weight = p.weight, *scale = p.scale;
        const int gated = p.gated;
#pragma unroll 1
        for (int base = work.start; base < work.tiles; base += work.batch * gridDim.x) {
            const int slots = work.count(base) << gated;
#pragma unroll 1
            for (int panel = 0; panel < work.groups; panel += PANEL)
#pragma unroll 1
                for (int j = 0; j < slots; j++) {
                    int tile = base + (j >> gated) * gridDim.x + (gated & j) * work.tiles;
                    size_t at = (size_t)tile * work.groups + panel;
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        int some = min(STAGE_GROUPS, work.groups - panel - k * STAGE_GROUPS);
                        if (issued < UNDER_WAY)
                            issued++;
                        else {
                            wait(full + 8 * landed, landed_parity);
                            if (++landed == STAGES) landed = 0, landed_parity ^= 1;
                        }
                        u32 barrier = full + 8 * stage, room = ring + STAGE_BYTES * stage;
                        wait(empty + 8 * stage, parity);
                        if (some > 0) {
                            expect(barrier, some * (GROUP_BYTES + SCALE_BYTES));
                            fetch(room, weight + at * (GROUP_BYTES / 16), some * GROUP_BYTES, barrier);
                            fetch(room + CODE_BYTES, scale + at * (SCALE_BYTES / 16), some * SCALE_BYTES, barrier);
                        } else
                            arrive(barrier);
                        at += STAGE_GROUPS;
                        if (++stage == STAGES) stage = 0, parity ^= 1;
                    }
                }
        }
    }
    // Not before the last weights are there, which others wait for.
    for (; issued > 0; issued--) {
        wait(full + 8 * landed, landed_parity);
        if (++landed == STAGES) landed = 0, landed_parity ^= 1;
    }
    for (int j = 0; j < 4; j++) {
        const Prefetch& piece = chain.prefetch[j];
        u32 start = min(blockIdx.x * piece.share, piece.bytes), size = min(piece.bytes - start, piece.share);
        if (size) fetch_into_l2(piece.memory + start, size);
    }
}

// Keeps eight columns of the input, four and the four that are eight further on, as digits.
__device__ __forceinline__ void keep(Memory& memory, int i, bool inside, const u64 (&v)[2]) {
    u32 words[4] = {(u32)v[0], (u32)(v[0] >> 32), (u32)v[1], (u32)(v[1] >> 32)};
    u32 most = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) most = larger_halves(most, words[j] & 0x7fff7fff);
#pragma unroll
    for (int d = 8; d; d /= 2) most = larger_halves(most, __shfl_xor_sync(0xffffffff, most, d));
    if (!inside) return;
    most = max(most & 0xffff, most >> 16);
    int exponent = max((int)(most >> 10), 1), shift = 44 - exponent;
    float up = __int_as_float((shift + 127) << 23);
    u32 x[8];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 a = pair(words[j]);
        // Bytes with signs: what a byte is too large by, the next has more.
        x[2 * j] = ((u32)__float2int_rn(a.x * up) + 0x00808080) ^ 0x00808080;
        x[2 * j + 1] = ((u32)__float2int_rn(a.y * up) + 0x00808080) ^ 0x00808080;
    }
    int unit = i / 8, run = i / 2 % 4, part = i % 2;
    u32 words_out[4][2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        // Columns c, c + 8, c + 1, c + 9 of every digit.
        u32 a = __byte_perm(x[2 * j], x[4 + 2 * j], 0x5140), b = __byte_perm(x[2 * j + 1], x[5 + 2 * j], 0x5140);
        u32 c = __byte_perm(x[2 * j], x[4 + 2 * j], 0x7362), d = __byte_perm(x[2 * j + 1], x[5 + 2 * j], 0x7362);
        words_out[0][j] = __byte_perm(a, b, 0x5410), words_out[1][j] = __byte_perm(a, b, 0x7632);
        words_out[2][j] = __byte_perm(c, d, 0x5410), words_out[3][j] = __byte_perm(c, d, 0x7632);
    }
#pragma unroll
    for (int n = 0; n < 4; n++)
        reinterpret_cast<uint2*>(&memory.digits[unit][n][run])[part] = make_uint2(words_out[n][0], words_out[n][1]);
    // Infinity and NaN have no digits: all sums become NaN.
    if (i % 16 == 0)
        memory.factors[i / 16] = most >= 0x7c00 ? __int_as_float(0x7fffffff) : __int_as_float((127 - shift) << 23);
}

__device__ __forceinline__ u32 normed(u32 v, u32 weight, float factor, int weight_in_float) {
    float2 a = pair(v);
    if (weight_in_float) {
        float2 w = pair(weight);
        return halves(a.x * factor * w.x, a.y * factor * w.y);
    }
    return product_of_halves(halves(a.x * factor, a.y * factor), weight);
}

__device__ __forceinline__ u64 normed(u64 v, u64 weight, float factor, int weight_in_float) {
    return normed((u32)v, (u32)weight, factor, weight_in_float) |
        (u64)normed((u32)(v >> 32), (u32)(weight >> 32), factor, weight_in_float) << 32;
}

__device__ __forceinline__ float squares_of(u64 v) {
    float2 a = pair((u32)v), b = pair((u32)(v >> 32));
    return (a.x * a.x + a.y * a.y) + (b.x * b.x + b.y * b.y);
}

// The first of the i-th eight columns, in fours.
__device__ __forceinline__ int four_of(int i) { return i / 2 * 4 + i % 2; }

// Loads the i-th eight columns of the input, once they are there.
__device__ __forceinline__ bool load_eight(u64 (&v)[2], const Product& p, const u64* results, int i, u32 tag) {
    if (p.input) {
        v[0] = load(p.input + four_of(i)), v[1] = load(p.input + four_of(i) + 2);
        return true;
    }
    bool first = load_results(v[0], results + 2 * four_of(i), tag);
    return load_results(v[1], results + 2 * four_of(i) + 4, tag) && first;
}

// A panel of the input, into one half of the room for digits.
__device__ void take_panel(
    const Product& p, const u64* results, Memory& memory, int panel, int half, int thread, u32 tag
) {
    const bool inside = thread < (p.columns / GROUP - panel) * (GROUP / 8);
    u64 v[2] = {0, 0};
    while (inside && !load_eight(v, p, results, panel * (GROUP / 8) + thread, tag));
    keep(memory, half * THREADS + thread, inside, v);
}

// The whole input of a product after its norm, ROUNDS times eight columns a thread.
template <int ROUNDS>
__device__ void take_normed(const Product& p, const u64* results, Memory& memory, int thread, u32 tag) {
    const int count = p.columns / 8;
    u64 weight[ROUNDS][2], v[ROUNDS][2];
#pragma unroll
    for (int j = 0; j < ROUNDS; j++) {
        int i = thread + j * THREADS;
        weight[j][0] = weight[j][1] = v[j][0] = v[j][1] = 0;
        if (i < count) weight[j][0] = p.norm[four_of(i)], weight[j][1] = p.norm[four_of(i) + 2];
    }
    float squares = 0;
#pragma unroll
    for (int j = 0; j < ROUNDS; j++) {
        int i = thread + j * THREADS;
        while (i < count && !load_eight(v[j], p, results, i, tag));
        squares += squares_of(v[j][0]) + squares_of(v[j][1]);
    }
#pragma unroll
    for (int d = 16; d; d /= 2) squares += __shfl_xor_sync(0xffffffff, squares, d);
    if (thread % 32 == 0) memory.squares[thread / 32] = squares;
    join();
    const float4* shares = reinterpret_cast<const float4*>(memory.squares);
    squares = 0;
#pragma unroll
    for (int w = 0; w < WARPS / 4; w++) squares += (shares[w].x + shares[w].y) + (shares[w].z + shares[w].w);
    const float factor = rsqrtf(squares * (1.0f / p.columns) + p.eps);
#pragma unroll
    for (int j = 0; j < ROUNDS; j++) {
        int i = thread + j * THREADS;
        v[j][0] = normed(v[j][0], weight[j][0], factor, p.weight_in_float);
        v[j][1] = normed(v[j][1], weight[j][1], factor, p.weight_in_float);
        keep(memory, i, i < count, v[j]);
    }
}

// Rows of results from the sums of the warps, one a thread.  Of gate and up, the 16 threads after gate's have up's.
__device__ void finish(const Chain& chain, Memory& memory, u32 ready, u32 added, int thread, u32 tag) {
    const int slot = thread / TILE;
    int turn = 0, parity = 0;
#pragma unroll 1
    for (int i = 0; i < chain.count; i++) {
        const Product& p = chain.products[i];
        const Work work(p);
        const int gated = p.gated;
#pragma unroll 1
        for (int base = work.start; base < work.tiles; base += work.batch * gridDim.x) {
            const bool here = slot < work.count(base) << gated;
            const int row = (base + (slot >> gated) * (int)gridDim.x) * TILE + thread % TILE;
            // What is added to it is asked for early.
            u32 bias = 0, residual = 0;
            if (here && p.bias) bias = load(p.bias + (gated & slot) * p.rows + row);
            if (here && p.residual) residual = load(p.residual + row);
            if (here && p.earlier) {
                u64 word;
                do word = load(p.earlier + row / 2);
                while ((u32)(word >> 32) != tag);
                residual = (u32)word >> row % 2 * 16 & 0xffff;
            }
            wait(ready + 8 * turn, parity);
            const float* parts = memory.parts[turn][slot][thread % TILE];
            float some[4] = {0, 0, 0, 0};
            if (here) {
#pragma unroll
                for (int w = 0; w < WARPS; w++) some[w % 4] += parts[w];
            }
            __syncwarp();
            if (thread % 32 == 0) arrive(added + 8 * turn);
            turn ^= 1, parity ^= !turn;
            float y = (some[0] + some[1]) + (some[2] + some[3]) + number(bias);
            if (gated) {
                float up = __shfl_xor_sync(0xffffffff, y, TILE);
                y = rounded(y);
                y = rounded(y / (1.0f + __expf(-y))) * rounded(up);
            }
            if (p.residual || p.earlier) y = rounded(y) + number(residual);
            u32 bits = half(y), next = __shfl_down_sync(0xffffffff, bits, 1);
            if (here && !(gated & slot)) {
                if (p.out) p.out[row] = (u16)bits;
                u64 word = bits | next << 16 | (u64)tag << 32;
                if (p.results && row % 2 == 0) store(p.results + row / 2, word);
            }
        }
    }
    // The last block to come here makes the next tag: nobody reads this one any more.
    sync<3, FINISHERS>();
    if (thread == 0 && count_up(chain.counters + 1, gridDim.x - 1) == gridDim.x - 1) chain.counters[0] = tag + 1;
}

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) quantized_chain(const __grid_constant__ Chain chain) {
    Memory& memory = *reinterpret_cast<Memory*>(block_memory());
    u32 ring = shared_address(memory.ring), full = shared_address(memory.full), empty = shared_address(memory.empty);
    u32 ready = shared_address(memory.ready), added = shared_address(memory.added);
    hide(ring), hide(full), hide(empty), hide(ready), hide(added);
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    if (thread == THREADS + FINISHERS) {
        for (int s = 0; s < STAGES; s++) {
            initialize(full + 8 * s, 1);
            initialize(empty + 8 * s, WARPS);
        }
        for (int s = 0; s < 2; s++) {
            initialize(ready + 8 * s, WARPS);
            initialize(added + 8 * s, FINISHERS / 32);
        }
        show_barriers();
    }
    if (thread >= THREADS + FINISHERS) {
        // The others see the barriers when they come to where they first join.
        __syncwarp();
        arrive<2, ALL_THREADS>();
        if (lane == 0) bring_weights(chain, ring, full, empty);
        return;
    }
    sync<2, ALL_THREADS>();
    wait_for_launch_before();
    launch_dependents();
    const u32 tag = load(chain.counters);
    if (warp >= WARPS) return finish(chain, memory, ready, added, thread - THREADS, tag);
    int stage = 0, parity = 0, half_taken = 0, turn = 0, added_parity = 1;
    const u32 my_words = ring + lane * 16, my_scale = ring + CODE_BYTES + lane / 4 * 4;
    // A thread's columns of the sums: two digits; of codes in high nibbles, -16 times as large, in the last two of four.
    const float weight_0 = lane % 4 == 0 ? 1 : lane % 4 == 1 ? 0x1p16f : lane % 4 == 2 ? -0x1p-4f : -0x1p12f;
    const bool odd = lane % 2;
    // Which of a tile's sums this thread keeps, if it is one of the first two of four.
    const u32 my_part = shared_address(&memory.parts[0][0][lane / 4 + 8 * (lane % 2)][warp]);
    const u64* results = nullptr;
#pragma unroll 1
    for (int i = 0; i < chain.count; i++) {
        const Product& p = chain.products[i];
        const Work work(p);
        const int gated = p.gated;
        if (p.norm) {
            if (p.columns <= 8 * THREADS)
                take_normed<1>(p, results, memory, thread, tag);
            else
                take_normed<2>(p, results, memory, thread, tag);
        }
        // All of the input is there, or nobody takes groups of another product's any more.
        join();
#pragma unroll 1
        for (int base = work.start; base < work.tiles; base += work.batch * gridDim.x) {
            const int slots = work.count(base) << gated;
#pragma unroll 1
            for (int panel = 0; panel < work.groups; panel += PANEL) {
                int there = panel;
                if (!p.norm) {
                    take_panel(p, results, memory, panel, half_taken, thread, tag);
                    join();
                    there = half_taken * PANEL, half_taken ^= 1;
                }
                Group first, second;
                take(first, memory, there + warp, panel + warp < work.groups, lane);
                take(second, memory, there + warp + WARPS, panel + warp + WARPS < work.groups, lane);
                // Where there is nothing for this warp: the panel's first group, which is there, times nothing.
                const int a = panel + warp < work.groups ? warp : 0, b = panel + warp + WARPS < work.groups ? warp : 0;
                const u32 b_stage = panel + warp + WARPS < work.groups ? STAGE_BYTES : 0;
                const u32 a_words = my_words + a * GROUP_BYTES, b_words = my_words + b_stage + b * GROUP_BYTES;
                const u32 a_scales = my_scale + a * SCALE_BYTES, b_scales = my_scale + b_stage + b * SCALE_BYTES;
                u32 part = my_part + turn * (u32)sizeof(memory.parts[0]);
                if (!panel) wait(added + 8 * turn, added_parity);
#pragma unroll 1
                for (int s = slots; s > 0; s--) {
                    const u32 here = stage * STAGE_BYTES;
                    wait_for_both(full + 8 * stage, parity);
                    uint4 a0 = load_shared(a_words + here), a1 = load_shared(a_words + here + GROUP_BYTES / 2);
                    uint4 b0 = load_shared(b_words + here), b1 = load_shared(b_words + here + GROUP_BYTES / 2);
                    u32 a_scale = load_shared_word(a_scales + here), b_scale = load_shared_word(b_scales + here);
                    __syncwarp();
                    if (lane == 0) arrive(empty + 8 * stage), arrive(empty + 8 * stage + 8);
                    stage += 2;
                    if (stage == STAGES) stage = 0, parity ^= 1;
                    float sums[4];
                    add(sums, first, a0, a1, a_scale, second, b0, b1, b_scale);
                    float upper = sums[0] + sums[1] * 256, lower = sums[2] + sums[3] * 256;
                    float y = (odd ? lower : upper) * weight_0, other = (odd ? upper : lower) * weight_0;
                    // Its neighbour has the same rows and other digits.
                    y += __shfl_xor_sync(0xffffffff, other, 1);
                    y += __shfl_xor_sync(0xffffffff, y, 2);
                    if (lane % 4 < 2) {
                        if (panel) y += __uint_as_float(load_shared_word(part));
                        store_shared(part, y);
                    }
                    part += TILE * (WARPS + 1) * 4;
                }
            }
            __syncwarp();
            if (lane == 0) arrive(ready + 8 * turn);
            turn ^= 1, added_parity ^= !turn;
        }
        results = p.results;
    }
}
