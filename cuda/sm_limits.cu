// What one SM can move: rows of three addends in, three results out, as the fused kernel does at
// two ranks, without arithmetic and without waiting for other ranks. What each part is, and on
// which GPU, is the caller's choice.
#include "ptx.cuh"

constexpr int kRowVecs = 1024;  // hidden 8192 in 16 bits
constexpr int kParts = 3;
constexpr int kThreads = 512;
constexpr int kAhead = 3;  // rows under way

struct Params {
    const Vec* in[kParts];  // [rows, kRowVecs] each
    Vec* out[kParts];       // likewise
    u32 rows;
};

template <bool kReads, bool kWrites>
__global__ __launch_bounds__(kThreads, 1) void sm_limits(const __grid_constant__ Params p) {
    constexpr int kVecs = kRowVecs / kThreads;
    extern __shared__ Vec shared[];  // [kAhead][kParts][kRowVecs]
    SharedVecs places = SharedVecs::at(shared + threadIdx.x);
    auto piece = [&](u32 place, int part, int v) {
        return places + ((place * kParts + part) * kRowVecs + v * kThreads);
    };
    auto fetch = [&](u32 place, u32 row) {
        u64 start = static_cast<u64>(row) * kRowVecs + threadIdx.x;
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                if (kReads && row < p.rows)
                    copy_async(piece(place, part, v), p.in[part] + start + v * kThreads);
        copy_async_commit();
    };
    for (u32 i = 0; i < kAhead; ++i) fetch(i, blockIdx.x + i * gridDim.x);
    Vec value = {};
    u32 place = 0;
    for (u32 row = blockIdx.x; row < p.rows; row += gridDim.x) {
        copy_async_wait<kAhead - 1>();
        u64 start = static_cast<u64>(row) * kRowVecs + threadIdx.x;
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
            for (int v = 0; v < kVecs; ++v) {
                if (kReads) value = load_shared(piece(place, part, v));
                if (kWrites) store(p.out[part] + start + v * kThreads, value);
            }
        fetch(place, row + kAhead * gridDim.x);
        place = place + 1 == kAhead ? 0 : place + 1;
    }
}
