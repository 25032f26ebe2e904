// A team is the set of threads that works on one row of logits together.
//
// The row operations are written once, over a team: each member walks the classes
// rank(), rank() + size(), ..., and reduce() combines the members' partial results, which every
// member receives. SerialTeam is the CPU's team of one; the CUDA teams are in cuda/block_team.h.
#pragma once

#include "platform.h"

namespace rat {

struct SerialTeam {
  RAT_HD int rank() const { return 0; }
  RAT_HD int size() const { return 1; }
  template <typename V, typename Combine>
  RAT_HD V reduce(V value, Combine) const {
    return value;
  }
  // Makes what the members wrote to memory visible to all of them.
  RAT_HD void sync() const {}
};

struct Add {
  template <typename V>
  RAT_HD V operator()(V a, V b) const {
    return a + b;
  }
};
struct Min {
  template <typename V>
  RAT_HD V operator()(V a, V b) const {
    return a < b ? a : b;
  }
};

}  // namespace rat
