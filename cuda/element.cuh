// The 16-bit element types: two to a word, widened to and rounded from float32.
#pragma once

#include "ptx.cuh"

struct Bf16 {
    static __device__ __forceinline__ float2 widen(u32 pair) {
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
    static __device__ __forceinline__ u32 round(float low, float high) {
        u32 pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
};

struct Fp16 {
    static __device__ __forceinline__ float2 widen(u32 pair) {
        float low, high;
        asm("cvt.f32.f16 %0, %1;" : "=f"(low) : "h"(static_cast<u16>(pair)));
        asm("cvt.f32.f16 %0, %1;" : "=f"(high) : "h"(static_cast<u16>(pair >> 16)));
        return make_float2(low, high);
    }
    static __device__ __forceinline__ u32 round(float low, float high) {
        u32 pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
};

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
