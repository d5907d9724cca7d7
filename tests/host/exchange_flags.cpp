// Runs exchange_flags on all ranks, each a std::thread: the arguments are the ranks, the exchanges,
// the rank that stops early (or none), how many it makes, and the deadline in milliseconds.
//
// Between two exchanges a rank writes a plain word to every peer's memory and reads what its peers
// wrote: only the flags order that. Prints the sum of all mistakes.
#include "exchange_flags.cu"

#include <vector>

namespace {

struct Rank {
    u64 flags[2][kMaxRanks] = {};  // by phase: an op's two exchanges alternate
    u32 words[kMaxRanks] = {};
};

std::vector<Rank> ranks;
std::atomic<u32> mistakes = 0;
std::atomic<bool> is_trapped = false;

bool exchange(u32 rank, u32 phase, u32 deadline_ms, u32 seed) {
    Params p{};
    for (u32 peer = 0; peer < ranks.size(); ++peer) {
        if (peer == rank) continue;
        p.theirs[peer] = &ranks[peer].flags[phase][rank];
        p.mine[peer] = &ranks[rank].flags[phase][peer];
    }
    p.deadline_ns = deadline_ms * 1'000'000ull;
    p.rank = rank;
    p.phase = phase + 1;
    auto enter = [](const void* argument) {
        exchange_flags<32>(*static_cast<const Params*>(argument));
    };
    return shim::run_block(32, seed, enter, &p);
}

void run_rank(u32 rank, u32 count, u32 deadline_ms) {
    for (u32 i = 0; i < count; ++i) {
        for (Rank& peer : ranks) peer.words[rank] = 2 * i + 1;
        if (!exchange(rank, 0, deadline_ms, 1000 * i + rank)) return void(is_trapped = true);
        for (u32 peer = 0; peer < ranks.size(); ++peer)
            mistakes += ranks[rank].words[peer] != 2 * i + 1;
        if (!exchange(rank, 1, deadline_ms, 1000 * i + rank + 500)) return void(is_trapped = true);
    }
}

}  // namespace

int main(int, char** arguments) {
    auto number = [&](int i) { return static_cast<u32>(std::atoi(arguments[i])); };
    ranks.resize(number(1));
    std::vector<std::thread> threads;
    for (u32 rank = 0; rank < ranks.size(); ++rank)
        threads.emplace_back(run_rank, rank, rank == number(3) ? number(4) : number(2), number(5));
    for (std::thread& thread : threads) thread.join();
    for (const Rank& rank : ranks)
        for (const auto& phase : rank.flags)
            for (u64 flag : phase) mistakes += !is_trapped && flag != 0;
    std::fprintf(stdout, "%u\n", mistakes.load());
    return is_trapped;
}
