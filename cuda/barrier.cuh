// A barrier between the CTAs of equal index on all ranks.
//
// Pad of a rank: signals[cta * kMaxRanks + from], what rank `from` said last: in the lower half its
// epoch, in the upper half the digest of its arguments. Epochs only grow and live in device memory,
// so a captured launch can be replayed; after 2^32 barriers they wrap, which the signed difference
// below allows. Every wait has a deadline.
#pragma once

#include "ptx.cuh"

constexpr int kMaxRanks = 8;

struct Barrier {
    u64* signals[kMaxRanks];  // the pad of every rank, as this rank reaches it
    u32* epochs;              // this rank's own count, one per CTA
    u64 deadline_ns;
    u32 rank;
    u32 digest;  // of all that must be alike on all ranks
};

// Announce this CTA's arrival to all ranks and wait for theirs.
//
// What any thread of the CTA wrote before is visible, after the barrier, to the CTAs that it met.
// With kCompares, ranks whose digests differ stop here, before they touch each other's memory.
template <int kRanks, bool kCompares>
__device__ __forceinline__ void meet(const Barrier& barrier, u32 epoch) {
    __syncthreads();
    if (threadIdx.x < kRanks) {
        u32 peer = threadIdx.x, cta = blockIdx.x;
        store_release_system(&barrier.signals[peer][cta * kMaxRanks + barrier.rank],
                             static_cast<u64>(barrier.digest) << 32 | epoch);
        const u64* arrival = &barrier.signals[barrier.rank][cta * kMaxRanks + peer];
        u64 start = nanoseconds();
        u64 seen;
        while (static_cast<int>(static_cast<u32>(seen = load_acquire_system(arrival)) - epoch) <
               0) {
            if (nanoseconds() - start > barrier.deadline_ns) {
                printf(
                    "tokenweave: rank %u, CTA %u waited %llu ms for rank %u: epoch %u, seen %u\n",
                    barrier.rank, cta, barrier.deadline_ns / 1000000, peer, epoch,
                    static_cast<u32>(seen));
                __trap();
            }
        }
        if (kCompares && static_cast<u32>(seen >> 32) != barrier.digest) {
            printf("tokenweave: rank %u, CTA %u: rank %u runs the op with other arguments\n",
                   barrier.rank, cta, peer);
            __trap();
        }
    }
    __syncthreads();
}
