// A row in the registers of one block: each thread has the same columns of every source.
#pragma once

#include "element.cuh"

constexpr int kWarpThreads = 32;
constexpr int kVecElements = 8;

struct Sum {
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};

struct Max {
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// One thread's columns of one row.
template <typename T, int kVecs, int kThreads>
struct Row {
    u32 num_vecs;
    float values[kVecs][kVecElements] = {};

    static constexpr int kWarps = kThreads / kWarpThreads;
    static constexpr int kColumns = kVecs;

    __device__ __forceinline__ u32 column(int v) const { return v * kThreads + threadIdx.x; }

    // The last threads may have fewer than others.
    __device__ __forceinline__ bool has(int v) const { return column(v) < num_vecs; }

    // All of a source's loads are under way before the first is needed.
    __device__ __forceinline__ void load_row(Vec (&loaded)[kVecs], const Vec* source) const {
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
            if (has(v)) loaded[v] = load(source + column(v));
    }

    __device__ __forceinline__ void add_row(const Vec* source) {
        Vec loaded[kVecs] = {};
        load_row(loaded, source);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) add<T>(values[v], loaded[v]);
    }

    __device__ __forceinline__ void store_row(Vec* to) const {
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
            if (has(v)) store(to + column(v), round_all<T>(values[v]));
    }

    __device__ __forceinline__ void store_fp8(ByteVec* to, float inverse) const {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            if (!has(v)) continue;
            float scaled[kVecElements];
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) scaled[i] = values[v][i] * inverse;
            store(to + column(v), round_all_to_e4m3(scaled));
        }
    }

    __device__ __forceinline__ void scale_by(float scale,
                                             const Vec (&weight)[kVecs],
                                             float weight_offset) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float gain[kVecElements] = {};
            add<T>(gain, weight[v]);
#pragma unroll
            for (int i = 0; i < kVecElements; ++i)
                values[v][i] = values[v][i] * scale * (weight_offset + gain[i]);
        }
    }

    __device__ __forceinline__ float sum_of_squares() const {
        float total = 0.0f;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) total += values[v][i] * values[v][i];
        return total;
    }

    __device__ __forceinline__ float largest() const {
        float most = 0.0f;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) most = fmaxf(most, fabsf(values[v][i]));
        return most;
    }
};

// Combine one value of each thread, none below zero; `partials` is used once a launch.
template <typename Op, int kWarps>
__device__ __forceinline__ float over_block(float value, float (&partials)[kWarps]) {
#pragma unroll
    for (int lane = kWarpThreads / 2; lane > 0; lane /= 2)
        value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, lane));
    if (threadIdx.x % kWarpThreads == 0) partials[threadIdx.x / kWarpThreads] = value;
    __syncthreads();
    float parts[4] = {};  // four short chains of operations instead of a long one
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
        parts[warp % 4] = Op::of(parts[warp % 4], partials[warp]);
    return Op::of(Op::of(parts[0], parts[1]), Op::of(parts[2], parts[3]));
}
