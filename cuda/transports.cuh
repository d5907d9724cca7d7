// How the rows of all ranks are read and written: what the two transports differ in.
//
// An op sees `kAddresses` addresses of the memory of all ranks. Each transport is three functions:
// store to all ranks, read the sum where the fabric can add, and order accesses around a barrier.
#pragma once

#include "multimem.cuh"

// Unicast: every rank's memory has an address of its own; sums are made here, in rank order.
template <int kRanks>
struct Peer {
    static constexpr int kAddresses = kRanks;
    static constexpr bool kFabricAdds = false;

    template <typename V>
    static __device__ __forceinline__ void put(V* pointer, V value) {
        store(pointer, value);
    }
    template <typename T>
    static __device__ __forceinline__ Vec sum(const Vec*) {
        return {};
    }
    static __device__ __forceinline__ void fence() {}
};

// NVSwitch multicast: one address stands for all ranks, and the switch adds and copies.
template <int kRanks>
struct Multicast {
    static constexpr int kAddresses = 1;
    static constexpr bool kFabricAdds = true;

    template <typename V>
    static __device__ __forceinline__ void put(V* pointer, V value) {
        multimem_store(pointer, value);
    }
    template <typename T>
    static __device__ __forceinline__ Vec sum(const Vec* pointer) {
        return multimem_load_reduce(T{}, pointer);
    }
    static __device__ __forceinline__ void fence() { fence_aliases(); }
};
