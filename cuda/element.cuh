// The 16-bit element types: two to a word, widened to and rounded from float32; and FP8 for output.
#pragma once

#include "ptx.cuh"

struct Bf16 {
    static __device__ __forceinline__ float2 widen(u32 pair) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
    static __device__ __forceinline__ u32 round(float low, float high) {
        return round_to_bf16x2(low, high);
    }
};

struct Fp16 {
    static __device__ __forceinline__ float2 widen(u32 pair) {
        return make_float2(widen_fp16(static_cast<u16>(pair)),
                           widen_fp16(static_cast<u16>(pair >> 16)));
    }
    static __device__ __forceinline__ u32 round(float low, float high) {
        return round_to_fp16x2(low, high);
    }
};

constexpr float kLargestE4m3 = 448.0f;

__device__ __forceinline__ void clear(float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = 0.0f;
}

template <typename T>
__device__ __forceinline__ void widen_all(float (&values)[8], Vec v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 pair = T::widen(v.word[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
    }
}

template <typename T>
__device__ __forceinline__ void add(float (&sum)[8], Vec v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 pair = T::widen(v.word[i]);
        sum[2 * i] += pair.x;
        sum[2 * i + 1] += pair.y;
    }
}

template <typename T>
__device__ __forceinline__ Vec round_all(const float (&values)[8]) {
    Vec v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = T::round(values[2 * i], values[2 * i + 1]);
    return v;
}

__device__ __forceinline__ ByteVec round_all_to_e4m3(const float (&values)[8]) {
    ByteVec v;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float* four = values + 4 * i;
        v.word[i] = round_to_e4m3x2(four[0], four[1]) |
                    static_cast<u32>(round_to_e4m3x2(four[2], four[3])) << 16;
    }
    return v;
}
