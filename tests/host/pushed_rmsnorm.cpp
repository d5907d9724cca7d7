// Runs launches of oneshot_rmsnorm or twoshot_rmsnorm on all ranks: a case from stdin, what they
// leave to stdout.
//
// Each rank is a std::thread that launches one after another, without waiting for anybody else; so
// are the blocks of a launch, which start in order. The build puts this folder, the
// kernel's files and variants.inc (one line an instantiation) together.
#include <vector>

#include "oneshot_rmsnorm.cu"
#include "twoshot_rmsnorm.cu"

namespace {

struct Variant {
    void (*kernel)(Params);
    u32 num_threads, num_ranks;
    bool is_two_shot;

    u32 num_slots(u32 num_rows) const {
        return is_two_shot ? (num_rows + num_ranks - 1) / num_ranks : num_rows;
    }
};
const Variant kVariants[] = {
#include "variants.inc"
};

struct Case {
    u32 variant, num_launches, at_once;  // blocks that run side by side
    u32 capacity, hidden, has_residual, is_in_place;
    u32 late_rank, dead_rank, dead_from, deadline_ms, seed;
    float eps, weight_offset;
};

struct Rank {
    std::vector<Vec> staging;
    std::vector<State> states;
};

Case c;
std::vector<u32> num_rows;                  // [launch]
std::vector<Vec> weight, x, residual, out;  // [hidden]; [launch][rank][capacity][hidden]
std::vector<Rank> ranks;
std::atomic<bool> is_trapped = false;

struct Launch {
    const Variant& variant;
    Params params;
};

bool run_block(const Launch& launch, u32 block, u32 num_blocks, u32 seed) {
    blockIdx.x = block;
    gridDim.x = num_blocks;
    auto enter = [](const void* argument) {
        const auto* launch = static_cast<const Launch*>(argument);
        launch->variant.kernel(launch->params);
    };
    return shim::run_block(launch.variant.num_threads, seed, enter, &launch);
}

// Some threads take the blocks in order, as a GPU's SMs do.
bool run_grid(const Launch& launch, u32 seed) {
    u32 num_blocks = launch.variant.num_slots(launch.params.num_rows);
    std::atomic<u32> next = 0;
    std::atomic<bool> is_complete = true;
    std::vector<std::thread> workers;
    for (u32 worker = 0; worker < std::min(c.at_once, num_blocks); ++worker)
        workers.emplace_back([&] {
            for (u32 block; (block = next++) < num_blocks;)
                if (!run_block(launch, block, num_blocks, seed + block)) is_complete = false;
        });
    for (std::thread& worker : workers) worker.join();
    return is_complete;
}

void run_rank(u32 rank) {
    const Variant& variant = kVariants[c.variant];
    u32 num_ranks = variant.num_ranks, row_vecs = c.hidden / kVecElements;
    for (u32 i = 0; i < c.num_launches; ++i) {
        if (rank == c.dead_rank && i >= c.dead_from) return;
        if (rank == c.late_rank) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        u64 start = static_cast<u64>(i * num_ranks + rank) * c.capacity * row_vecs;
        Params p{};
        for (u32 peer = 0; peer < num_ranks; ++peer) p.staging[peer] = ranks[peer].staging.data();
        p.x = &x[start];
        u32 first = variant.is_two_shot ? rank * variant.num_slots(num_rows[i]) : 0;
        p.residual = c.has_residual ? residual.data() + start + first * row_vecs : nullptr;
        p.out = c.is_in_place ? &x[start] : &out[start];
        p.weight = weight.data();
        p.states = ranks[rank].states.data();
        p.deadline_ns = c.deadline_ms * 1'000'000ull;
        p.rank = rank;
        p.capacity = variant.num_slots(c.capacity);
        p.num_rows = num_rows[i];
        p.hidden = c.hidden;
        p.eps = c.eps;
        p.weight_offset = c.weight_offset;
        if (!run_grid({variant, p}, c.seed + 1000 * (i * num_ranks + rank))) {
            is_trapped = true;
            return;
        }
    }
}

template <typename T>
void read(T* items, size_t count) {
    if (std::fread(items, sizeof(T), count, stdin) != count) std::_Exit(5);
}

template <typename T>
void write(const std::vector<T>& items) {
    std::fwrite(items.data(), sizeof(T), items.size(), stdout);
}

}  // namespace

int main() {
    read(&c, 1);
    const Variant& variant = kVariants[c.variant];
    size_t num_ranks = variant.num_ranks, row_vecs = c.hidden / kVecElements;
    size_t vecs = c.num_launches * num_ranks * c.capacity * row_vecs;
    num_rows.resize(c.num_launches);
    read(num_rows.data(), num_rows.size());
    weight.resize(row_vecs);
    read(weight.data(), row_vecs);
    for (std::vector<Vec>* each : {&x, &residual}) {
        each->resize(vecs);
        read(each->data(), vecs);
    }
    out.assign(vecs, {{~0u, ~0u, ~0u, ~0u}});
    ranks.resize(num_ranks);
    for (Rank& rank : ranks) {
        size_t slots = variant.num_slots(c.capacity), stagings = variant.is_two_shot ? 2 : 1;
        rank.staging.assign(stagings * kTurns * num_ranks * slots * row_vecs,
                            {{kEmpty, kEmpty, kEmpty, kEmpty}});
        rank.states.resize(slots);
    }
    std::vector<std::thread> threads;
    for (u32 rank = 0; rank < num_ranks; ++rank) threads.emplace_back(run_rank, rank);
    for (std::thread& thread : threads) thread.join();
    if (is_trapped) return 1;
    write(x);
    write(residual);
    write(out);
}
