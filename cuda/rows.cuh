// A group of threads working at rows, each thread at the same columns of every row.
#pragma once

#include "element.cuh"

constexpr int kWarpThreads = 32;
constexpr int kVecElements = 8;

template <int kVecs, int kThreads>
struct Columns {
    u32 thread;    // of the group
    u32 num_vecs;  // of a row

    __device__ __forceinline__ bool has(int v) const { return v * kThreads + thread < num_vecs; }
    __device__ __forceinline__ u64 offset(u32 row, int v) const {
        return static_cast<u64>(row) * num_vecs + v * kThreads + thread;
    }
};

// This thread's columns of the next kStages pieces, in order, on their way into shared memory.
//
// A piece is one addend of one row. No other thread touches the places of this one, so there is
// nothing to synchronise: a thread waits for its own copies.
template <int kVecs, int kThreads, int kStages>
struct Ring {
    Vec* places;  // shared: [kStages][kVecs][kThreads]
    Columns<kVecs, kThreads> columns;
    u32 stage;  // of the oldest piece

    static constexpr int kStageVecs = kVecs * kThreads;

    // Into the place whose piece was taken last. `rows` may be null: nothing is copied, but a piece
    // counts, because what is waited for is a number of them.
    __device__ __forceinline__ void fetch(u32 into, const Vec* rows, u32 row) {
        if (rows != nullptr) {
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                if (columns.has(v)) copy_async(place(into, v), rows + columns.offset(row, v));
        }
        copy_async_commit();
    }

    // Add the oldest piece, once it has arrived.
    template <typename T>
    __device__ __forceinline__ void add_oldest(float (&sums)[kVecs][kVecElements]) {
        copy_async_wait<kStages - 1>();
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
            if (columns.has(v)) add<T>(sums[v], load_shared(place(stage, v)));
    }

    __device__ __forceinline__ void advance() { stage = stage + 1 == kStages ? 0 : stage + 1; }

    __device__ __forceinline__ Vec* place(u32 of, int v) const {
        return places + of * kStageVecs + v * kThreads + columns.thread;
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

// Combine the threads' parts of a row; `parts` is not the last row's.
template <bool kNeedsLargest, int kThreads>
__device__ __forceinline__ RowFacts
combine(RowFacts own, WarpFacts<kThreads>& parts, u32 id, u32 thread) {
#pragma unroll
    for (int lane = kWarpThreads / 2; lane > 0; lane /= 2) {
        own.square_sum += __shfl_xor_sync(0xffffffffu, own.square_sum, lane);
        if constexpr (kNeedsLargest)
            own.largest = fmaxf(own.largest, __shfl_xor_sync(0xffffffffu, own.largest, lane));
    }
    if (thread % kWarpThreads == 0) {
        parts.square_sums[thread / kWarpThreads] = own.square_sum;
        if constexpr (kNeedsLargest) parts.largest[thread / kWarpThreads] = own.largest;
    }
    barrier_of(1 + id, kThreads);
    RowFacts all = {};
#pragma unroll
    for (int four = 0; four < WarpFacts<kThreads>::kEntries; four += 4) {  // 16 bytes a load
        Vec sums = load_shared(reinterpret_cast<const Vec*>(parts.square_sums + four));
#pragma unroll
        for (int i = 0; i < 4; ++i) all.square_sum += __uint_as_float(sums.word[i]);
        if constexpr (!kNeedsLargest) continue;
        Vec largest = load_shared(reinterpret_cast<const Vec*>(parts.largest + four));
#pragma unroll
        for (int i = 0; i < 4; ++i)
            all.largest = fmaxf(all.largest, __uint_as_float(largest.word[i]));
    }
    return all;
}
