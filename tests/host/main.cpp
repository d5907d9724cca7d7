// Runs launches of the kernel on all ranks: a case from stdin, memory after each launch to stdout.
//
// Each channel of each rank is a stream: a std::thread that fills x, launches, and copies what it
// finds, without waiting for anybody else. The build puts this folder, the kernel's files and
// variants.inc (one line an instantiation) together.
#include <vector>

#include "allreduce_rmsnorm.cu"

namespace {

// The roundings of element.cuh are inline assembly; nothing here uses, hence assembles, them.
struct HostBf16 : Bf16 {
    static u32 round(float low, float high) { return half(low) | half(high) << 16; }
    static u32 half(float value) {  // to nearest, ties to even
        u32 bits = std::bit_cast<u32>(value);
        return std::isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
};

struct HostFp16 {
    static float2 widen(u32 pair) {
        return {std::bit_cast<_Float16>(static_cast<u16>(pair)),
                std::bit_cast<_Float16>(static_cast<u16>(pair >> 16))};
    }
    static u32 round(float low, float high) { return half(low) | half(high) << 16; }
    static u32 half(float value) { return std::bit_cast<u16>(static_cast<_Float16>(value)); }
};

struct Variant {
    void (*kernel)(Params);
    u32 num_threads, shared_bytes;
};
const Variant kVariants[] = {
#include "variants.inc"
};

struct Case {
    u32 variant, num_ranks, num_ctas, num_channels, num_launches;
    u32 capacity, owned_capacity;  // rows of x and of residual, with some that no launch may touch
    u32 hidden, has_residual;
    u32 dead_rank, dead_from;  // from this launch on, that rank is gone
    u32 late_rank, late_ms;    // before each launch
    u32 deadline_ms, first_epoch, seed;
    float eps, weight_offset;
};

struct Rank {
    std::vector<Vec> x;
    std::vector<u32> signals, epochs;
};

struct Launch {
    const Variant& variant;
    Params params;
};

Case c;
std::vector<u32> num_tokens;           // [launch]
std::vector<Vec> weight, x, residual;  // [hidden]; [launch][rank][capacity][hidden]; likewise
std::atomic<bool> is_trapped = false;

constexpr int kSharedVecs = 228 * 1024 / sizeof(Vec);
constexpr u32 kUnwritten = 0xffc1ffc1;  // a NaN in either type

}  // namespace

thread_local Vec shared[kSharedVecs];

namespace {

bool run_cta(const Launch& launch, u32 cta, u32 seed) {
    blockIdx.x = cta;
    gridDim.x = c.num_ctas;
    for (Vec& v : shared) std::fill_n(v.word, 4, kUnwritten);
    auto enter = [](const void* argument) {
        const auto* launch = static_cast<const Launch*>(argument);
        launch->variant.kernel(launch->params);
    };
    bool is_complete = shim::run_block(launch.variant.num_threads, seed, enter, &launch);
    for (u32 i = launch.variant.shared_bytes / sizeof(Vec); i < kSharedVecs; ++i)
        if (shared[i].word[0] != kUnwritten) {
            printf("shim: CTA %u wrote past its %u bytes\n", cta, launch.variant.shared_bytes);
            std::_Exit(4);
        }
    return is_complete;
}

bool run_grid(const Launch& launch, u32 seed) {
    std::atomic<bool> is_complete = true;
    std::vector<std::thread> ctas;
    for (u32 cta = 0; cta < c.num_ctas; ++cta)
        ctas.emplace_back([&, cta] {
            if (!run_cta(launch, cta, seed + cta)) is_complete = false;
        });
    for (std::thread& cta : ctas) cta.join();
    return is_complete;
}

void run_stream(std::vector<Rank>& ranks, u32 rank, u32 channel) {
    u32 row_vecs = c.hidden / kVecElements;
    for (u32 i = channel; i < c.num_launches; i += c.num_channels) {
        if (rank == c.dead_rank && i >= c.dead_from) return;
        if (rank == c.late_rank) std::this_thread::sleep_for(std::chrono::milliseconds(c.late_ms));
        Vec* found = &x[(i * c.num_ranks + rank) * c.capacity * row_vecs];
        std::copy_n(found, ranks[rank].x.size(), ranks[rank].x.data());
        Params p{};
        for (u32 peer = 0; peer < c.num_ranks; ++peer) {
            p.x[peer] = ranks[peer].x.data();
            p.barrier.signals[peer] = ranks[peer].signals.data();
        }
        p.barrier.epochs = ranks[rank].epochs.data();
        p.barrier.deadline_ns = c.deadline_ms * 1'000'000ull;
        p.barrier.rank = rank;
        Vec* kept = &residual[(i * c.num_ranks + rank) * c.owned_capacity * row_vecs];
        p.residual = c.has_residual ? kept : nullptr;
        p.weight = weight.data();
        p.eps = c.eps;
        p.weight_offset = c.weight_offset;
        p.num_tokens = num_tokens[i];
        p.hidden = c.hidden;
        if (!run_grid({kVariants[c.variant], p}, c.seed + 1000 * (i * c.num_ranks + rank))) {
            is_trapped = true;
            return;
        }
        std::copy_n(ranks[rank].x.data(), ranks[rank].x.size(), found);
    }
}

template <typename T>
void read(T* items, size_t count) {
    if (std::fread(items, sizeof(T), count, stdin) != count) std::_Exit(5);
}

template <typename T>
void read(std::vector<T>& items, size_t count) {
    items.resize(count);
    read(items.data(), count);
}

}  // namespace

int main() {
    read(&c, 1);
    size_t row_vecs = c.hidden / kVecElements, buffers = c.num_launches * c.num_ranks;
    read(num_tokens, c.num_launches);
    read(weight, row_vecs);
    read(x, buffers * c.capacity * row_vecs);
    read(residual, buffers * c.owned_capacity * row_vecs);

    Rank fresh{std::vector<Vec>(c.capacity * row_vecs),
               std::vector<u32>(c.num_ctas * kMaxRanks, c.first_epoch),
               std::vector<u32>(c.num_ctas, c.first_epoch)};
    std::vector<std::vector<Rank>> channels(c.num_channels, std::vector<Rank>(c.num_ranks, fresh));
    std::vector<std::thread> streams;
    for (u32 channel = 0; channel < c.num_channels; ++channel)
        for (u32 rank = 0; rank < c.num_ranks; ++rank)
            streams.emplace_back(run_stream, std::ref(channels[channel]), rank, channel);
    for (std::thread& stream : streams) stream.join();
    if (is_trapped) return 1;
    std::fwrite(x.data(), sizeof(Vec), x.size(), stdout);
    std::fwrite(residual.data(), sizeof(Vec), residual.size(), stdout);
}
