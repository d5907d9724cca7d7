// residual := sum over ranks of part + residual; out := RMSNorm(sum) * (weight_offset + weight).
//
//   The short kernel between the two rounds of copies (sglang_tokenweave/copy_engine.py). It reads
//   and writes this rank's memory only: its own partial rows, and those that its peers have copied
//   into its staging. A block has one row and keeps it in registers; the sum runs in float32, in
//   rank order. `out` may be the rank's own part: a thread reads its columns before it writes them.
//
// FP8 rows have a scale each, their largest magnitude / 448; their values were not rounded before.
#include "block_row.cuh"

constexpr int kMaxRanks = 8;

struct Params {
    const Vec* parts[kMaxRanks];  // [num_rows, hidden], of each rank
    Vec* residual;                // [num_rows, hidden]; null: none
    const Vec* weight;            // [hidden]
    void* out;                    // [num_rows, hidden] of T, or of FP8
    float* scales;                // [num_rows]; FP8 only
    u32* count;                   // ops on this channel, in this rank's memory
    u64* watched;                 // phase, then count, in the host's memory; null: nobody watches
    u32 next_phase;               // written to `watched`
    u32 num_ops;                  // added to the count: 0 if another piece of the op follows
    float eps;
    float weight_offset;
    u32 num_rows;  // there is one block even without rows
    u32 hidden;
};

// A wait of this op is over: the count tells a watcher one op from the next, also when the same
// captured launch is replayed.
__device__ __forceinline__ void report(const Params& p) {
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    u32 count = *p.count + p.num_ops;
    *p.count = count;
    if (p.watched == nullptr) return;
    store_release_system(p.watched, static_cast<u64>(count) << 32 | p.next_phase);
}

template <typename T, bool kFp8, int kRanks, int kVecs, int kThreads>
__global__ __launch_bounds__(kThreads) void add_rmsnorm(const __grid_constant__ Params p) {
    using ThreadRow = Row<T, kVecs, kThreads>;
    __shared__ float squares[ThreadRow::kWarps], magnitudes[ThreadRow::kWarps];

    report(p);
    u64 row = blockIdx.x;
    if (row >= p.num_rows) return;
    ThreadRow x{p.hidden / kVecElements};

#pragma unroll
    for (int source = 0; source < kRanks; ++source) x.add_row(p.parts[source] + row * x.num_vecs);
    if (p.residual != nullptr) {
        x.add_row(p.residual + row * x.num_vecs);
        x.store_row(p.residual + row * x.num_vecs);
    }
    Vec weight[kVecs] = {};
    x.load_row(weight, p.weight);
    float mean_square = over_block<Sum>(x.sum_of_squares(), squares) / static_cast<float>(p.hidden);
    x.scale_by(rsqrtf(mean_square + p.eps), weight, p.weight_offset);

    if constexpr (kFp8) {
        float most = over_block<Max>(x.largest(), magnitudes);
        if (threadIdx.x == 0) store(p.scales + row, most / kLargestE4m3);
        // A row of zeros stays one; its scale is 0, too.
        float inverse = most > 0.0f ? kLargestE4m3 / most : 0.0f;
        x.store_fp8(static_cast<ByteVec*>(p.out) + row * x.num_vecs, inverse);
    } else {
        x.store_row(static_cast<Vec*>(p.out) + row * x.num_vecs);
    }
}
