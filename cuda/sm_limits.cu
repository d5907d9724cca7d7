// What one SM can move: rows of three addends in, three results out, as the fused kernel does at
// two ranks, without arithmetic and without waiting for other ranks.
#include "ptx.cuh"

struct Params {
    const Vec* in;  // [rows, kParts, kRowVecs]
    Vec* out;       // likewise
    u32 rows;
};

constexpr int kRowVecs = 1024;  // hidden 8192 in 16 bits
constexpr int kParts = 3;
constexpr int kThreads = 512;
constexpr int kAhead = 3;  // rows under way

template <bool kReads, bool kWrites>
__global__ __launch_bounds__(kThreads, 1) void sm_limits(const __grid_constant__ Params p) {
    constexpr int kVecs = kParts * kRowVecs / kThreads;
    extern __shared__ Vec shared[];
    auto fetch = [&](u32 place, u32 row) {
        const Vec* from = p.in + static_cast<u64>(row) * kParts * kRowVecs + threadIdx.x;
        Vec* to = shared + place * kParts * kRowVecs + threadIdx.x;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
            if (kReads && row < p.rows) copy_async(to + v * kThreads, from + v * kThreads);
        copy_async_commit();
    };
    for (u32 i = 0; i < kAhead; ++i) fetch(i, blockIdx.x + i * gridDim.x);
    Vec value = {};
    u32 place = 0;
    for (u32 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        copy_async_wait<kAhead - 1>();
        Vec* out = p.out + static_cast<u64>(row) * kParts * kRowVecs + threadIdx.x;
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            if (kReads) value = load_shared(shared + (place * kVecs + v) * kThreads + threadIdx.x);
            if (kWrites) store(out + v * kThreads, value);
        }
        fetch(place, row + kAhead * gridDim.x);
        place = place + 1 == kAhead ? 0 : place + 1;
    }
}
