// Runs CUDA kernels on the CPU, to test their logic where there is no GPU. Compile device code with
// a C++ compiler after including this; start kernels with emulator::run.
//
// Every CUDA thread is a fiber with a stack of its own. It runs until it has to wait: at a barrier,
// a shuffle or the grid-wide barrier. So an order of execution that a GPU may choose is tried, one
// warp as far as it gets before the next, and a value that a missing barrier leaves unwritten is
// read as NaN: shared memory starts as NaN. What waits in vain, or at different lines, is an
// exception with a message.
//
// It says nothing about speed, memory ordering, or races that this order of execution hides;
// emulator::descending runs the threads the other way round.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Only as `extern __shared__ ... name[]`: one array, which the scheduler swaps from block to block.
#define __shared__

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fst_fast {
inline constexpr std::size_t kSharedMost = 48 * 1024;
// Under the name by which the kernels declare it; what a launch did not ask for is watched.
alignas(16) unsigned char shared_memory[kSharedMost + 256];
}  // namespace fst_fast

namespace emulator {

inline bool descending = false;  // threads and blocks run in descending order
inline int resident = 5;         // blocks that are said to fit on the device
inline const char* kernel_name = "";
inline std::int64_t launches = 0;

constexpr int kWarp = 32;
constexpr std::size_t kStack = 64 * 1024;
constexpr unsigned char kNan = 0xff;  // all bytes 0xff are NaN in every floating type

enum class Wait { nothing, block, warp, grid, finished };

struct Fiber {
  ucontext_t context;  // of its start
  jmp_buf place;       // where it waits
  bool started = false;
  std::unique_ptr<unsigned char[]> stack;
  Wait wait = Wait::nothing;
  int line = 0;  // where it waits
  int thread = 0;
  // A shuffle: the value given, the lane asked, and the value got.
  unsigned mask = 0;
  int source = 0;
  std::uint64_t given = 0, got = 0;
};

struct Block {
  unsigned index = 0;
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
};

inline jmp_buf scheduler;
inline Fiber* running = nullptr;
inline void (*body)(const void*) = nullptr;
inline const void* arguments = nullptr;

// Only the scheduler calls it: an exception cannot leave a fiber.
[[noreturn]] inline void fail(const char* what, const Block& block, const Fiber& fiber) {
  throw std::runtime_error(
      "emulated: " + std::string(what) + "; block " + std::to_string(block.index) + ", thread " +
      std::to_string(fiber.thread) + ", line " + std::to_string(fiber.line) + " of " + kernel_name);
}

// swapcontext would ask the kernel about signals every time.
inline void wait(Wait what, int line) {
  running->wait = what;
  running->line = line;
  if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
}

inline void entry() {
  body(arguments);
  wait(Wait::finished, 0);
}

inline void resume(Block& block, Fiber& fiber) {
  running = &fiber;
  fiber.wait = Wait::nothing;
  threadIdx.x = static_cast<unsigned>(fiber.thread);
  blockIdx.x = block.index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline bool runs(const Fiber& fiber) { return fiber.wait == Wait::nothing; }

// Lets a warp pass its shuffle if all lanes named in the mask have come. Returns whether it did.
inline bool release_warp(Block& block, int first) {
  Fiber* lanes = &block.fibers[first];
  const Fiber* leader = nullptr;
  for (int lane = 0; lane < kWarp && leader == nullptr; ++lane) {
    if (lanes[lane].wait == Wait::warp) leader = &lanes[lane];
  }
  if (leader == nullptr) return false;
  const unsigned mask = leader->mask;
  const int line = leader->line;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber& fiber = lanes[lane];
    if (runs(fiber)) return false;
    if (fiber.wait != Wait::warp)
      fail("a lane named in a shuffle's mask is not there", block, fiber);
    if (fiber.mask != mask || fiber.line != line)
      fail("lanes differ in their shuffle", block, fiber);
    if (!(mask >> fiber.source & 1)) fail("shuffles from a lane not in the mask", block, fiber);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) lanes[lane].got = lanes[lanes[lane].source].given;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) lanes[lane].wait = Wait::nothing;
  }
  return true;
}

// Whether all threads wait for `what`, at one line; fails if only some can ever come.
inline bool all_wait(const Block& block, Wait what) {
  const Fiber& leader = block.fibers.front();
  for (const Fiber& fiber : block.fibers) {
    if (fiber.wait != leader.wait) fail("not all threads reach the barrier", block, fiber);
    if (fiber.line != leader.line) fail("threads wait at different barriers", block, fiber);
  }
  return leader.wait == what;
}

// Runs a warp as far as it gets without the others.
inline void run_warp(Block& block, int first) {
  do {
    for (int i = 0; i < kWarp; ++i) {
      Fiber& fiber = block.fibers[first + (descending ? kWarp - 1 - i : i)];
      if (runs(fiber)) resume(block, fiber);
    }
  } while (release_warp(block, first));
}

// Runs a block until all its threads have finished or wait for the grid.
inline void run_block(Block& block) {
  const std::size_t asked = block.shared.size();
  if (asked > 0) std::memcpy(fst_fast::shared_memory, block.shared.data(), asked);
  const int threads = static_cast<int>(block.fibers.size());
  while (true) {
    for (int i = 0; i < threads; i += kWarp) run_warp(block, descending ? threads - kWarp - i : i);
    if (!all_wait(block, Wait::block)) break;
    for (Fiber& fiber : block.fibers) fiber.wait = Wait::nothing;
  }
  for (std::size_t i = asked; i < sizeof(fst_fast::shared_memory); ++i) {
    if (fst_fast::shared_memory[i] == kNan) continue;
    fail("wrote past the shared memory of its launch", block, block.fibers.front());
  }
  if (asked > 0) std::memcpy(block.shared.data(), fst_fast::shared_memory, asked);
}

inline void start(Block& block, unsigned index, int threads, std::size_t shared_bytes) {
  block.index = index;
  block.shared.assign(shared_bytes, kNan);
  block.fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.thread = i;
    fiber.wait = Wait::nothing;
    fiber.line = 0;
    fiber.started = false;
    if (fiber.stack == nullptr) fiber.stack.reset(new unsigned char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
}

// together: a cooperative launch, in which blocks may wait for each other.
template <typename Arguments>
void run(void (*kernel)(Arguments), std::int64_t blocks, int threads, std::size_t shared_bytes,
         const Arguments& given, bool together) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments& arguments;
  };
  const Call call{kernel, given};
  body = [](const void* call) {
    static_cast<const Call*>(call)->kernel(static_cast<const Call*>(call)->arguments);
  };
  arguments = &call;
  kernel_name = __PRETTY_FUNCTION__;
  ++launches;
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  std::memset(fst_fast::shared_memory, kNan, sizeof(fst_fast::shared_memory));
  if (threads <= 0 || threads > 1024 || threads % kWarp != 0 || blocks <= 0 ||
      shared_bytes > fst_fast::kSharedMost || (together && blocks > resident)) {
    throw std::runtime_error("emulated: cannot launch " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads with " +
                             std::to_string(shared_bytes) + " bytes of " + kernel_name);
  }
  // Stacks are kept: a fresh one is a page fault for each thread.
  static std::vector<Block> pool;
  if (pool.size() < (together ? static_cast<std::size_t>(blocks) : 1)) {
    pool.resize(together ? blocks : 1);
  }
  const auto order = [&](std::int64_t i) {
    return static_cast<unsigned>(descending ? blocks - 1 - i : i);
  };
  if (!together) {
    for (std::int64_t i = 0; i < blocks; ++i) {
      start(pool[0], order(i), threads, shared_bytes);
      run_block(pool[0]);
      if (pool[0].fibers[0].wait == Wait::grid) {
        fail("waits for the grid in a launch that is not cooperative", pool[0], pool[0].fibers[0]);
      }
    }
    return;
  }
  for (std::int64_t i = 0; i < blocks; ++i) start(pool[i], i, threads, shared_bytes);
  for (bool waiting = true; waiting;) {
    int at_barrier = 0;
    for (std::int64_t i = 0; i < blocks; ++i) {
      Block& block = pool[order(i)];
      for (Fiber& fiber : block.fibers) {
        if (fiber.wait == Wait::grid) fiber.wait = Wait::nothing;
      }
      run_block(block);
      at_barrier += block.fibers[0].wait == Wait::grid;
    }
    waiting = at_barrier > 0;
    if (waiting && at_barrier != blocks) {
      fail("not all blocks reach the grid's barrier", pool[0], pool[0].fibers[0]);
    }
  }
}

template <typename value_t>
value_t shuffle(unsigned mask, value_t value, int source, int line) {
  static_assert(sizeof(value_t) <= 8 && std::is_trivially_copyable_v<value_t>);
  Fiber& fiber = *running;
  std::memcpy(&fiber.given, &value, sizeof(value));
  fiber.mask = mask;
  fiber.source = source;
  wait(Wait::warp, line);
  std::memcpy(&value, &fiber.got, sizeof(value));
  return value;
}

inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

}  // namespace emulator

#define __syncthreads() emulator::wait(emulator::Wait::block, __LINE__)
#define __syncwarp() emulator::shuffle(0xffffffffu, 0, emulator::lane(), __LINE__)
#define __shfl_xor_sync(mask, value, offset) \
  emulator::shuffle(mask, value, emulator::lane() ^ (offset), __LINE__)
#define __shfl_sync(mask, value, source) emulator::shuffle(mask, value, (source), __LINE__)

// Blocks that are not launched together run one after the other.
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* at, unsigned more) {
  const unsigned before = *at;
  *at += more;
  return before;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
template <typename value_t>
value_t __ldg(const value_t* pointer) {
  return *pointer;
}
inline std::uint32_t __funnelshift_r(std::uint32_t low, std::uint32_t high, unsigned shift) {
  return static_cast<std::uint32_t>((std::uint64_t{high} << 32 | low) >> (shift & 31));
}
// Selectors of four bits; without the one that repeats a sign.
inline std::uint32_t __byte_perm(std::uint32_t low, std::uint32_t high, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t{high} << 32 | low;
  std::uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned chosen = selector >> (4 * i) & 7;
    out |= static_cast<std::uint32_t>(bytes >> (8 * chosen) & 0xff) << (8 * i);
  }
  return out;
}
using std::exp;
using std::log;
using std::max;
using std::min;
using std::sqrt;
