// Runs add_rmsnorm on the rows of one rank: a case from stdin, what it leaves to stdout.
//
// Blocks are std::threads. The build puts this folder, the kernel's files and variants.inc (one
// line an instantiation) together.
#include "add_rmsnorm.cu"

#include <vector>

namespace {

struct Variant {
    void (*kernel)(Params);
    u32 num_threads, num_ranks, is_fp8;
};
const Variant kVariants[] = {
#include "variants.inc"
};

struct Case {
    u32 variant, rank, num_rows, hidden, has_residual, is_in_place, is_watched, num_launches, seed;
    float eps, weight_offset;
};

struct Launch {
    const Variant& variant;
    const Params& params;
};

void run_grid(const Launch& launch, u32 seed) {
    u32 num_blocks = std::max(launch.params.num_rows, 1u);
    std::vector<std::thread> blocks;
    for (u32 b = 0; b < num_blocks; ++b)
        blocks.emplace_back([&, b] {
            blockIdx.x = b;
            gridDim.x = num_blocks;
            auto enter = [](const void* argument) {
                const auto* launch = static_cast<const Launch*>(argument);
                launch->variant.kernel(launch->params);
            };
            shim::run_block(launch.variant.num_threads, seed + b, enter, &launch);
        });
    for (std::thread& block : blocks) block.join();
}

template <typename T>
std::vector<T> read(size_t count) {
    std::vector<T> items(count);
    if (std::fread(items.data(), sizeof(T), count, stdin) != count) std::_Exit(5);
    return items;
}

template <typename T>
void write(const std::vector<T>& items) {
    std::fwrite(items.data(), sizeof(T), items.size(), stdout);
}

}  // namespace

int main() {
    Case c = read<Case>(1)[0];
    const Variant& variant = kVariants[c.variant];
    size_t row_vecs = c.hidden / kVecElements, row_count = c.num_rows + 1;  // one that stays
    std::vector<Vec> weight = read<Vec>(row_vecs);
    std::vector<std::vector<Vec>> parts;
    for (u32 i = 0; i < variant.num_ranks; ++i) parts.push_back(read<Vec>(row_count * row_vecs));
    std::vector<Vec> residual = read<Vec>(row_count * row_vecs);
    std::vector<unsigned char> out(row_count * c.hidden * (variant.is_fp8 ? 1 : 2), 0xff);
    std::vector<float> scales(row_count, -1.0f);
    std::vector<u32> count(1);
    std::vector<u64> watched(1);

    Params p{};
    for (u32 i = 0; i < variant.num_ranks; ++i) p.parts[i] = parts[i].data();
    p.residual = c.has_residual ? residual.data() : nullptr;
    p.weight = weight.data();
    p.out = c.is_in_place ? static_cast<void*>(parts[c.rank].data()) : out.data();
    p.scales = scales.data();
    p.count = count.data();
    p.watched = c.is_watched ? watched.data() : nullptr;
    p.next_phase = 2;
    p.eps = c.eps;
    p.weight_offset = c.weight_offset;
    p.num_rows = c.num_rows;
    p.hidden = c.hidden;
    for (u32 i = 0; i < c.num_launches; ++i) {
        p.num_ops = i % 2;  // two pieces an op
        run_grid({variant, p}, c.seed + 1000 * i);
    }

    for (const std::vector<Vec>& part : parts) write(part);
    write(residual);
    write(scales);
    write(count);
    write(watched);
    write(out);
}
