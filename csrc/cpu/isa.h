#pragma once

#include <atomic>
#include <string>
#include <vector>

// One source, several instruction sets: `run_best` compiles its body once per set and picks at run
// time. The body, and all that it calls, must be FST_FAST_INLINE, or it stays on the baseline.
// The build passes -ffp-contract=off, so every set computes the same bits.

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__)
#define FST_FAST_X86_LEVELS 1
#endif

#if defined(__GNUC__) || defined(__clang__)
#define FST_FAST_INLINE __attribute__((always_inline))
#else
#define FST_FAST_INLINE
#endif

namespace fst_fast {

// Worst first; an index into this list names a set everywhere else.
inline const std::vector<std::string>& instruction_sets() {
#ifdef FST_FAST_X86_LEVELS
  static const std::vector<std::string> names = {"baseline", "x86-64-v3", "x86-64-v4"};
#else
  static const std::vector<std::string> names = {"baseline"};
#endif
  return names;
}

inline int best_instruction_set() {
#ifdef FST_FAST_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 2;
  if (__builtin_cpu_supports("x86-64-v3")) return 1;
#endif
  return 0;
}

// Tests set it to a lesser set; nothing else writes it.
inline std::atomic<int> instruction_set{best_instruction_set()};

#ifdef FST_FAST_X86_LEVELS
template <typename Body>
[[gnu::target("arch=x86-64-v3"), gnu::noinline]] void run_v3(const Body& body) {
  body();
}
template <typename Body>
[[gnu::target("arch=x86-64-v4"), gnu::noinline]] void run_v4(const Body& body) {
  body();
}
#endif

template <typename Body>
void run_best(const Body& body) {
#ifdef FST_FAST_X86_LEVELS
  const int chosen = instruction_set.load(std::memory_order_relaxed);
  if (chosen == 2) return run_v4(body);
  if (chosen == 1) return run_v3(body);
#endif
  body();
}

}  // namespace fst_fast
