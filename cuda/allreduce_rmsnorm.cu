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
template <typename T,
          typename Transport,
          bool kFp8,
          int kVecs,
          int kThreads,
          int kStages,
          bool kIsExact>
struct Group {
    using Sums = float[kVecs][kVecElements];
    using Out = typename Packed<kFp8>::Type;
    // Of a row: the addends to fetch, the residual last.
    static constexpr int kPieces = Transport::kFabricAdds ? 1 : Transport::kAddresses + 1;
    // With many ranks, and where the fabric adds, registers are short: there the weight is read for
    // each row, from L1.
    static constexpr bool kKeepsGain = !Transport::kFabricAdds && Transport::kAddresses <= 4;

    const Params& p;
    Ring<Columns<kVecs, kThreads, kIsExact>, kVecs, kThreads, kStages> ring;
    SharedVecs parts;            // two WarpFacts, by turns, so that one barrier a row is enough
    u32 id, first, owned, step;  // rows: the first of this rank's, how many, from one to the next
    u32 kept;                    // rows that have a residual: all or none
    float row_part;              // 1 / hidden
    float gain[kVecs][kVecElements];  // if kKeepsGain
    Vec ahead[kVecs];                 // where the fabric adds: the sum of the next row

    // Fetch piece `i` counted from the first one of the row `mine` (an index into this rank's).
    __device__ __forceinline__ void fetch(u32 into, u32 mine, int i) {
        mine += i / kPieces * step;
        if (i % kPieces == kPieces - 1)
            ring.fetch(into, p.residual + ring.columns.offset(mine), mine < kept);
        else
            ring.fetch(into, p.x[i % kPieces] + ring.columns.offset(first + mine), mine < owned);
    }

    __device__ __forceinline__ void load_ahead(u32 mine) {
        if (!Transport::kFabricAdds || mine >= owned) return;
        const Vec* row = p.x[0] + ring.columns.offset(first + mine);
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
            if (ring.columns.has(v)) ahead[v] = Transport::template sum<T>(row + v * kThreads);
    }

    // weight_offset + weight, of this thread's columns.
    __device__ __forceinline__ void load_gain(float (&into)[kVecElements], int v) const {
        Vec weight = {};
        if (ring.columns.has(v)) weight = load(p.weight + v * kThreads + ring.columns.thread);
        widen_all<T>(into, weight);
#pragma unroll
        for (int i = 0; i < kVecElements; ++i) into[i] += p.weight_offset;
    }

    __device__ __forceinline__ void start(u32 mine) {
#pragma unroll
        for (int i = 0; i < kStages; ++i) fetch(i, mine, i);
        load_ahead(mine);
    }

    // Add up a row and set the pieces of later ones on their way.
    __device__ __forceinline__ void sum(u32 mine, Sums& sums) {
        if constexpr (Transport::kFabricAdds) {
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                if (ring.columns.has(v))
                    widen_all<T>(sums[v], ahead[v]);
                else
                    clear(sums[v]);
            load_ahead(mine + step);
        } else {
            take<true>(mine, 0, sums);
        }
#pragma unroll
        for (int i = Transport::kFabricAdds ? 0 : 1; i < kPieces; ++i) take<false>(mine, i, sums);
    }

    template <bool kIsFirst>
    __device__ __forceinline__ void take(u32 mine, int i, Sums& sums) {
        if (i < kPieces - 1 || kept != 0) ring.template take_oldest<T, kIsFirst>(sums);
        fetch(ring.stage, mine, i + kStages);
        ring.advance();
    }

    __device__ __forceinline__ void keep_residual(u32 mine, const Sums& sums) {
        if (kept == 0) return;
        Vec* row = p.residual + ring.columns.offset(mine);
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
            if (ring.columns.has(v)) store(row + v * kThreads, round_all<T>(sums[v]));
    }

    // sums := sums * (weight_offset + weight); the facts are of before and after.
    __device__ __forceinline__ RowFacts apply_gain(Sums& sums, u32 turn) {
        RowFacts own = {};
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            if constexpr (!kKeepsGain) load_gain(gain[v], v);
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) {
                own.square_sum += sums[v][i] * sums[v][i];
                sums[v][i] *= gain[v][i];
                if constexpr (kFp8) own.largest = fmaxf(own.largest, fabsf(sums[v][i]));
            }
        }
        constexpr u32 kFactsVecs = sizeof(WarpFacts<kThreads>) / sizeof(Vec);
        return combine<kFp8, kThreads>(own, parts + turn * kFactsVecs, id, ring.columns.thread);
    }

    __device__ __forceinline__ void put(u32 row, const Sums& sums, float scale) {
        u32 offset = ring.columns.offset(row);
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
                Transport::put(static_cast<Out*>(p.out[i]) + offset + v * kThreads, rounded);
        }
    }

    __device__ __forceinline__ void finish(u32 row, const Sums& sums, RowFacts facts) {
        float scale = rsqrtf(facts.square_sum * row_part + p.eps);
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
          int kStages,
          bool kIsExact>
__global__ __launch_bounds__(kGroups* kThreads,
                             1) void allreduce_rmsnorm(const __grid_constant__ Params p) {
    using RowGroup = Group<T, Transport, kFp8, kVecs, kThreads, kStages, kIsExact>;
    extern __shared__ Vec shared[];
    __shared__ WarpFacts<kThreads> parts[kGroups][2];

    u32 id = threadIdx.x / kThreads, thread = threadIdx.x % kThreads;
    pin(thread);
    u32 share = (p.num_tokens + kRanks - 1) / kRanks;
    u32 first = min(p.barrier.rank * share, p.num_tokens);
    u32 owned = min(share, p.num_tokens - first);
    Columns<kVecs, kThreads, kIsExact> columns{thread, p.hidden / kVecElements};
    SharedVecs places = SharedVecs::at(shared + id * kStages * kVecs * kThreads + thread);
    RowGroup group{p,
                   {columns, places, 0},
                   SharedVecs::at(parts[id]),
                   id,
                   first,
                   owned,
                   gridDim.x * kGroups,
                   p.residual == nullptr ? 0 : owned,
                   1.0f / static_cast<float>(p.hidden),
                   {},
                   {}};
    if (thread < WarpFacts<kThreads>::kEntries)  // those without a warp are never written again
        for (WarpFacts<kThreads>& each : parts[id])
            each.square_sums[thread] = each.largest[thread] = 0.0f;

    wait_for_kernel_before();
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
        if (RowGroup::kKeepsGain) {
            group.load_gain(group.gain[v], v);
            for (float& each : group.gain[v]) pin(each);
        }
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
