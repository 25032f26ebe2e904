// The operations (ops.h) on the CPU: loops over rows.
#include "ops.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"

namespace rat::cpu {
namespace {

template <typename S>
void work(Threads threads, const Inspect<S>& op) {
  using T = wide_t<S>;
  const T low = op.bounds.low, high = op.bounds.high;
  const int64_t tiles = op.flags.columns;
  for_rows(threads, op.x.rows * tiles, op.x.elements / tiles, [&](int64_t i) {
    const int64_t tile = i % tiles, begin = tile * kTileElements;
    const int64_t end = std::min(begin + kTileElements, op.x.elements);
    const S* values = op.x.row(i / tiles);
    // Counts rather than branches, so that the loop vectorises.
    int64_t not_finite = 0, outside = 0;
    for (int64_t k = begin; k < end; ++k) {
      const T value = widen(values[k]);
      not_finite += !(std::fabs(value) <= std::numeric_limits<T>::max());
      outside += (value < low) | (value > high);
    }
    uint8_t& flag = op.flags.row(i / tiles)[tile * op.flags.column_stride];
    flag = 0;
    if (not_finite > 0) {
      flag = kInputNotFinite;
    } else if (outside > 0) {
      flag = kInputOutside;
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
    // Independent partial results: vectorisable, and sums more accurate than one running sum.
    constexpr int kLanes = 64;
    std::array<T, kLanes> slope{}, nearest, largest{};
    nearest.fill(std::numeric_limits<T>::infinity());
    const auto take = [&](int64_t k, int lane) {
      const T gradient = widen(gradients[k]), x = widen(values[k]), size = std::fabs(x);
      directions[k] = direction_of(gradient);
      const T along = slope_of(gradient, x, low, high);
      slope[lane] += along;
      nearest[lane] = along > T(0) && size < nearest[lane] ? size : nearest[lane];
      largest[lane] = size > largest[lane] ? size : largest[lane];
    };
    int64_t k = 0;
    for (; k + kLanes <= elements; k += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) take(k + lane, lane);
    }
    for (int lane = 0; k < elements; ++k, ++lane) take(k, lane);
    Ray<T> ray{slope[0], nearest[0], largest[0]};
    for (int lane = 1; lane < kLanes; ++lane) {
      ray = MergeRays{}(ray, Ray<T>{slope[lane], nearest[lane], largest[lane]});
    }
    op.plan(i, ray);
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
