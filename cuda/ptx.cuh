// One function per instruction, named by meaning, with the memory order in the name.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(16) Vec {  // 8 elements of 16 bits
    u32 word[4];
};

struct alignas(8) ByteVec {  // 8 elements of 8 bits
    u32 word[2];
};

// Keep a value in its register: the compiler may not make it anew, nor take it apart, from here on.
__device__ __forceinline__ void pin(u32& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)); }

// Vecs in shared memory, by their address there.
//
// A pointer's address depends on the block's place in its cluster, so that the compiler asks for it
// at every access. Here it is made once.
struct SharedVecs {
    u32 address;

    static __device__ __forceinline__ SharedVecs at(const void* pointer) {
        u32 address = static_cast<u32>(__cvta_generic_to_shared(pointer));
        pin(address);
        return {address};
    }
    __device__ __forceinline__ SharedVecs operator+(u32 vecs) const {
        return {address + vecs * static_cast<u32>(sizeof(Vec))};
    }
};

// 16 bytes from global (also a peer's) to shared memory, without passing through registers.
__device__ __forceinline__ void copy_async(SharedVecs shared, const Vec* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared.address), "l"(global)
                 : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most kPending groups of this thread are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ Vec load(const Vec* pointer) {
    Vec v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(pointer)
                 : "memory");
    return v;
}

__device__ __forceinline__ Vec load_shared(SharedVecs from) {
    Vec v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "r"(from.address)
                 : "memory");
    return v;
}

// Value `index` counted from the first of the first vec.
__device__ __forceinline__ void store_shared(SharedVecs to, u32 index, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to.address + index * 4), "f"(value) : "memory");
}

__device__ __forceinline__ void store(Vec* pointer, Vec v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(v.word[0]),
                 "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
}

__device__ __forceinline__ void store(ByteVec* pointer, ByteVec v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(pointer), "r"(v.word[0]), "r"(v.word[1])
                 : "memory");
}

__device__ __forceinline__ void store(float* pointer, float value) {
    asm volatile("st.global.f32 [%0], %1;" ::"l"(pointer), "f"(value) : "memory");
}

// Past the first cache, so that what a peer writes is seen; each word is whole, not the vector.
__device__ __forceinline__ Vec load_relaxed_system(const Vec* pointer) {
    Vec v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(pointer)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_relaxed_system(Vec* pointer, Vec v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(pointer),
                 "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                 : "memory");
}

__device__ __forceinline__ u64 load_acquire_system(const u64* pointer) {
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(pointer) : "memory");
    return value;
}

__device__ __forceinline__ void store_release_system(u64* pointer, u64 value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(pointer), "l"(value) : "memory");
}

// A kernel that was launched to start early runs beside the end of the one before it in the stream:
// nothing that one, or any before, has written may be read ahead of this, and nothing overwritten.
__device__ __forceinline__ void wait_for_kernel_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Once all blocks have come here, the next kernel of the stream may be brought onto the SMs.
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ u64 nanoseconds() {
    u64 time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// A barrier of `threads` threads of the CTA; `id` 0 is __syncthreads' own.
__device__ __forceinline__ void barrier_of(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Roundings are to nearest, ties to even; the first argument lands in the lower half.
__device__ __forceinline__ u32 round_to_bf16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u32 round_to_fp16x2(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u16 round_to_e4m3x2(float low, float high) {
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float widen_fp16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
