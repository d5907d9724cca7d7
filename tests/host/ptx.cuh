// The functions of cuda/ptx.cuh for the CPU; it stands in for that file.
#pragma once

#include <cstring>

#include "cuda_shim.h"

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(16) Vec {  // 8 elements of 16 bits
    u32 word[4];
};

struct alignas(8) ByteVec {  // 8 elements of 8 bits
    u32 word[2];
};

template <typename V>
inline void pin(V&) {}

struct SharedVecs {
    Vec* pointer;

    static SharedVecs at(void* pointer) { return {static_cast<Vec*>(pointer)}; }
    SharedVecs operator+(u32 vecs) const { return {pointer + vecs}; }
};

// Nothing arrives before the wait: until then, the destination reads as NaN.
inline void copy_async(SharedVecs shared, const Vec* global) {
    std::memset(shared.pointer, 0xff, sizeof(Vec));
    shim::block->running->copies.push_back({shared.pointer, global});
    ++shim::block->running->uncommitted;
}

inline void copy_async_commit() {
    shim::Fiber& fiber = *shim::block->running;
    fiber.groups.push_back(fiber.uncommitted);
    fiber.uncommitted = 0;
}

template <int kPending>
inline void copy_async_wait() {
    shim::stall();
    shim::Fiber& fiber = *shim::block->running;
    for (; fiber.groups.size() > kPending; fiber.groups.pop_front())
        for (u32 i = 0; i < fiber.groups.front(); ++i, fiber.copies.pop_front())
            *static_cast<Vec*>(fiber.copies.front().to) =
                *static_cast<const Vec*>(fiber.copies.front().from);
}

inline Vec load(const Vec* pointer) { return *pointer; }
inline Vec load_shared(SharedVecs from) { return *from.pointer; }
inline void store_shared(SharedVecs to, u32 index, float value) {
    to.pointer[index / 4].word[index % 4] = std::bit_cast<u32>(value);
}
inline void store(Vec* pointer, Vec v) { *pointer = v; }
inline void store(ByteVec* pointer, ByteVec v) { *pointer = v; }
inline void store(float* pointer, float value) { *pointer = value; }

inline Vec load_relaxed_system(const Vec* pointer) {
    shim::pause();
    Vec v;
    for (int i = 0; i < 4; ++i) {
        std::atomic_ref word(const_cast<Vec*>(pointer)->word[i]);
        v.word[i] = word.load(std::memory_order_relaxed);
    }
    return v;
}

// Word by word, in no order, and now and then late.
inline void store_relaxed_system(Vec* pointer, Vec v) {
    shim::stall();
    for (int i = 3; i >= 0; --i)
        std::atomic_ref(pointer->word[i]).store(v.word[i], std::memory_order_relaxed);
}

inline u32 add_ordered(u32* pointer, u32 value) {
    return std::atomic_ref(*pointer).fetch_add(value, std::memory_order_acq_rel);
}

inline u64 load_acquire_system(const u64* pointer) {
    shim::pause();
    return std::atomic_ref(*const_cast<u64*>(pointer)).load(std::memory_order_acquire);
}

inline void store_release_system(u64* pointer, u64 value) {
    shim::stall();
    std::atomic_ref(*pointer).store(value, std::memory_order_release);
}

// One launch after another here.
inline void wait_for_kernel_before() {}
inline void let_next_kernel_start() {}

inline u64 nanoseconds() {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void barrier_of(u32 id, u32 threads) {
    shim::wait_at<true>(shim::block->named[id % shim::kNamedBarriers], threads);
}

namespace shim {

// To nearest, ties to even: keep the upper bits of a float.
inline u32 round_at(u32 bits, u32 dropped) {
    return bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1);
}

inline u32 bf16_of(float value) {
    return std::isnan(value) ? 0x7fff : round_at(std::bit_cast<u32>(value), 16) >> 16;
}

inline u32 fp16_of(float value) { return std::bit_cast<u16>(static_cast<_Float16>(value)); }

inline u32 e4m3_of(float value) {
    u32 sign = std::bit_cast<u32>(value) >> 31 << 7;
    float size = std::abs(value);
    if (std::isnan(value)) return sign | 0x7f;
    if (size < 0x1p-6f) return sign | static_cast<u32>(std::nearbyint(size * 0x1p9f));
    u32 rounded =
        round_at(std::bit_cast<u32>(size), 20) >> 20;  // 8 bits of exponent, 3 of fraction
    return sign | (rounded > (135u << 3 | 6) ? 0x7e : rounded - (120u << 3));
}

}  // namespace shim

inline u32 round_to_bf16x2(float low, float high) {
    return shim::bf16_of(low) | shim::bf16_of(high) << 16;
}
inline u32 round_to_fp16x2(float low, float high) {
    return shim::fp16_of(low) | shim::fp16_of(high) << 16;
}
inline u16 round_to_e4m3x2(float low, float high) {
    return static_cast<u16>(shim::e4m3_of(low) | shim::e4m3_of(high) << 8);
}
inline float widen_fp16(u16 bits) { return std::bit_cast<_Float16>(bits); }
