// A group of threads working at rows, each thread at the same columns of every row.
#pragma once

#include "element.cuh"

constexpr int kWarpThreads = 32;
constexpr int kVecElements = 8;

// With kIsExact, the threads' vecs are a row's: none is left over.
template <int kVecs, int kThreads, bool kIsExact>
struct Columns {
    u32 thread;    // of the group
    u32 num_vecs;  // of a row

    __device__ __forceinline__ u32 row_vecs() const {
        return kIsExact ? kVecs * kThreads : num_vecs;
    }
    __device__ __forceinline__ bool has(int v) const {
        return kIsExact || v * kThreads + thread < num_vecs;
    }
    // 32 bits: the rows of a buffer have far fewer than 2^32 vecs, which are 64 GiB. Pinned, or the
    // compiler carries every address from row to row, for which registers do not suffice.
    __device__ __forceinline__ u32 offset(u32 row) const {
        u32 vecs = row * row_vecs() + thread;
        pin(vecs);
        return vecs;
    }
};

// This thread's columns of the next kStages pieces, in order, on their way into shared memory.
//
// A piece is one addend of one row. No other thread touches the places of this one, so there is
// nothing to synchronise: a thread waits for its own copies.
template <typename Columns, int kVecs, int kThreads, int kStages>
struct Ring {
    Columns columns;
    SharedVecs places;  // [kStages][kVecs][kThreads], from this thread's first on
    u32 stage;          // of the oldest piece

    // Into the place whose piece was taken last. A piece that is not `there` is not copied, but
    // counts, because what is waited for is a number of them.
    __device__ __forceinline__ void fetch(u32 into, const Vec* piece, bool is_there) {
        if (is_there) {
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                if (columns.has(v)) copy_async(place(into, v), piece + v * kThreads);
        }
        copy_async_commit();
    }

    // Take the oldest piece, once it has arrived: the first of a row, or one more.
    template <typename T, bool kIsFirst>
    __device__ __forceinline__ void take_oldest(float (&sums)[kVecs][kVecElements]) {
        copy_async_wait<kStages - 1>();
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            if (columns.has(v)) {
                if (kIsFirst)
                    widen_all<T>(sums[v], load_shared(place(stage, v)));
                else
                    add<T>(sums[v], load_shared(place(stage, v)));
            } else if (kIsFirst) {
                clear(sums[v]);
            }
        }
    }

    __device__ __forceinline__ void advance() { stage = stage + 1 == kStages ? 0 : stage + 1; }

    __device__ __forceinline__ SharedVecs place(u32 of, int v) const {
        return places + (of * (kVecs * kThreads) + v * kThreads);
    }
};

// What a group agrees on about a row.
struct RowFacts {
    float square_sum;
    float largest;  // magnitude after the gain, before the scale
};

// Each warp's part of it, in shared memory; entries without a warp are zero.
template <int kThreads>
struct alignas(16) WarpFacts {
    static constexpr int kEntries = (kThreads / kWarpThreads + 3) / 4 * 4;
    float square_sums[kEntries];
    float largest[kEntries];
};

// Combine the threads' parts of a row; `parts`, a WarpFacts, is not the last row's.
template <bool kNeedsLargest, int kThreads>
__device__ __forceinline__ RowFacts combine(RowFacts own, SharedVecs parts, u32 id, u32 thread) {
    constexpr int kEntries = WarpFacts<kThreads>::kEntries;
#pragma unroll
    for (int lane = kWarpThreads / 2; lane > 0; lane /= 2) {
        own.square_sum += __shfl_xor_sync(0xffffffffu, own.square_sum, lane);
        if constexpr (kNeedsLargest)
            own.largest = fmaxf(own.largest, __shfl_xor_sync(0xffffffffu, own.largest, lane));
    }
    if (thread % kWarpThreads == 0) {
        store_shared(parts, thread / kWarpThreads, own.square_sum);
        if constexpr (kNeedsLargest)
            store_shared(parts, kEntries + thread / kWarpThreads, own.largest);
    }
    barrier_of(1 + id, kThreads);
    RowFacts all = {};
#pragma unroll
    for (int four = 0; four < kEntries / 4; ++four) {  // 16 bytes a load
        Vec sums = load_shared(parts + four);
#pragma unroll
        for (int i = 0; i < 4; ++i) all.square_sum += __uint_as_float(sums.word[i]);
        if constexpr (!kNeedsLargest) continue;
        Vec largest = load_shared(parts + (kEntries / 4 + four));
#pragma unroll
        for (int i = 0; i < 4; ++i)
            all.largest = fmaxf(all.largest, __uint_as_float(largest.word[i]));
    }
    return all;
}
