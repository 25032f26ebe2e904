// What is done to each element of an input: checked, turned into a direction, moved along it.
#pragma once

#include <cmath>
#include <cstdint>

#include "platform.h"
#include "scalars.h"

namespace rat {

// Sign of the gradient: the direction in which this element moves along the FGSM ray.
template <typename T>
RAT_HD int8_t direction_of(T gradient) {
  return static_cast<int8_t>((gradient > T(0)) - (gradient < T(0)));
}

// What the element adds to the slope of the log-odds along the ray: |gradient|, but 0 where the
// bounds keep it from moving. NaN passes through.
template <typename T>
RAT_HD T slope_of(T gradient, T x, T low, T high) {
  const bool blocked = (gradient > T(0) && !(x < high)) || (gradient < T(0) && !(x > low));
  return blocked ? T(0) : std::fabs(gradient);
}

// The elements of a row that can move along its ray, taken together.
template <typename T>
struct Ray {
  double slope;  // sum of slope_of()
  T nearest;     // least |x| of an element that moves
  T largest;     // largest |x| of any
};

struct MergeRays {
  template <typename T>
  RAT_HD Ray<T> operator()(const Ray<T>& a, const Ray<T>& b) const {
    return {a.slope + b.slope, a.nearest < b.nearest ? a.nearest : b.nearest,
            a.largest > b.largest ? a.largest : b.largest};
  }
};

// The radius below which no element of type S moves: numbers of size v are at least v * kSpacing/2
// apart, and half of that rounds away. Zeros can move by far less than anything else in a row, but
// steps so small mean nothing: an element counts for at least a small share of the largest.
template <typename S>
RAT_HD wide_t<S> least_step(const Ray<wide_t<S>>& ray) {
  using T = wide_t<S>;
  const T share = static_cast<T>(kSpacing<S> / 4), least = ray.largest * share;
  const T step = (ray.nearest > least ? ray.nearest : least) * share;
  const T tiny = static_cast<T>(kTiny<T>);
  return step > tiny ? step : tiny;
}

// clip(x + radius * direction, low, high)
template <typename T>
RAT_HD T perturbed(T x, T radius, int8_t direction, T low, T high) {
  const T moved = x + radius * static_cast<T>(direction);
  return moved < low ? low : (moved > high ? high : moved);
}

}  // namespace rat
