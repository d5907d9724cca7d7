// residual := sum over ranks of part + residual; out := RMSNorm(sum) * (weight_offset + weight).
//
//   The short kernel between the two rounds of copies (sglang_tokenweave/copy_engine.py). It reads
//   and writes this rank's memory only: its own partial rows, and those that its peers have copied
//   into its staging. A block has one row and keeps it in registers; the sum runs in float32, in
//   rank order. `out` may be the rank's own part: a thread reads its columns before it writes them.
//
// FP8 rows have a scale each, their largest magnitude / 448; their values were not rounded before.
#include "element.cuh"
#include "ptx.cuh"

constexpr int kMaxRanks = 8;

struct Params {
    const Vec* parts[kMaxRanks];  // [num_rows, hidden], of each rank
    Vec* residual;                // [num_rows, hidden]; null: none
    const Vec* weight;            // [hidden]
    void* out;                    // [num_rows, hidden] of T, or of FP8
    float* scales;                // [num_rows]; FP8 only
    u32* count;                   // launches on this channel, in this rank's memory
    u64* watched;                 // phase, then count, in the host's memory; null: nobody watches
    u32 next_phase;               // written to `watched`
    float eps;
    float weight_offset;
    u32 num_rows;  // there is one block even without rows
    u32 hidden;
};

constexpr int kWarpThreads = 32;
constexpr int kVecElements = 8;

struct Sum {
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};

struct Max {
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// One thread's columns of one row.
template <typename T, int kVecs, int kThreads>
struct Row {
    u32 num_vecs;
    float values[kVecs][kVecElements] = {};

    static constexpr int kWarps = kThreads / kWarpThreads;

    __device__ __forceinline__ u32 column(int v) const { return v * kThreads + threadIdx.x; }

    // All of a source's loads are under way before the first is needed.
    __device__ __forceinline__ void load_row(Vec (&loaded)[kVecs], const Vec* source) const {
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
            if (column(v) < num_vecs) loaded[v] = load(source + column(v));
    }

    __device__ __forceinline__ void add_row(const Vec* source) {
        Vec loaded[kVecs] = {};
        load_row(loaded, source);
#pragma unroll
        for (int v = 0; v < kVecs; ++v) add<T>(values[v], loaded[v]);
    }

    __device__ __forceinline__ void store_row(Vec* to) const {
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
            if (column(v) < num_vecs) store(to + column(v), round_all<T>(values[v]));
    }

    __device__ __forceinline__ void store_fp8(ByteVec* to, float inverse) const {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            if (column(v) >= num_vecs) continue;
            float scaled[kVecElements];
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) scaled[i] = values[v][i] * inverse;
            store(to + column(v), round_all_to_e4m3(scaled));
        }
    }

    __device__ __forceinline__ void scale_by(float scale,
                                             const Vec (&weight)[kVecs],
                                             float weight_offset) {
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
            float gain[kVecElements] = {};
            add<T>(gain, weight[v]);
#pragma unroll
            for (int i = 0; i < kVecElements; ++i)
                values[v][i] = values[v][i] * scale * (weight_offset + gain[i]);
        }
    }

    __device__ __forceinline__ float sum_of_squares() const {
        float total = 0.0f;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) total += values[v][i] * values[v][i];
        return total;
    }

    __device__ __forceinline__ float largest() const {
        float most = 0.0f;
#pragma unroll
        for (int v = 0; v < kVecs; ++v)
#pragma unroll
            for (int i = 0; i < kVecElements; ++i) most = fmaxf(most, fabsf(values[v][i]));
        return most;
    }
};

// Combine one value of each thread; `partials` is used once a launch.
template <typename Op, int kWarps>
__device__ __forceinline__ float over_block(float value, float (&partials)[kWarps]) {
#pragma unroll
    for (int lane = kWarpThreads / 2; lane > 0; lane /= 2)
        value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, lane));
    if (threadIdx.x % kWarpThreads == 0) partials[threadIdx.x / kWarpThreads] = value;
    __syncthreads();
    value = partials[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value = Op::of(value, partials[warp]);
    return value;
}

// The first wait of this op is over: the count tells a watcher one op from the next, also when the
// same captured launch is replayed.
__device__ __forceinline__ void report(const Params& p) {
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    u32 count = *p.count + 1;
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
