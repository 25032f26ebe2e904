// A block of CUDA threads as the team (team.h) that works on one row.
//
// A block is one warp for few classes and several for many, so that one team type serves both: a
// single warp reduces by shuffles alone.
//
// The kernels are function objects that hold their arguments and are called by every thread of a
// grid. Everything that they ask of the hardware goes through `Thread`, which is one of these
// threads: DeviceThread (launcher.cuh) on a GPU, HostThread (tests/kernels_on_host) in the tests.
// So a plain C++ compiler compiles the kernels as well, and the tests run the same index arithmetic
// without a GPU. All loops stride over the grid, so that any number of blocks is right.
//
// They are launched by `Launch`, which is called with a kernel, the number of blocks that would
// take one turn each, and the threads of a block: Launcher (launcher.cuh) on a GPU, HostLauncher in
// the tests.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "platform.h"

namespace rat::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kScratchPerWarp = 64;  // bytes, at least those of any value that is reduced
constexpr int kScratch = kScratchPerWarp * (kMaxThreads / kWarp);

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads of a block that walks `steps` steps: whole warps, no more than are of use.
inline int threads_for(int64_t steps, int most) {
  return static_cast<int>(std::clamp<int64_t>(divide_up(steps, kWarp) * kWarp, kWarp, most));
}

template <typename Thread>
struct BlockTeam {
  const Thread& thread;

  RAT_HD int rank() const { return thread.rank(); }
  RAT_HD int size() const { return thread.size(); }
  RAT_HD void sync() const { thread.sync(); }

  // Every member receives the same bits, also where `combine` does not commute (NaN): of each pair
  // the lower lane is the left operand. It is a sync(), too: no member returns before all have
  // come.
  template <typename V, typename Combine>
  RAT_HD V reduce(V value, Combine combine) const {
    static_assert(std::is_trivially_copyable_v<V> && sizeof(V) <= kScratchPerWarp);
    const int lane = rank() % kWarp, warps = size() / kWarp;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const V other = thread.shuffle_xor(value, offset);
      value = lane & offset ? combine(other, value) : combine(value, other);
    }
    sync();  // the scratch of an earlier reduce() has been read
    if (warps == 1) return value;
    V* partial = static_cast<V*>(thread.scratch());
    if (lane == 0) partial[rank() / kWarp] = value;
    sync();
    value = partial[0];
    for (int warp = 1; warp < warps; ++warp) value = combine(value, partial[warp]);
    return value;
  }
};

}  // namespace rat::cuda
