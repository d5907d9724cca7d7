// Access to a multicast address: the only instructions that may touch one.
//
// Behind it stands the same memory of all ranks. NVSwitch reduces what `ld_reduce` reads, in
// float32, and copies what `st` writes to every rank.
#pragma once

#include "element.cuh"

__device__ __forceinline__ Vec multimem_load_reduce(Bf16, const Vec* pointer) {
    Vec v;
    asm volatile(
        "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
        : "l"(pointer)
        : "memory");
    return v;
}

__device__ __forceinline__ Vec multimem_load_reduce(Fp16, const Vec* pointer) {
    Vec v;
    asm volatile(
        "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
        : "l"(pointer)
        : "memory");
    return v;
}

// The types are the instruction's; what it copies are bits.
__device__ __forceinline__ void multimem_store(Vec* pointer, Vec v) {
    asm volatile("multimem.st.relaxed.sys.global.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(pointer),
                 "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
}

__device__ __forceinline__ void multimem_store(ByteVec* pointer, ByteVec v) {
    asm volatile("multimem.st.relaxed.sys.global.v2.bf16x2 [%0], {%1, %2};" ::"l"(pointer),
                 "r"(v.word[0]), "r"(v.word[1])
                 : "memory");
}

__device__ __forceinline__ void multimem_store(float* pointer, float value) {
    asm volatile("multimem.st.relaxed.sys.global.f32 [%0], %1;" ::"l"(pointer), "f"(value)
                 : "memory");
}

// Order accesses through a multicast address and through a rank's own address of the same memory:
// to the memory model these are two proxies.
__device__ __forceinline__ void fence_aliases() { asm volatile("fence.proxy.alias;" ::: "memory"); }
