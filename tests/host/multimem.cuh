// The functions of cuda/multimem.cuh for the CPU; it stands in for that file.
//
// A multicast address is in memory that nobody may touch: a plain access to it ends the program.
#pragma once

#include <sys/mman.h>

#include <vector>

#include "element.cuh"

namespace shim {

struct Multicast {
    char* base;
    std::vector<char*> ranks;  // the memory behind it, of each rank
    size_t bytes;

    Multicast(std::vector<char*> memory, size_t size) : ranks(std::move(memory)), bytes(size) {
        void* reserved =
            mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reserved == MAP_FAILED) std::_Exit(6);
        base = static_cast<char*>(reserved);
    }
};
inline std::deque<Multicast> multicasts;  // complete before the first kernel starts

template <typename V>
std::vector<V*> behind(const V* pointer) {
    const char* address = reinterpret_cast<const char*>(pointer);
    for (const Multicast& each : multicasts) {
        if (address < each.base || address >= each.base + each.bytes) continue;
        std::vector<V*> found;
        for (char* rank : each.ranks)
            found.push_back(reinterpret_cast<V*>(rank + (address - each.base)));
        return found;
    }
    printf("shim: %p is no multicast address\n", static_cast<const void*>(pointer));
    std::_Exit(7);
}

template <typename V>
void store_to_all(V* pointer, V value) {
    for (V* each : behind(pointer)) *each = value;
}

}  // namespace shim

template <typename T>
Vec multimem_load_reduce(T, const Vec* pointer) {
    float sum[8] = {};
    for (const Vec* each : shim::behind(pointer)) add<T>(sum, *each);
    return round_all<T>(sum);
}

inline void multimem_store(Vec* pointer, Vec v) { shim::store_to_all(pointer, v); }
inline void multimem_store(ByteVec* pointer, ByteVec v) { shim::store_to_all(pointer, v); }
inline void multimem_store(float* pointer, float value) { shim::store_to_all(pointer, value); }
inline void fence_aliases() {}
