// x := RMSNorm(sum over ranks of x + residual) * (weight_offset + weight); residual := the sum.
//
//   Rank r owns rows [r * share, (r + 1) * share): it alone reads them on all ranks, adds in
//   float32 in rank order, keeps their residual, and writes the result to all ranks, so that all
//   hold the same bits. In place: nobody else reads or writes an owner's rows between the two
//   barriers. First barrier: the partial sums of all ranks are there. Second: so are everybody's
//   results.
//
// A row belongs to a group of threads, and each thread to the same columns of every row: it fetches
// its own columns of the next rows asynchronously into shared memory that no other thread touches.
#include "barrier.cuh"
#include "element.cuh"
#include "ptx.cuh"

struct Params {
    Barrier barrier;
    Vec* x[kMaxRanks];  // [num_tokens, hidden] on every rank, as this rank reaches it
    Vec* residual;      // [rows of this rank, hidden]; null: none
    const Vec* weight;  // [hidden]
    float eps;
    float weight_offset;
    u32 num_tokens;
    u32 hidden;
};

constexpr int kWarpThreads = 32;
constexpr int kVecElements = 8;

// One group of threads at its rows.
template <typename T, int kRanks, int kVecs, int kGroupThreads, int kStages>
struct Group {
    const Params& p;
    Vec* stages;     // shared: [kStages][kRanks + 1][kVecs][kGroupThreads]
    float* partial;  // shared: [2][warps of the group]
    u32 id, thread, num_vecs;
    Vec weight[kVecs];

    static constexpr int kWarps = kGroupThreads / kWarpThreads;
    static constexpr int kSourceVecs = kVecs * kGroupThreads;
    static constexpr int kStageVecs = (kRanks + 1) * kSourceVecs;

    __device__ __forceinline__ bool has(int v) const {
        return v * kGroupThreads + thread < num_vecs;
    }
    __device__ __forceinline__ Vec* slot(u32 stage, int source, int v) const {
        return stages + stage * kStageVecs + source * kSourceVecs + v * kGroupThreads + thread;
    }
    __device__ __forceinline__ u64 column(u64 row, int v) const {
        return row * num_vecs + v * kGroupThreads + thread;
    }

    // Start to fetch a row; `mine` is its index among this rank's rows. Peers' parts first: far
    // away.
    __device__ __forceinline__ void fetch(u32 stage, u32 row, u32 mine) {
#pragma unroll
        for (int i = 1; i <= kRanks; ++i) {
            int source = (p.barrier.rank + i) % kRanks;
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                if (has(v)) copy_async(slot(stage, source, v), p.x[source] + column(row, v));
        }
        if (p.residual != nullptr) {
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                if (has(v)) copy_async(slot(stage, kRanks, v), p.residual + column(mine, v));
        }
    }

    __device__ __forceinline__ void sum(u32 stage, float (&row)[kVecs][kVecElements]) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) row[v][i] = 0.0f;
            if (!has(v)) continue;
#pragma unroll
            for (int source = 0; source < kRanks; ++source)
                add<T>(row[v], load_shared(slot(stage, source, v)));
            if (p.residual != nullptr) add<T>(row[v], load_shared(slot(stage, kRanks, v)));
        }
    }

    // Mean of squares over the row. `parity` alternates, so that one barrier a row is enough.
    __device__ __forceinline__ float mean_square(const float (&row)[kVecs][kVecElements],
                                                 u32 parity) {
        float total = 0.0f;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) total += row[v][i] * row[v][i];
#pragma unroll
        for (int lane = kWarpThreads / 2; lane > 0; lane /= 2)
            total += __shfl_xor_sync(0xffffffffu, total, lane);
        float* sums = partial + parity * kWarps;
        if (thread % kWarpThreads == 0) sums[thread / kWarpThreads] = total;
        barrier_of(1 + id, kGroupThreads);
        total = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) total += sums[warp];
        return total / static_cast<float>(p.hidden);
    }

    __device__ __forceinline__ void finish(u32 row,
                                           const float (&sums)[kVecs][kVecElements],
                                           float scale) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            if (!has(v)) continue;
            float gain[kVecElements] = {};
            add<T>(gain, weight[v]);
            float out[kVecElements];
#pragma unroll
            for (int i = 0; i < kVecElements; ++i)
                out[i] = sums[v][i] * scale * (p.weight_offset + gain[i]);
            Vec rounded = round_all<T>(out);
#pragma unroll
            for (int i = 1; i <= kRanks; ++i)
                store(p.x[(p.barrier.rank + i) % kRanks] + column(row, v), rounded);
        }
    }
};

template <typename T, int kRanks, int kVecs, int kGroups, int kGroupThreads, int kStages>
__global__ __launch_bounds__(kGroups* kGroupThreads,
                             1) void allreduce_rmsnorm(const __grid_constant__ Params p) {
    using RowGroup = Group<T, kRanks, kVecs, kGroupThreads, kStages>;
    extern __shared__ Vec shared[];
    __shared__ float partials[kGroups][2 * RowGroup::kWarps];

    u32 id = threadIdx.x / kGroupThreads;
    RowGroup group{p,
                   shared + id * kStages * RowGroup::kStageVecs,
                   partials[id],
                   id,
                   threadIdx.x % kGroupThreads,
                   p.hidden / kVecElements,
                   {}};
#pragma unroll
    for (int v = 0; v < kVecs; ++v)
        if (group.has(v)) group.weight[v] = load(p.weight + v * kGroupThreads + group.thread);

    u32 share = (p.num_tokens + kRanks - 1) / kRanks;
    u32 first = min(p.barrier.rank * share, p.num_tokens);
    u32 owned = min(share, p.num_tokens - first);
    u32 start = blockIdx.x * kGroups + id, step = gridDim.x * kGroups;

    u32 epoch = p.barrier.epochs[blockIdx.x] + 1;
    meet<kRanks>(p.barrier, epoch);

    // Groups of one thread's copies complete in order: one is committed per stage, empty or not.
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
        u32 mine = start + stage * step;
        if (mine < owned) group.fetch(stage, first + mine, mine);
        copy_async_commit();
    }
    u32 stage = 0, parity = 0;
    for (u32 mine = start; mine < owned; mine += step) {
        float sums[kVecs][kVecElements];
        copy_async_wait<kStages - 1>();
        group.sum(stage, sums);
        u32 later = mine + kStages * step;  // its place in shared memory has just been read
        if (later < owned) group.fetch(stage, first + later, later);
        copy_async_commit();
        if (p.residual != nullptr) {
#pragma unroll
            for (int v = 0; v < kVecs; ++v)
                if (group.has(v)) store(p.residual + group.column(mine, v), round_all<T>(sums[v]));
        }
        float scale = rsqrtf(group.mean_square(sums, parity) + p.eps);
        group.finish(first + mine, sums, scale);
        stage = (stage + 1) % kStages;
        parity ^= 1;
    }

    meet<kRanks>(p.barrier, epoch + 1);
    if (threadIdx.x == 0) p.barrier.epochs[blockIdx.x] = epoch + 1;
}
