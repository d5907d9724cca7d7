// Rows that ranks push into each other's staging, and that tell by themselves when they are there.
//
//   As in Lamport's queue (flashinfer and TensorRT-LLM do the same): staging that nobody has
//   written holds -0.0 in pairs, and -0.0 is sent as 0.0.
//
//   Staging has three parts, used by turns. A launch reads one, and empties the one that the launch
//   before it read: nobody writes there before all ranks have ended this launch, because the next
//   but one, which does, needs rows of the next one from everybody. A count in device memory tells
//   the turn, so a captured launch can be replayed. Blocks need not run side by side: each sends
//   what others wait for before it waits for them, and they start in order.
//
//   A launch takes about as long as the exchange of a few rows. So all that needs no peer is done
//   while rows travel, nothing is left for the end, and a launch may start early, beside the end
//   of the kernel before, and lets the next one do so ("programmatic dependent launch").
#pragma once

#include "block_row.cuh"

constexpr int kMaxRanks = 8;
constexpr int kTurns = 3;
constexpr u32 kEmpty = 0x80008000u;  // -0.0 twice, in either type
constexpr u32 kPollsPerLook = 256;   // at the clock

// What launches leave for the next one. Each block has one of its own, so that none waits for
// another to count: it keeps those of blocks that the next launch may have, too.
struct alignas(8) State {  // read at once
    u32 launches;          // until now
    u32 num_slots;         // of the last one
};

struct Params {
    Vec*
        staging[kMaxRanks];  // [turn][rank][capacity][hidden], of every rank as this one reaches it
    const Vec* x;            // [num_rows, hidden], this rank's partial sums
    Vec* residual;           // of the rows that this rank adds up; null: none
    Vec* out;                // [num_rows, hidden]; may be x
    const Vec* weight;       // [hidden]
    State* states;           // [capacity]
    u64 deadline_ns;
    u32 rank;
    u32 capacity;  // slots: blocks of the largest launch
    u32 num_rows;
    u32 hidden;
    float eps;
    float weight_offset;
};

__device__ __forceinline__ Vec without_minus_zeros(Vec v) {
#pragma unroll
    for (u32& pair : v.word) {
        u32 low = pair & 0xffffu, high = pair >> 16;
        pair = (low == 0x8000u ? 0u : low) | (high == 0x8000u ? 0u : high << 16);
    }
    return v;
}

// A function: a constant of this type would be loaded from memory.
__device__ __forceinline__ Vec nothing() { return {{kEmpty, kEmpty, kEmpty, kEmpty}}; }

__device__ __forceinline__ bool has_arrived(Vec v) {
    return v.word[0] != kEmpty && v.word[1] != kEmpty && v.word[2] != kEmpty && v.word[3] != kEmpty;
}

__device__ __forceinline__ void give_up(const Params& p, u32 peer) {
    printf("tokenweave: rank %u, CTA %u waited %llu ms for rows of rank %u\n", p.rank, blockIdx.x,
           p.deadline_ns / 1000000, peer);
    __trap();
}

// Wait for one vec of every peer. Those that are missing are asked for together: each question is a
// way to the second cache and back. A vec that is not empty is taken to be there.
template <int kRanks>
__device__ __forceinline__ void wait_for_all(const Params& p,
                                             Vec (&got)[kRanks],
                                             const Vec* first,
                                             u32 vecs_a_rank) {
    u64 start = 0;
    for (u32 polls = 1;; ++polls) {
        u32 missing = kRanks;
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer) {
            if (has_arrived(got[peer])) continue;
            missing = peer;
            got[peer] = load_relaxed_system(first + peer * vecs_a_rank);
        }
        if (missing == kRanks) return;
        if (polls % kPollsPerLook == 0) {
            u64 now = nanoseconds();
            start = start == 0 ? now : start;
            if (now - start > p.deadline_ns) give_up(p, missing);
        }
    }
}

// Where a rank's vec of a slot is in anybody's staging.
template <int kRanks>
struct Places {
    u32 num_vecs;     // of a row
    u32 vecs_a_rank;  // of its slots

    __device__ __forceinline__ explicit Places(const Params& p)
        : num_vecs(p.hidden / kVecElements), vecs_a_rank(p.capacity * num_vecs) {}

    __device__ __forceinline__ u32 of(u32 turn, u32 sender, u32 slot, u32 column) const {
        return turn % kTurns * (kRanks * vecs_a_rank) + sender * vecs_a_rank + slot * num_vecs +
               column;
    }
};

// Empty what the launch before read of this rank's staging.
template <int kRanks, typename ThreadRow>
__device__ __forceinline__ void clear_old(
    Vec* staging, const Places<kRanks>& places, const ThreadRow& row, State before, u32 rank) {
    for (u32 slot = blockIdx.x; slot < before.num_slots; slot += gridDim.x)
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer)
#pragma unroll
            for (int v = 0; v < ThreadRow::kColumns; ++v)
                if (peer != rank && row.has(v))
                    store(staging +
                              places.of(before.launches + kTurns - 1, peer, slot, row.column(v)),
                          nothing());
}

// For the next launch; all threads of the block have read theirs.
template <int kThreads>
__device__ __forceinline__ void count_launch(const Params& p, State before) {
    for (u32 i = blockIdx.x + threadIdx.x * gridDim.x; i < p.capacity; i += kThreads * gridDim.x)
        p.states[i] = {before.launches + 1, gridDim.x};
}
