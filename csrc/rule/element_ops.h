// What is done to each element of an input: checked, turned into a direction, moved along it.
#pragma once

#include <cmath>
#include <cstdint>

#include "platform.h"

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

// clip(x + radius * direction, low, high)
template <typename T>
RAT_HD T perturbed(T x, T radius, int8_t direction, T low, T high) {
  const T moved = x + radius * static_cast<T>(direction);
  return moved < low ? low : (moved > high ? high : moved);
}

}  // namespace rat
