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
//   A launch takes about as long as the exchange of a few rows. So it may start early, beside the
//   end of the kernel before, and lets the next one do so ("programmatic dependent launch").
#include "block_row.cuh"

constexpr int kMaxRanks = 8;
constexpr int kTurns = 3;
constexpr u32 kEmpty = 0x80008000u;  // -0.0 twice, in either type
constexpr u32 kPollsPerLook = 256;   // at the clock

struct State {     // of this rank, in its memory
    u32 launches;  // until now
    u32 num_rows;  // of the last one
    u32 ended;     // blocks of this one
};

struct Params {
    Vec*
        staging[kMaxRanks];  // [turn][rank][capacity][hidden], of every rank as this one reaches it
    const Vec* x;            // [num_rows, hidden], this rank's partial sums
    Vec* residual;           // [num_rows, hidden], alike on all ranks; null: none
    Vec* out;                // [num_rows, hidden]; may be x
    const Vec* weight;       // [hidden]
    State* state;
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

__device__ __forceinline__ bool has_arrived(Vec v) {
    return v.word[0] != kEmpty && v.word[1] != kEmpty && v.word[2] != kEmpty && v.word[3] != kEmpty;
}

// Wait for what `peer` sends to a place of this rank's staging; `v` is what was there a moment ago.
__device__ __forceinline__ Vec wait_for(const Params& p, const Vec* place, Vec v, u32 peer) {
    u64 start = 0;
    for (u32 polls = 1; !has_arrived(v); ++polls) {
        if (polls % kPollsPerLook == 0) {
            u64 now = nanoseconds();
            start = start == 0 ? now : start;
            if (now - start > p.deadline_ns) {
                printf("tokenweave: rank %u, CTA %u waited %llu ms for rows of rank %u\n", p.rank,
                       blockIdx.x, p.deadline_ns / 1000000, peer);
                __trap();
            }
        }
        v = load_relaxed_system(place);
    }
    return v;
}

// A block for each row.
template <typename T, int kRanks, int kVecs, int kThreads>
__global__ __launch_bounds__(kThreads, 1) void oneshot_rmsnorm(const __grid_constant__ Params p) {
    using ThreadRow = Row<T, kVecs, kThreads>;
    __shared__ float squares[ThreadRow::kWarps];
    wait_for_kernel_before();
    u32 launches = p.state->launches, before = p.state->num_rows;
    ThreadRow sum{p.hidden / kVecElements};
    auto place = [&](u32 owner, u32 turn, u32 sender, u32 row, int v) {
        u64 rows = static_cast<u64>(turn % kTurns * kRanks + sender) * p.capacity + row;
        return p.staging[owner] + rows * sum.num_vecs + sum.column(v);
    };
    u64 start = static_cast<u64>(blockIdx.x) * sum.num_vecs;

    Vec sent[kVecs] = {};
    sum.load_row(sent, p.x + start);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
        if (sum.column(v) >= sum.num_vecs) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) sent[v].word[i] = without_minus_zeros(sent[v].word[i]);
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer)
            if (peer != p.rank)
                store_relaxed_system(place(peer, launches, p.rank, blockIdx.x, v), sent[v]);
    }
    let_next_kernel_start();  // while the rows travel

#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
        if (sum.column(v) >= sum.num_vecs) continue;
        Vec got[kRanks];  // all loads are under way before the first is looked at
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer)
            got[peer] = peer == p.rank
                            ? sent[v]
                            : load_relaxed_system(place(p.rank, launches, peer, blockIdx.x, v));
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer)
            add<T>(sum.values[v],
                   wait_for(p, place(p.rank, launches, peer, blockIdx.x, v), got[peer], peer));
    }
    if (p.residual != nullptr) {
        sum.add_row(p.residual + start);
        sum.store_row(p.residual + start);
    }
    Vec weight[kVecs] = {};
    sum.load_row(weight, p.weight);
    float mean_square =
        over_block<Sum>(sum.sum_of_squares(), squares) / static_cast<float>(p.hidden);
    sum.scale_by(rsqrtf(mean_square + p.eps), weight, p.weight_offset);
    sum.store_row(p.out + start);

    for (u32 i = blockIdx.x; i < before * kRanks; i += gridDim.x)
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
            if (sum.column(v) < sum.num_vecs)
                store(place(p.rank, launches + kTurns - 1, i % kRanks, i / kRanks, v),
                      {{kEmpty, kEmpty, kEmpty, kEmpty}});

    __syncthreads();
    if (threadIdx.x == 0 && add_ordered(&p.state->ended, 1) == gridDim.x - 1)
        *p.state = {launches + 1, p.num_rows, 0};
}
