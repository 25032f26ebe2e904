// The operations on logits (ops.h) on a GPU: one block a row.
#pragma once

#include <cstdint>

#include "cuda/block_team.h"
#include "ops.h"

namespace rat::cuda {

template <typename Op>
struct LogitKernel {
  static constexpr int kMaxBlock = 256;
  Op op;

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    const int64_t rows = op.rows();
    for (int64_t i = thread.block(); i < rows; i += thread.blocks()) {
      op.row(BlockTeam<Thread>{thread}, i);
    }
  }
};

template <typename Launch, typename Op>
void launch_on(const Launch& launch, const Op& op) {
  const LogitKernel<Op> kernel{op};
  // A warp is quickest for few classes; for more, a block hides the latency of walking them.
  launch(kernel, op.slots(), op.logits.columns <= 256 ? kWarp : kernel.kMaxBlock);
}

}  // namespace rat::cuda
