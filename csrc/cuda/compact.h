// Compact (ops.h) on a GPU: one block, which keeps the rows in order.
#pragma once

#include <cstdint>

#include "cuda/block_team.h"
#include "ops.h"

namespace rat::cuda {

RAT_HD int count_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  int count = 0;
  for (; bits != 0; bits &= bits - 1) ++count;
  return count;
#endif
}

template <typename T>
struct CompactKernel {
  static constexpr int kMaxBlock = kMaxThreads;
  Compact<T> op;

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    const int lane = thread.rank() % kWarp, warp = thread.rank() / kWarp;
    int* kept_in_warp = static_cast<int*>(thread.scratch());
    const int64_t rows = op.index.size();
    int32_t kept = 0;
    for (int64_t begin = 0; begin < rows; begin += thread.size()) {
      const int64_t i = begin + thread.rank();
      const int32_t row = i < rows ? op.index.data[i] : 0;
      const bool keep = i < rows && op.state.bracket(row).active();
      const uint32_t kept_lanes = thread.ballot(keep);
      if (lane == 0) kept_in_warp[warp] = count_bits(kept_lanes);
      thread.sync();  // and all rows of this chunk are read before any is overwritten
      int32_t position = kept + count_bits(kept_lanes & ((uint32_t{1} << lane) - 1));
      for (int w = 0; w < thread.size() / kWarp; ++w) {
        if (w < warp) position += kept_in_warp[w];
        kept += kept_in_warp[w];
      }
      if (keep) op.active[position] = row;
      thread.sync();  // the counts are read before the next chunk's are written
    }
    thread.sync();  // every thread has read the old count
    if (thread.rank() == 0) *op.count = kept;
  }
};

template <typename Launch, typename T>
void launch_on(const Launch& launch, const Compact<T>& op) {
  // One block also for no rows: the count is written.
  launch(CompactKernel<T>{op}, 1, threads_for(op.index.count, kMaxThreads));
}

}  // namespace rat::cuda
