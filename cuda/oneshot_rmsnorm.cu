// residual := sum over ranks of x + residual; out := RMSNorm(sum) * (weight_offset + weight), for
// few rows: one exchange and no barrier.
//
//   Every rank writes its partial rows into the staging of all others and adds up what has arrived
//   in its own, in float32, in rank order, so that all ranks hold the same bits. Each keeps the
//   whole residual, alike on all ranks.
#include "pushed_rows.cuh"

// A block for each row.
template <typename T, int kRanks, int kVecs, int kThreads>
__global__ __launch_bounds__(kThreads, 1) void oneshot_rmsnorm(const __grid_constant__ Params p) {
    using ThreadRow = Row<T, kVecs, kThreads>;
    __shared__ float squares[ThreadRow::kWarps];
    wait_for_kernel_before();
    Places<kRanks> places(p);
    ThreadRow sum{places.num_vecs};
    State before = p.states[blockIdx.x];
    u64 start = static_cast<u64>(blockIdx.x) * sum.num_vecs;
    Vec sent[kVecs] = {};
    sum.load_row(sent, p.x + start);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
        if (!sum.has(v)) continue;
        sent[v] = without_minus_zeros(sent[v]);
        u32 mine = places.of(before.launches, p.rank, blockIdx.x, sum.column(v));
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer)
            if (peer != p.rank) store_relaxed_system(p.staging[peer] + mine, sent[v]);
    }
    let_next_kernel_start();

    // While the rows travel.
    Vec* own = p.staging[p.rank];
    Vec residual[kVecs] = {}, weight[kVecs] = {};
    if (p.residual != nullptr) sum.load_row(residual, p.residual + start);
    sum.load_row(weight, p.weight);
    clear_old(own, places, sum, before, p.rank);

#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
        if (!sum.has(v)) continue;
        Vec got[kRanks];
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer) got[peer] = peer == p.rank ? sent[v] : nothing();
        u32 first = places.of(before.launches, 0, blockIdx.x, sum.column(v));
        wait_for_all(p, got, own + first, places.vecs_a_rank);
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer) add<T>(sum.values[v], got[peer]);
        add<T>(sum.values[v], residual[v]);
    }
    if (p.residual != nullptr) sum.store_row(p.residual + start);
    float mean_square =
        over_block<Sum>(sum.sum_of_squares(), squares) / static_cast<float>(p.hidden);
    count_launch<kThreads>(p, before);
    sum.scale_by(rsqrtf(mean_square + p.eps), weight, p.weight_offset);
    sum.store_row(p.out + start);
}
