// CUDA's execution model on a CPU: a thread block is one std::thread, its threads are fibers of it.
//
// So a thread_local variable is what a __shared__ one has to be: one per block. Fibers change at
// barriers, shuffles and polls only; which one goes on is random by seed, with priorities that
// rarely change, so that a warp may run ahead of the others as far as the barriers let it.
// ThreadSanitizer is told of each fiber as a thread: only what orders threads on a GPU orders them
// here, and that is neither a change of fibers nor a shuffle.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <thread>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local
#define printf(...) std::fprintf(stderr, __VA_ARGS__)

using std::min;

struct Dim {
    unsigned x;
};
struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }

inline thread_local Dim threadIdx, blockIdx, gridDim;

namespace shim {

// Bookkeeping needs no barriers: one std::thread runs all of a block's fibers. What orders threads
// must not be in such a function, where ThreadSanitizer does not see atomics either.
#define UNCHECKED __attribute__((no_sanitize("thread"), noinline))

constexpr int kStackBytes = 128 * 1024;
constexpr int kMaxThreads = 1024;
constexpr int kNamedBarriers = 16;
constexpr unsigned kRedrawPriority = 16;  // one in so many waits

struct Gate {  // a barrier of some of a block's threads
    std::atomic<unsigned> arrived = 0, phase = 0;
};

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    ucontext_t context;
    void* sanitizer = nullptr;
    const Gate* gate = nullptr;  // not to run before this one's phase differs from `phase`
    unsigned phase = 0;
    unsigned priority = 0;
    bool done = false;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    std::deque<Copy> copies;      // cp.async under way, oldest first
    std::deque<unsigned> groups;  // how many of them each committed group has
    unsigned uncommitted = 0;
};

struct Block {
    unsigned num_threads;
    std::unique_ptr<Fiber[]> fibers;
    ucontext_t scheduler;
    void* sanitizer = nullptr;
    Fiber* running = nullptr;
    Gate named[kNamedBarriers], warps[kMaxThreads / 32];
    std::atomic<float> exchange[kMaxThreads];
    unsigned random;  // state of xorshift32
    bool is_trapped = false;
    void (*enter)(const void*);
    const void* argument;
};
inline thread_local Block* block = nullptr;

// `is_ordered`: the change orders what the two did; only where a fiber begins and where it ends.
UNCHECKED inline void change(ucontext_t* from, ucontext_t* to, void* sanitizer, bool is_ordered) {
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(sanitizer, is_ordered ? 0 : __tsan_switch_to_fiber_no_sync);
#else
    (void)sanitizer, (void)is_ordered;
#endif
    swapcontext(from, to);
}

UNCHECKED inline unsigned draw() {
    block->random ^= block->random << 13;
    block->random ^= block->random >> 17;
    return block->random ^= block->random << 5;
}

UNCHECKED inline void suspend(const Gate* gate, unsigned phase) {
    Fiber& fiber = *block->running;
    fiber.gate = gate;
    fiber.phase = phase;
    change(&fiber.context, &block->scheduler, block->sanitizer, fiber.done);
}

UNCHECKED inline void begin_fiber() {
    block->enter(block->argument);
    block->running->done = true;
    suspend(nullptr, 0);
}

UNCHECKED inline void make_fiber(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, kStackBytes};
    makecontext(&fiber.context, begin_fiber, 0);
    fiber.priority = draw();
#ifdef __SANITIZE_THREAD__
    fiber.sanitizer = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(fiber.sanitizer, 0);  // orders what the block's creator did before it
    __tsan_switch_to_fiber(block->sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
}

UNCHECKED inline Fiber* next_fiber() {
    Fiber* best = nullptr;
    for (unsigned i = 0; i < block->num_threads; ++i) {
        Fiber& fiber = block->fibers[i];
        if (fiber.done || (best && best->priority >= fiber.priority)) continue;
        if (fiber.gate && fiber.gate->phase.load(std::memory_order_relaxed) == fiber.phase)
            continue;
        best = &fiber;
    }
    return best;
}

// Run all threads of a block; false if one trapped.
UNCHECKED inline bool run_block(unsigned num_threads,
                                unsigned seed,
                                void (*enter)(const void*),
                                const void* argument) {
    auto own = std::make_unique<Block>();
    block = own.get();
    block->num_threads = num_threads;
    block->fibers.reset(new Fiber[num_threads]);
    block->random = seed * 2654435761u | 1;
    block->enter = enter;
    block->argument = argument;
#ifdef __SANITIZE_THREAD__
    block->sanitizer = __tsan_get_current_fiber();
#endif
    for (unsigned i = 0; i < num_threads; ++i) make_fiber(block->fibers[i]);
    while (!block->is_trapped) {
        block->running = next_fiber();
        if (!block->running) break;
        threadIdx.x = static_cast<unsigned>(block->running - block->fibers.get());
        change(&block->scheduler, &block->running->context, block->running->sanitizer, false);
    }
    bool is_complete = !block->is_trapped;
    for (unsigned i = 0; i < num_threads; ++i) {
        if (!block->is_trapped && !block->fibers[i].done) {
            printf("shim: threads wait for one another at a barrier of the block\n");
            std::_Exit(3);
        }
#ifdef __SANITIZE_THREAD__
        __tsan_destroy_fiber(block->fibers[i].sanitizer);
#endif
    }
    block = nullptr;
    return is_complete;
}

UNCHECKED inline void trap() {
    block->is_trapped = true;
    suspend(nullptr, 0);
}

// Let other threads of the block run, and other blocks: for polls.
UNCHECKED inline void pause() {
    block->running->priority = draw();
    std::this_thread::yield();
    suspend(nullptr, 0);
}

// Now and then, hold up the whole block against the others.
UNCHECKED inline void stall() {
    if (threadIdx.x == 0 && draw() % 8 == 0)
        std::this_thread::sleep_for(std::chrono::microseconds(draw() % 500));
}

UNCHECKED inline void wait_for(const Gate& gate, unsigned phase) {
    if (draw() % kRedrawPriority == 0) block->running->priority = draw();
    suspend(&gate, phase);
}

// Wait at `gate` for all `threads`; with `kOrders`, what they did before is ordered before.
template <bool kOrders>
void wait_at(Gate& gate, unsigned threads) {
    constexpr auto relaxed = std::memory_order_relaxed;
    unsigned phase = gate.phase.load(relaxed);
    auto arrive = kOrders ? std::memory_order_acq_rel : relaxed;
    if (gate.arrived.fetch_add(1, arrive) + 1 == threads) {
        gate.arrived.store(0, relaxed);
        gate.phase.store(phase + 1, kOrders ? std::memory_order_release : relaxed);
    }
    wait_for(gate, phase);
    gate.phase.load(kOrders ? std::memory_order_acquire : relaxed);
}

}  // namespace shim

inline void __trap() { shim::trap(); }
inline void __syncthreads() {
    shim::wait_at<true>(shim::block->named[0], shim::block->num_threads);
}

inline float __shfl_xor_sync(unsigned, float value, int lane) {
    constexpr auto relaxed = std::memory_order_relaxed;
    unsigned thread = threadIdx.x;
    shim::Gate& warp = shim::block->warps[thread / 32];
    shim::block->exchange[thread].store(value, relaxed);
    shim::wait_at<false>(warp, 32);
    float other = shim::block->exchange[thread ^ lane].load(relaxed);
    shim::wait_at<false>(warp, 32);
    return other;
}
