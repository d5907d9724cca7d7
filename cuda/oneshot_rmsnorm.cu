// residual := sum over ranks of x + residual; out := RMSNorm(sum) * (weight_offset + weight), for
// few rows: one exchange and no barrier.
//
//   Every rank writes its partial rows into the staging of all others and adds up what has arrived
//   in its own, in float32, in rank order, so that all ranks hold the same bits. Each keeps the
//   whole residual. That rows are there is seen from the rows themselves, as in Lamport's queue
//   (flashinfer and TensorRT-LLM do the same): staging that nobody has written holds -0.0 in pairs,
//   and -0.0 is sent as 0.0.
//
//   Staging has three parts, used by turns. A launch reads one, and empties the one that the launch
//   before it read: nobody writes there before all ranks have ended this launch, because the next
//   but one, which does, needs rows of the next one from everybody. A count in device memory tells
//   the turn, so a captured launch can be replayed. Blocks need not run side by side: each sends
//   its rows before it waits, and they start in order.
//
//   A launch takes about as long as the exchange of a few rows. So all that needs no peer is done
//   while rows travel, nothing is left for the end, and a launch may start early, beside the end
//   of the kernel before, and lets the next one do so ("programmatic dependent launch").
#include "block_row.cuh"

constexpr int kMaxRanks = 8;
constexpr int kTurns = 3;
constexpr u32 kEmpty = 0x80008000u;  // -0.0 twice, in either type
constexpr u32 kPollsPerLook = 256;   // at the clock

// What launches leave for the next one. Each block has one of its own, so that none waits for
// another to count: it keeps those of blocks that the next launch may have, too.
struct alignas(8) State {  // read at once
    u32 launches;          // until now
    u32 num_rows;          // of the last one
};

struct Params {
    Vec*
        staging[kMaxRanks];  // [turn][rank][capacity][hidden], of every rank as this one reaches it
    const Vec* x;            // [num_rows, hidden], this rank's partial sums
    Vec* residual;           // [num_rows, hidden], alike on all ranks; null: none
    Vec* out;                // [num_rows, hidden]; may be x
    const Vec* weight;       // [hidden]
    State* states;           // [capacity]
    u64 deadline_ns;
    u32 rank;
    u32 capacity;  // rows
    u32 num_rows;
    u32 hidden;
    float eps;
    float weight_offset;
};

__device__ __forceinline__ u32 without_minus_zeros(u32 pair) {
    u32 low = pair & 0xffffu, high = pair >> 16;
    return (low == 0x8000u ? 0u : low) | (high == 0x8000u ? 0u : high << 16);
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

// A block for each row.
template <typename T, int kRanks, int kVecs, int kThreads>
__global__ __launch_bounds__(kThreads, 1) void oneshot_rmsnorm(const __grid_constant__ Params p) {
    using ThreadRow = Row<T, kVecs, kThreads>;
    __shared__ float squares[ThreadRow::kWarps];
    wait_for_kernel_before();
    ThreadRow sum{p.hidden / kVecElements};
    State before = p.states[blockIdx.x];
    u64 start = static_cast<u64>(blockIdx.x) * sum.num_vecs;
    Vec sent[kVecs] = {};
    sum.load_row(sent, p.x + start);

    Vec* own = p.staging[p.rank];
    u32 vecs_a_rank = p.capacity * sum.num_vecs;
    auto place = [&](u32 turn, u32 sender, u32 row, int v) {
        return turn % kTurns * (kRanks * vecs_a_rank) + sender * vecs_a_rank + row * sum.num_vecs +
               sum.column(v);
    };
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
        if (sum.column(v) >= sum.num_vecs) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) sent[v].word[i] = without_minus_zeros(sent[v].word[i]);
        u32 mine = place(before.launches, p.rank, blockIdx.x, v);
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer)
            if (peer != p.rank) store_relaxed_system(p.staging[peer] + mine, sent[v]);
    }
    let_next_kernel_start();

    // While the rows travel.
    Vec residual[kVecs] = {}, weight[kVecs] = {};
    if (p.residual != nullptr) sum.load_row(residual, p.residual + start);
    sum.load_row(weight, p.weight);
    for (u32 row = blockIdx.x; row < before.num_rows; row += gridDim.x)
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer)
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                if (peer != p.rank && sum.column(v) < sum.num_vecs)
                    store(own + place(before.launches + kTurns - 1, peer, row, v), nothing());

#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
        if (sum.column(v) >= sum.num_vecs) continue;
        Vec got[kRanks];
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer) got[peer] = peer == p.rank ? sent[v] : nothing();
        wait_for_all(p, got, own + place(before.launches, 0, blockIdx.x, v), vecs_a_rank);
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer) add<T>(sum.values[v], got[peer]);
        add<T>(sum.values[v], residual[v]);
    }
    if (p.residual != nullptr) sum.store_row(p.residual + start);
    float mean_square =
        over_block<Sum>(sum.sum_of_squares(), squares) / static_cast<float>(p.hidden);
    // All threads have read theirs by now.
    for (u32 i = blockIdx.x + threadIdx.x * gridDim.x; i < p.capacity; i += kThreads * gridDim.x)
        p.states[i] = {before.launches + 1, p.num_rows};
    sum.scale_by(rsqrtf(mean_square + p.eps), weight, p.weight_offset);
    sum.store_row(p.out + start);
}
