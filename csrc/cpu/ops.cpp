// The operations (ops.h) on the CPU: loops over rows.
#include "ops.h"

#include <array>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "rule/element_ops.h"

namespace rat::cpu {
namespace {

template <typename S>
void work(Threads threads, const Inspect<S>& op) {
  using T = wide_t<S>;
  const T low = op.bounds.low, high = op.bounds.high;
  for_rows(threads, op.x.rows, op.x.elements, [&](int64_t i) {
    const S* values = op.x.row(i);
    // Counts rather than branches, so that the loop vectorises.
    int64_t not_finite = 0, outside = 0;
    for (int64_t k = 0; k < op.x.elements; ++k) {
      const T value = widen(values[k]);
      not_finite += !(std::fabs(value) <= std::numeric_limits<T>::max());
      outside += (value < low) | (value > high);
    }
    uint8_t& flags = *op.flags.row(i);
    flags = 0;
    if (not_finite > 0) {
      flags = kInputNotFinite;
    } else if (outside > 0) {
      flags = kInputOutside;
    }
  });
}

template <typename S>
void work(Threads threads, const Aim<S>& op) {
  using T = wide_t<S>;
  const T low = op.bounds.low, high = op.bounds.high;
  const int64_t elements = op.x.elements;
  for_rows(threads, op.x.rows, elements, [&](int64_t i) {
    const S* gradients = op.gradient.row(i);
    const S* values = op.x.row(i);
    int8_t* directions = op.direction.row(i);
    const auto take = [&](int64_t k) {
      const T gradient = widen(gradients[k]);
      directions[k] = direction_of(gradient);
      return slope_of(gradient, widen(values[k]), low, high);
    };
    // Independent partial sums: vectorisable, and more accurate than one running sum.
    constexpr int kLanes = 64;
    std::array<T, kLanes> partial{};
    int64_t k = 0;
    for (; k + kLanes <= elements; k += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) partial[lane] += take(k + lane);
    }
    double slope = 0;
    for (; k < elements; ++k) slope += take(k);
    for (const T sum : partial) slope += sum;
    op.state.search(i).aim(static_cast<T>(slope));
  });
}

template <typename S>
void work(Threads threads, const Perturb<S>& op) {
  using T = wide_t<S>;
  const T low = op.bounds.low, high = op.bounds.high;
  const int64_t probes = op.probes.columns, elements = op.x.elements;
  for_rows(threads, op.index.size() * probes, elements, [&](int64_t i) {
    const int64_t row = op.index.data[i / probes];
    const T radius = op.probes.row(row)[(i % probes) * op.probes.column_stride];
    const S* from = op.x.row(row);
    const int8_t* d = op.direction.row(row);
    S* to = op.out.row(i);
    for (int64_t k = 0; k < elements; ++k) {
      to[k] = narrow<S>(perturbed(widen(from[k]), radius, d[k], low, high));
    }
  });
}

template <typename T>
void work(Threads, const Compact<T>& op) {
  const int64_t rows = op.index.size();
  int32_t kept = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t row = op.index.data[i];
    if (op.state.bracket(row).active()) op.active[kept++] = row;
  }
  *op.count = kept;
}

// Operations on logits.
template <typename Op>
void work(Threads threads, const Op& op) {
  for_rows(threads, op.rows(), op.work(), [&](int64_t i) { op.row(SerialTeam{}, i); });
}

}  // namespace

void run(Threads threads, const Operation& operation) {
  std::visit([&](const auto& op) { work(threads, op); }, operation);
}

}  // namespace rat::cpu
