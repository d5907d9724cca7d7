// residual := sum over ranks of x + residual; out := RMSNorm(sum) * (weight_offset + weight), for
// a few hundred rows: two exchanges and no barrier.
//
//   Rank r owns rows [r * share, (r + 1) * share), as in allreduce_rmsnorm.cu, and keeps their
//   residual. Every rank writes its partial rows into the staging of their owners; an owner adds up
//   in float32, in rank order, and writes the result into the staging of all others. Against one
//   exchange that sends 2 / num_ranks of the bytes, and takes a second way over the link.
#include "pushed_rows.cuh"

// A block for the rows of one place in all shares. Staging has slots for partial rows, then as many
// for results. `out` may be `x`: a thread writes only what it has sent.
template <typename T, int kRanks, int kVecs, int kThreads>
__global__ __launch_bounds__(kThreads, 1) void twoshot_rmsnorm(const __grid_constant__ Params p) {
    using ThreadRow = Row<T, kVecs, kThreads>;
    __shared__ float squares[ThreadRow::kWarps];
    wait_for_kernel_before();
    Places<kRanks> places(p);
    ThreadRow sum{places.num_vecs};
    State before = p.states[blockIdx.x];
    u32 slot = blockIdx.x, share = gridDim.x;
    u32 results = kTurns * kRanks * places.vecs_a_rank;  // behind the staging of partial rows
    auto has_row = [&](u32 owner) { return owner * share + slot < p.num_rows; };
    auto start_of = [&](u32 owner) {
        return static_cast<u64>(owner * share + slot) * sum.num_vecs;
    };
    bool is_owner = has_row(p.rank);
    u64 own_residual = static_cast<u64>(slot) * sum.num_vecs;

    Vec mine[kVecs] = {};
    if (is_owner) sum.load_row(mine, p.x + start_of(p.rank));
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
        if (!sum.has(v)) continue;
        Vec sent[kRanks];
#pragma unroll
        for (u32 owner = 0; owner < kRanks; ++owner)
            if (owner != p.rank && has_row(owner))
                sent[owner] = load(p.x + start_of(owner) + sum.column(v));
        u32 here = places.of(before.launches, p.rank, slot, sum.column(v));
#pragma unroll
        for (u32 owner = 0; owner < kRanks; ++owner)
            if (owner != p.rank && has_row(owner))
                store_relaxed_system(p.staging[owner] + here, without_minus_zeros(sent[owner]));
    }
    let_next_kernel_start();

    // While the rows travel.
    Vec* own = p.staging[p.rank];
    Vec residual[kVecs] = {}, weight[kVecs] = {};
    if (is_owner && p.residual != nullptr) sum.load_row(residual, p.residual + own_residual);
    if (is_owner) sum.load_row(weight, p.weight);
    clear_old(own, places, sum, before, p.rank);
    clear_old(own + results, places, sum, before, p.rank);

#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
        if (!is_owner || !sum.has(v)) continue;
        Vec got[kRanks];
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer)
            got[peer] = peer == p.rank ? without_minus_zeros(mine[v]) : nothing();
        u32 first = places.of(before.launches, 0, slot, sum.column(v));
        wait_for_all(p, got, own + first, places.vecs_a_rank);
#pragma unroll
        for (u32 peer = 0; peer < kRanks; ++peer) add<T>(sum.values[v], got[peer]);
        add<T>(sum.values[v], residual[v]);
    }
    if (is_owner && p.residual != nullptr) sum.store_row(p.residual + own_residual);
    float mean_square =
        over_block<Sum>(sum.sum_of_squares(), squares) / static_cast<float>(p.hidden);
    count_launch<kThreads>(p, before);
    sum.scale_by(rsqrtf(mean_square + p.eps), weight, p.weight_offset);

    if (is_owner) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            if (!sum.has(v)) continue;
            Vec result = without_minus_zeros(round_all<T>(sum.values[v]));
            u32 here = results + places.of(before.launches, p.rank, slot, sum.column(v));
#pragma unroll
            for (u32 peer = 0; peer < kRanks; ++peer)
                if (peer != p.rank) store_relaxed_system(p.staging[peer] + here, result);
            store(p.out + start_of(p.rank) + sum.column(v), result);
        }
    }
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
        if (!sum.has(v)) continue;
        Vec got[kRanks];
#pragma unroll
        for (u32 owner = 0; owner < kRanks; ++owner)
            got[owner] = owner != p.rank && has_row(owner) ? nothing() : Vec{};
        u32 first = results + places.of(before.launches, 0, slot, sum.column(v));
        wait_for_all(p, got, own + first, places.vecs_a_rank);
#pragma unroll
        for (u32 owner = 0; owner < kRanks; ++owner)
            if (owner != p.rank && has_row(owner))
                store(p.out + start_of(owner) + sum.column(v), got[owner]);
    }
}
