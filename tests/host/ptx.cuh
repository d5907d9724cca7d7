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

// Nothing arrives before the wait: until then, the destination reads as NaN.
inline void copy_async(void* shared, const void* global) {
    std::memset(shared, 0xff, sizeof(Vec));
    shim::block->running->copies.push_back({shared, global});
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
inline Vec load_shared(const Vec* pointer) { return *pointer; }
inline void store(Vec* pointer, Vec v) { *pointer = v; }

inline u32 load_acquire_system(const u32* pointer) {
    shim::pause();
    return std::atomic_ref(*const_cast<u32*>(pointer)).load(std::memory_order_acquire);
}

inline void store_release_system(u32* pointer, u32 value) {
    shim::stall();
    std::atomic_ref(*pointer).store(value, std::memory_order_release);
}

inline u64 nanoseconds() {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void barrier_of(u32 id, u32 threads) {
    shim::wait_at<true>(shim::block->named[id % shim::kNamedBarriers], threads);
}
