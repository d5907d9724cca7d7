// Set this rank's flag at every peer, wait for the peers' flags here, and clear those; or either.
//
//   What stream memory operations do for the copy engines (sglang_tokenweave/stream_flags.py), done
//   by one warp, a lane a peer. Values are constants, so a captured launch can be replayed. A flag
//   is set at most once before it is cleared: its peer sets it again only after it has seen a later
//   flag of this rank.
#include "ptx.cuh"

constexpr int kMaxRanks = 8;

struct Params {
    u64* theirs[kMaxRanks];  // at each peer: this rank's flag; null: there is nothing to tell
    u64* mine[kMaxRanks];    // here: each peer's flag; null: there is nothing to wait for
    u64 deadline_ns;
    u32 rank;
    u32 channel;
    u32 phase;  // as of copy_plan.Phase
};

template <int kThreads>
__global__ __launch_bounds__(kThreads) void exchange_flags(const __grid_constant__ Params p) {
    u32 peer = threadIdx.x;
    if (peer >= kMaxRanks) return;
    if (p.theirs[peer] != nullptr) store_release_system(p.theirs[peer], 1);
    if (p.mine[peer] == nullptr) return;
    u64 start = nanoseconds();
    u64 seen;
    while ((seen = load_acquire_system(p.mine[peer])) != 1) {
        if (nanoseconds() - start > p.deadline_ns) {
            printf(
                "tokenweave: rank %u, channel %u waited %llu ms for rank %u's flag of phase %u: "
                "expected 1, seen %llu\n",
                p.rank, p.channel, p.deadline_ns / 1000000, peer, p.phase, seen);
            __trap();
        }
    }
    store_release_system(p.mine[peer], 0);
}
