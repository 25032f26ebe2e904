// The estimate: where a row flips, as the gaps at its knots have it.
#pragma once

#include <cmath>

#include "rule/bracket.h"
#include "rule/team.h"

namespace rat {

// Earliest crossing over the classes of the straightened gaps; inf if none lies ahead.
template <typename T, typename Team>
RAT_HD T crossing(const Team& team, const Bracket<T>& row, const Knots<T>& knots,
                  const SearchParams<T>& params) {
  const T inf = static_cast<T>(INFINITY);
  const bool flipped = row.flipped();
  // The line is drawn through u < v, the knots nearest to the crossing.
  const bool behind = !flipped && row.previous >= T(0);
  const bool use_slope = flipped ? row.third < T(0) : !behind;
  const T u = flipped ? row.lower : (behind ? row.previous : T(0));
  const T v = flipped ? row.upper : row.lower;
  const T knot_behind = behind ? row.upper_knot : row.third_knot;
  const T* gap_u = knots[flipped ? row.lower_knot : knot_behind];
  const T* gap_v = knots[flipped ? row.upper_knot : row.lower_knot];
  const T* gap_w = knots[row.third_knot];  // read only without the slope
  const int y = static_cast<int>(row.prediction);

  // Softmax weights of the other classes at the knot where the curvature is measured.
  const T* gap_at = use_slope ? gap_u : gap_v;
  T nearest = inf;
  for (int j = team.rank(); j < knots.classes; j += team.size()) {
    if (j != y && gap_at[j] < nearest) nearest = gap_at[j];
  }
  nearest = team.reduce(nearest, Min{});
  T mass = 0, mean_u = 0, mean_v = 0, mean_w = 0;
  for (int j = team.rank(); j < knots.classes; j += team.size()) {
    if (j == y) continue;
    const T weight = std::exp((nearest - gap_at[j]) / params.temperature);
    mass += weight;
    mean_u += weight * gap_u[j];
    mean_v += weight * gap_v[j];
    if (!use_slope) mean_w += weight * gap_w[j];
  }
  mass = team.reduce(mass, Add{});
  mean_u = team.reduce(mean_u, Add{}) / mass;
  mean_v = team.reduce(mean_v, Add{}) / mass;
  mean_w = team.reduce(mean_w, Add{}) / mass;

  T c;
  if (use_slope) {
    const T change = mean_v - mean_u;
    c = change < T(0) ? -row.slope * params.temperature / change - T(1) / v : T(0);
  } else {
    // (1 + c e) mean(e) is a line through all three knots.
    const T w = row.third;
    const T rise_v = (mean_v - mean_u) / (v - u), rise_w = (mean_w - mean_u) / (w - u);
    const T moment_v = (mean_v * v - mean_u * u) / (v - u);
    const T moment_w = (mean_w * w - mean_u * u) / (w - u);
    c = (rise_w - rise_v) / (moment_v - moment_w);
  }
  const T at_u = T(1) + c * u, at_v = T(1) + c * v;
  const bool usable = std::isfinite(c) && at_u > T(0) && at_v > T(0);
  const T scale_u = usable ? at_u : T(1), scale_v = usable ? at_v : T(1);
  if (!usable) c = T(0);

  T root = inf;
  for (int j = team.rank(); j < knots.classes; j += team.size()) {
    if (j == y) continue;
    const T line_u = gap_u[j] * scale_u, fall = line_u - gap_v[j] * scale_v;
    if (!(fall > T(0))) continue;
    const T e = u + line_u * (v - u) / fall;
    if (e >= row.lower && T(1) + c * e > T(0) && e < root) root = e;
  }
  return team.reduce(root, Min{});
}

}  // namespace rat
