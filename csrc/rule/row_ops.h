// Reductions over one row of logits: prediction, runner-up and the gradient of the log-odds.
#pragma once

#include <cmath>
#include <cstdint>

#include "rule/team.h"
#include "scalars.h"
#include "views.h"

namespace rat {

// One row of logits in a strided tensor, widened as it is read.
template <typename L>
struct LogitRow {
  const L* data;
  int64_t stride;
  RAT_HD wide_t<L> operator[](int64_t j) const { return widen(data[j * stride]); }
};

template <typename L>
RAT_HD LogitRow<L> logit_row(const Matrix<const L>& logits, int64_t i) {
  return {logits.row(i), logits.column_stride};
}

template <typename T>
struct TopTwo {
  T first;     // largest logit
  T second;    // second largest; -inf until two are seen
  int index;   // class of the largest; the smallest index among equals, as torch.argmax has it
  int finite;  // every logit seen is finite
};

struct MergeTopTwo {
  template <typename T>
  RAT_HD TopTwo<T> operator()(const TopTwo<T>& a, const TopTwo<T>& b) const {
    const bool b_wins = b.first > a.first || (b.first == a.first && b.index < a.index);
    // Field by field: a reference to the winner would put both in a GPU thread's local memory.
    const T beaten = b_wins ? a.first : b.first, second = b_wins ? b.second : a.second;
    return {b_wins ? b.first : a.first, second > beaten ? second : beaten,
            b_wins ? b.index : a.index, a.finite & b.finite};
  }
};

// Prediction and runner-up of one row.
template <typename L, typename Team>
RAT_HD TopTwo<wide_t<L>> top_two(const Team& team, LogitRow<L> logits, int classes) {
  using T = wide_t<L>;
  const T inf = static_cast<T>(INFINITY);
  TopTwo<T> top{-inf, -inf, classes, 1};
  for (int j = team.rank(); j < classes; j += team.size()) {
    const T z = logits[j];
    top.finite &= std::isfinite(z) ? 1 : 0;
    if (z > top.first) {
      top.second = top.first;
      top.first = z;
      top.index = j;
    } else if (z > top.second) {
      top.second = z;
    }
  }
  return team.reduce(top, MergeTopTwo{});
}

// The gradient of minus the log-odds of the prediction y at temperature t,
// z_y/t - log sum_{j != y} exp(z_j/t), in the logits z/t: -1 at y, softmax_{j != y}(z_j/t)
// elsewhere.
//
// This is the gradient of the cross-entropy up to the positive factor (1 - softmax_y)/t per row,
// which sign() does not see. Unlike softmax_y - 1 it does not cancel when the model is confident.
template <typename L, typename T, typename Team>
RAT_HD void log_odds_seed(const Team& team, LogitRow<L> logits, int classes, const TopTwo<T>& top,
                          T temperature, L* seed, int64_t seed_stride) {
  T mass = 0;
  for (int j = team.rank(); j < classes; j += team.size()) {
    if (j != top.index) mass += std::exp((logits[j] - top.second) / temperature);
  }
  mass = team.reduce(mass, Add{});
  for (int j = team.rank(); j < classes; j += team.size()) {
    const T weight = std::exp((logits[j] - top.second) / temperature) / mass;
    seed[j * seed_stride] = narrow<L>(j == top.index ? T(-1) : weight);
  }
}

}  // namespace rat
