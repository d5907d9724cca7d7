// out := RMSNorm(sum over ranks of x + residual) * (weight_offset + weight); residual := the sum.
//
//   Rank r owns rows [r * share, (r + 1) * share): it alone reads them on all ranks, adds in
//   float32, keeps their residual, and writes the result to all ranks, so that all hold the same
//   bits. `out` may be `x`: nobody else reads or writes an owner's rows between the two barriers.
//   First barrier: the partial sums of all ranks are there. Second: so are everybody's results.
//
// Several groups of threads in a CTA each work at a row, while the pieces of their next rows
// travel. A launch may start early, beside the end of the kernel before it, and lets the next one.
#include "barrier.cuh"
#include "rows.cuh"
#include "transports.cuh"

// Addresses: of every rank's memory as this rank reaches it; with multicast the first alone.
struct Params {
    Barrier barrier;
    const Vec* x[kMaxRanks];   // [num_tokens, hidden]
    void* out[kMaxRanks];      // [num_tokens, hidden], in the element type or FP8
    float* scales[kMaxRanks];  // FP8 only: [num_tokens], what the bytes of a row are multiplied by
    Vec* residual;             // [rows of this rank, hidden]; null: none
    const Vec* weight;         // [hidden]
    float eps;
    float weight_offset;
    u32 num_tokens;
    u32 hidden;
};

template <bool kFp8>
struct Packed {
    using Type = Vec;
};
template <>
struct Packed<true> {
    using Type = ByteVec;
};

// One group of threads at its rows.
template <typename T, typename Transport, bool kFp8, int kVecs, int kThreads, int kStages>
struct Group {
    using Sums = float[kVecs][kVecElements];
    using Out = typename Packed<kFp8>::Type;
    // Of a row: the addends to fetch, the residual last.
    static constexpr int kPieces = Transport::kFabricAdds ? 1 : Transport::kAddresses + 1;
    // Where the fabric adds, registers are short: there the weight is read for each row, from L1.
    static constexpr bool kKeepsWeight = !Transport::kFabricAdds;

    const Params& p;
    Ring<kVecs, kThreads, kStages> ring;
    WarpFacts<kThreads>* parts;  // shared: [2], by turns, so that one barrier a row is enough
    u32 id, first, owned, step;  // rows: the first of this rank's, how many, from one to the next
    Vec weight[kVecs];           // if kKeepsWeight
    Vec ahead[kVecs];            // where the fabric adds: the sum of the next row

    // Fetch piece `i` counted from the first one of the row `mine` (an index into this rank's).
    __device__ __forceinline__ void fetch(u32 into, u32 mine, int i) {
        mine += i / kPieces * step;
        bool is_residual = i % kPieces == kPieces - 1;
        const Vec* rows = is_residual ? p.residual : p.x[i % kPieces];
        ring.fetch(into, mine < owned ? rows : nullptr, is_residual ? mine : first + mine);
    }

    __device__ __forceinline__ void load_ahead(u32 mine) {
        if (!Transport::kFabricAdds || mine >= owned) return;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
            if (ring.columns.has(v))
                ahead[v] =
                    Transport::template sum<T>(p.x[0] + ring.columns.offset(first + mine, v));
    }

    __device__ __forceinline__ void start(u32 mine) {
#pragma unroll
        for (int i = 0; i < kStages; ++i) fetch(i, mine, i);
        load_ahead(mine);
    }

    // Add up a row and set the pieces of later ones on their way.
    __device__ __forceinline__ void sum(u32 mine, Sums& sums) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) sums[v][i] = 0.0f;
            if (Transport::kFabricAdds && ring.columns.has(v)) add<T>(sums[v], ahead[v]);
        }
        load_ahead(mine + step);
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            if (i < kPieces - 1 || p.residual != nullptr) ring.template add_oldest<T>(sums);
            fetch(ring.stage, mine, i + kStages);
            ring.advance();
        }
    }

    __device__ __forceinline__ void keep_residual(u32 mine, const Sums& sums) {
        if (p.residual == nullptr) return;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
            if (ring.columns.has(v))
                store(p.residual + ring.columns.offset(mine, v), round_all<T>(sums[v]));
    }

    // sums := sums * (weight_offset + weight); the facts are of before and after.
    __device__ __forceinline__ RowFacts apply_gain(Sums& sums, u32 turn) {
        RowFacts own = {};
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float gain[kVecElements] = {};
            if constexpr (kKeepsWeight)
                add<T>(gain, weight[v]);
            else if (ring.columns.has(v))
                add<T>(gain, load(p.weight + ring.columns.offset(0, v)));
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) {
                own.square_sum += sums[v][i] * sums[v][i];
                sums[v][i] *= p.weight_offset + gain[i];
                if constexpr (kFp8) own.largest = fmaxf(own.largest, fabsf(sums[v][i]));
            }
        }
        return combine<kFp8, kThreads>(own, parts[turn], id, ring.columns.thread);
    }

    __device__ __forceinline__ void put(u32 row, const Sums& sums, float scale) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            if (!ring.columns.has(v)) continue;
            float values[kVecElements];
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) values[i] = sums[v][i] * scale;
            Out rounded;
            if constexpr (kFp8)
                rounded = round_all_to_e4m3(values);
            else
                rounded = round_all<T>(values);
#pragma unroll
            for (int i = 0; i < Transport::kAddresses; ++i)
                Transport::put(static_cast<Out*>(p.out[i]) + ring.columns.offset(row, v), rounded);
        }
    }

    __device__ __forceinline__ void finish(u32 row, const Sums& sums, RowFacts facts) {
        float scale = rsqrtf(facts.square_sum / static_cast<float>(p.hidden) + p.eps);
        if constexpr (kFp8) {
            float unit = facts.largest * scale / kLargestE4m3;  // what the byte of 1.0 stands for
            if (ring.columns.thread < Transport::kAddresses)
                Transport::put(p.scales[ring.columns.thread] + row, unit);
            // A row of zeros stays one; its unit is 0 too.
            scale = facts.largest > 0.0f ? kLargestE4m3 / facts.largest : 0.0f;
        }
        put(row, sums, scale);
    }
};

template <typename T,
          typename Transport,
          int kRanks,
          bool kFp8,
          int kVecs,
          int kGroups,
          int kThreads,
          int kStages>
__global__ __launch_bounds__(kGroups* kThreads,
                             1) void allreduce_rmsnorm(const __grid_constant__ Params p) {
    using RowGroup = Group<T, Transport, kFp8, kVecs, kThreads, kStages>;
    extern __shared__ Vec shared[];
    __shared__ WarpFacts<kThreads> parts[kGroups][2];

    u32 id = threadIdx.x / kThreads, thread = threadIdx.x % kThreads;
    u32 share = (p.num_tokens + kRanks - 1) / kRanks;
    u32 first = min(p.barrier.rank * share, p.num_tokens);
    u32 owned = min(share, p.num_tokens - first);
    RowGroup group{p,
                   {shared + id * kStages * kVecs * kThreads, {thread, p.hidden / kVecElements}, 0},
                   parts[id],
                   id,
                   first,
                   owned,
                   gridDim.x * kGroups,
                   {},
                   {}};
    if (thread < WarpFacts<kThreads>::kEntries)  // those without a warp are never written again
        for (WarpFacts<kThreads>& each : parts[id])
            each.square_sums[thread] = each.largest[thread] = 0.0f;

    wait_for_kernel_before();
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
        if (RowGroup::kKeepsWeight && group.ring.columns.has(v))
            group.weight[v] = load(p.weight + v * kThreads + thread);
    u32 epoch = p.barrier.epochs[blockIdx.x] + 1;
    meet<kRanks, true>(p.barrier, epoch);
    Transport::fence();

    u32 start = blockIdx.x * kGroups + id, turn = 0;
    group.start(start);
    for (u32 mine = start; mine < owned; mine += group.step, turn ^= 1) {
        typename RowGroup::Sums sums;
        group.sum(mine, sums);
        group.keep_residual(mine, sums);
        RowFacts facts = group.apply_gain(sums, turn);
        group.finish(first + mine, sums, facts);
    }

    Transport::fence();
    let_next_kernel_start();  // while the ranks meet
    meet<kRanks, false>(p.barrier, epoch + 1);
    if (threadIdx.x == 0) p.barrier.epochs[blockIdx.x] = epoch + 1;
}
