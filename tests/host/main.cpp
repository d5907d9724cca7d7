// Runs launches of the kernel on all ranks: a case from stdin, memory after each launch to stdout.
//
// Each channel of each rank is a stream: a std::thread that fills x, launches, and copies what it
// finds, without waiting for anybody else. The build puts this folder, the kernel's files and
// variants.inc (one line an instantiation) together.
#include <vector>

#include "allreduce_rmsnorm.cu"

namespace {

struct Variant {
    void (*kernel)(Params);
    u32 num_threads, shared_bytes, is_multicast, is_fp8;
};
const Variant kVariants[] = {
#include "variants.inc"
};

struct Case {
    u32 variant, num_ranks, num_ctas, num_channels, num_launches;
    u32 capacity, owned_capacity;  // rows of x and of residual, with some that no launch may touch
    u32 hidden, has_residual, is_in_place;
    u32 dead_rank, dead_from;      // from this launch on, that rank is gone
    u32 late_rank, late_ms;        // before each launch
    u32 other_rank, other_digest;  // has other arguments than the rest
    u32 deadline_ms, first_epoch, seed;
    float eps, weight_offset;
};

struct Rank {
    std::vector<Vec> x, out;
    std::vector<float> scales;
    std::vector<u64> signals;
    std::vector<u32> epochs;
};

// What the ranks of one channel share, and where it is as one address.
struct Channel {
    std::vector<Rank> ranks;
    char *x = nullptr, *out = nullptr, *scales = nullptr;
};

struct Launch {
    const Variant& variant;
    Params params;
};

Case c;
std::vector<u32> num_tokens;                // [launch]
std::vector<Vec> weight, x, residual, out;  // [hidden]; [launch][rank][capacity][hidden]; likewise
std::vector<float> scales;                  // [launch][rank][capacity]
std::atomic<bool> is_trapped = false;

constexpr int kSharedVecs = 228 * 1024 / sizeof(Vec);
constexpr u32 kUnwritten = 0xffc1ffc1;  // a NaN in either type
constexpr Vec kUnwrittenVec = {{kUnwritten, kUnwritten, kUnwritten, kUnwritten}};

}  // namespace

thread_local Vec shared[kSharedVecs];

namespace {

bool run_cta(const Launch& launch, u32 cta, u32 seed) {
    blockIdx.x = cta;
    gridDim.x = c.num_ctas;
    std::fill_n(shared, kSharedVecs, kUnwrittenVec);
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

// The addresses of a buffer as the kernel takes them: of every rank, or the multicast one.
template <typename To, typename Vector>
void address(To** addresses, char* multicast, std::vector<Rank>& ranks, Vector Rank::* buffer) {
    for (u32 peer = 0; peer < (multicast ? 1 : c.num_ranks); ++peer) {
        void* memory = multicast ? multicast : static_cast<void*>((ranks[peer].*buffer).data());
        addresses[peer] = static_cast<To*>(memory);
    }
}

Params arguments(Channel& channel, u32 rank, u32 launch, Vec* kept) {
    Params p{};
    for (u32 peer = 0; peer < c.num_ranks; ++peer)
        p.barrier.signals[peer] = channel.ranks[peer].signals.data();
    p.barrier.epochs = channel.ranks[rank].epochs.data();
    p.barrier.deadline_ns = c.deadline_ms * 1'000'000ull;
    p.barrier.rank = rank;
    p.barrier.digest = rank == c.other_rank ? c.other_digest : 1;
    address(p.x, channel.x, channel.ranks, &Rank::x);
    if (c.is_in_place)
        address(p.out, channel.x, channel.ranks, &Rank::x);
    else
        address(p.out, channel.out, channel.ranks, &Rank::out);
    address(p.scales, channel.scales, channel.ranks, &Rank::scales);
    p.residual = c.has_residual ? kept : nullptr;
    p.weight = weight.data();
    p.eps = c.eps;
    p.weight_offset = c.weight_offset;
    p.num_tokens = num_tokens[launch];
    p.hidden = c.hidden;
    return p;
}

void run_stream(Channel& channel, u32 rank, u32 first) {
    u32 row_vecs = c.hidden / kVecElements;
    Rank& own = channel.ranks[rank];
    for (u32 i = first; i < c.num_launches; i += c.num_channels) {
        if (rank == c.dead_rank && i >= c.dead_from) return;
        if (rank == c.late_rank) std::this_thread::sleep_for(std::chrono::milliseconds(c.late_ms));
        u32 buffer = i * c.num_ranks + rank;
        Vec* found = &x[buffer * c.capacity * row_vecs];
        // Nobody writes here before this rank has arrived at the launch's first barrier.
        std::copy_n(found, own.x.size(), own.x.data());
        std::fill(own.out.begin(), own.out.end(), kUnwrittenVec);
        std::fill(own.scales.begin(), own.scales.end(), -1.0f);
        Vec* kept = &residual[buffer * c.owned_capacity * row_vecs];
        Params p = arguments(channel, rank, i, kept);
        if (!run_grid({kVariants[c.variant], p}, c.seed + 1000 * buffer)) {
            is_trapped = true;
            return;
        }
        std::copy_n(own.x.data(), own.x.size(), found);
        std::copy_n(own.out.data(), own.out.size(), &out[buffer * c.capacity * row_vecs]);
        std::copy_n(own.scales.data(), own.scales.size(), &scales[buffer * c.capacity]);
    }
}

template <typename Vector>
char* map_multicast(std::vector<Rank>& ranks, Vector Rank::* buffer) {
    std::vector<char*> memory;
    for (Rank& rank : ranks) memory.push_back(reinterpret_cast<char*>((rank.*buffer).data()));
    size_t bytes = (ranks[0].*buffer).size() * sizeof((ranks[0].*buffer)[0]);
    return shim::multicasts.emplace_back(memory, bytes).base;
}

void make(Channel& channel) {
    size_t row_vecs = c.hidden / kVecElements;
    Rank fresh{std::vector<Vec>(c.capacity * row_vecs), std::vector<Vec>(c.capacity * row_vecs),
               std::vector<float>(c.capacity),
               std::vector<u64>(c.num_ctas * kMaxRanks, c.first_epoch),
               std::vector<u32>(c.num_ctas, c.first_epoch)};
    channel.ranks.assign(c.num_ranks, fresh);
    if (!kVariants[c.variant].is_multicast) return;
    channel.x = map_multicast(channel.ranks, &Rank::x);
    channel.out = map_multicast(channel.ranks, &Rank::out);
    channel.scales = map_multicast(channel.ranks, &Rank::scales);
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

template <typename T>
void write(const std::vector<T>& items) {
    std::fwrite(items.data(), sizeof(T), items.size(), stdout);
}

}  // namespace

int main() {
    read(&c, 1);
    size_t row_vecs = c.hidden / kVecElements, buffers = c.num_launches * c.num_ranks;
    read(num_tokens, c.num_launches);
    read(weight, row_vecs);
    read(x, buffers * c.capacity * row_vecs);
    read(residual, buffers * c.owned_capacity * row_vecs);
    out.resize(x.size());
    scales.resize(buffers * c.capacity);

    std::vector<Channel> channels(c.num_channels);
    for (Channel& channel : channels) make(channel);
    std::vector<std::thread> streams;
    for (u32 channel = 0; channel < c.num_channels; ++channel)
        for (u32 rank = 0; rank < c.num_ranks; ++rank)
            streams.emplace_back(run_stream, std::ref(channels[channel]), rank, channel);
    for (std::thread& stream : streams) stream.join();
    if (is_trapped) return 1;
    write(x);
    write(residual);
    write(out);
    write(scales);
}
