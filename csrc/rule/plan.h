// The plan: whether a row is done, and where it probes next.
#pragma once

#include <cmath>

#include "rule/bracket.h"
#include "scalars.h"

namespace rat {

// What these are for: search.h.
constexpr double kFirstStep = 1.15;
constexpr double kStretch = 0.5;
constexpr int kFreeRounds = 4;         // rounds without a flip before the step is made to grow
constexpr double kPatience = 3;        // moves of one end in a row before a probe goes past it
constexpr double kCreep = 0.6;         // an end creeps if its next move is so much of its last one
constexpr double kSlack = 4;           // probes that a row may spend beyond geometric bisection
constexpr double kFirstSpread = 1.25;  // ratio of neighbouring first probes when there are several

template <typename T>
RAT_HD T larger(T a, T b) {
  return a > b ? a : b;
}
template <typename T>
RAT_HD T clamp(T value, T low, T high) {
  return value < low ? low : (value > high ? high : value);
}

// One member of the row's team calls first() and settle(), which write; all may ask closed().
template <typename T>
struct Planner {
  Bracket<T>& row;
  T* probes;  // (params.probes,), ascending
  const SearchParams<T>& params;

  RAT_HD bool closed() const {
    return row.flipped() && row.upper - floor() <= params.rtol * row.upper;
  }

  // The first probes, from the margin and the slope.
  RAT_HD void first() {
    const T centre = params.bisect() ? T(0) : T(params.probes - 1) / 2;
    const T ratio = params.bisect() ? T(2) : T(kFirstSpread);
    const T radius = params.bisect() ? params.bisect_from : T(kFirstStep) * row.margin / row.slope;
    for (int i = 0; i < params.probes; ++i) {
      place(i, radius * std::pow(ratio, T(i) - centre), row.least_step, params.eps_max);
    }
  }

  // After a round: the row is done, or these are its next probes.
  RAT_HD void settle(bool was_flipped, T estimate) {
    if (!row.active()) return;
    row.rows += static_cast<T>(params.probes);
    const bool spent = row.rows >= static_cast<T>(params.max_rows);
    if (row.flipped()) {
      row.budget = was_flipped ? row.budget - T(1)
                               : bisections(row.lower, row.upper) + static_cast<T>(kSlack);
      if (closed() || spent) {
        row.status = T(kFound);
      } else if (params.bisect()) {
        split(false);
      } else {
        narrow_bracket(estimate);
      }
    } else if (row.lower >= params.eps_max || spent) {
      row.status = T(kNotFound);
    } else {
      expand(estimate);
    }
  }

 private:
  // `lower` as a positive number, for ratios.
  RAT_HD T floor() const { return larger(row.lower, row.least_step); }
  RAT_HD T midpoint() const { return std::sqrt(floor()) * std::sqrt(row.upper); }

  // Closing steps aim just inside the tolerance, so that rounding cannot leave a bracket open.
  RAT_HD T step() const { return params.rtol * T(0.97); }
  RAT_HD T closing_above() const { return floor() / (T(1) - step()); }
  RAT_HD T closing_below() const { return row.upper * (T(1) - step()); }

  // How many geometric bisections close the bracket (a, b); not rounded, negative if it is closed.
  RAT_HD T bisections(T a, T b) const {
    return std::log2(log_ratio(larger(a, row.least_step), b) / -std::log1p(-params.rtol));
  }

  // log(b / a), also where b / a overflows.
  RAT_HD static T log_ratio(T a, T b) {
    const T ratio = b / a;
    return std::isfinite(ratio) ? std::log(ratio) : std::log(b) - std::log(a);
  }

  // Writes probe i, kept ascending and inside [low, high].
  RAT_HD void place(int i, T radius, T low, T high) {
    radius = clamp(radius, low, high);
    probes[i] = i > 0 && radius < probes[i - 1] ? probes[i - 1] : radius;
  }

  // Nothing has flipped up to `lower`.
  RAT_HD void expand(T estimate) {
    const int last = params.probes - 1;
    const T rounds = row.rows / static_cast<T>(params.probes);
    const T high = row.lower * std::exp2(T(2) * rounds);
    const T forced = rounds - T(kFreeRounds);
    const T low = forced > T(0) ? row.lower * std::exp2(forced) : closing_above();
    const T reach = clamp(estimate / row.lower - T(1), T(0), high / row.lower);
    if (row.previous < T(0)) estimate *= T(1) + T(kStretch) * reach * reach;
    for (int i = 0; i <= last; ++i) {
      T radius;
      if (params.bisect()) {
        radius = row.lower * std::exp2(T(i + 1));
      } else {
        const T offset = last == 0 ? T(0.5) : T(i) - T(last) / 2;
        radius =
            clamp(estimate * (T(1) + step() * offset), i == last ? low : closing_above(), high);
      }
      place(i, radius, row.least_step, params.eps_max);
    }
  }

  // Even split of the bracket: bisection for one probe. Geometric, but for the plain bisection.
  RAT_HD void split(bool fallback) {
    if (fallback) row.fallbacks += T(1);
    const T parts = static_cast<T>(params.probes + 1);
    const T span = log_ratio(floor(), row.upper);
    for (int i = 0; i < params.probes; ++i) {
      const T part = static_cast<T>(i + 1) / parts;
      const T radius =
          fallback ? floor() * std::exp(span * part) : row.lower + (row.upper - row.lower) * part;
      place(i, radius, row.lower, row.upper);
    }
  }

  RAT_HD void narrow_bracket(T estimate) {
    const T a = row.lower, b = row.upper;
    if (!(estimate >= a && estimate <= b)) return split(true);
    const T above = closing_above(), below = closing_below();
    const int last = params.probes - 1;
    for (int i = 0; i <= last; ++i) {
      T radius = estimate * (T(1) + step() * (T(i) - T(last) / 2));
      if (last == 0) radius = past(estimate, above, below);
      // Once the closing steps from the two ends meet, one probe between them closes the bracket.
      place(i, radius, above < below ? above : midpoint(), above < below ? below : midpoint());
    }
    T worst = larger(bisections(a, probes[0]), bisections(probes[last], b));
    for (int i = 1; i <= last; ++i) worst = larger(worst, bisections(probes[i - 1], probes[i]));
    if (worst > row.budget - T(1)) split(true);
  }

  // The one probe of a round, so far past the estimate that the bracket closes next.
  RAT_HD T past(T estimate, T above, T below) const {
    const T a = row.lower, b = row.upper, half = estimate * step() / T(2);
    T probe = b - estimate > estimate - a ? estimate + half : estimate - half;
    if (estimate <= above) probe = above;
    if (estimate >= below) probe = below;
    // The third knot is where the end that moved last was before.
    const bool down = row.streak > T(0);
    const T last = down ? row.third - b : a - row.third;
    const T next = down ? b - probe : probe - a;
    const T streak = std::fabs(row.streak);
    const bool creeps = next >= T(kCreep) * last || bisections(a, b) > row.budget - T(2);
    if (streak < T(kPatience) || !creeps) return probe;
    const T push = next * std::exp2(streak - T(1));
    return down ? larger(probe - push, midpoint()) : -larger(-probe - push, -midpoint());
  }
};

// No row takes more forward rows than this, whatever the model: the rounds in which nothing flips
// (kFreeRounds free ones, then steps by 2, 4, 8, ... from the least step to eps_max) and the budget
// of the widest bracket. For the plain bisection: doublings, then halvings.
template <typename T>
int max_rows(const SearchParams<double>& params) {
  const double octaves = larger(std::log2(params.eps_max) - std::log2(kTiny<T>), 1.0);
  const double rate = -std::log1p(-params.rtol);
  int rounds = 3;
  if (params.bisect()) {
    rounds += static_cast<int>(std::ceil(octaves - std::log2(params.rtol)));
  } else {
    int growth = 1;
    for (double reached = 0; reached < octaves; ++growth) reached += growth;
    rounds = kFreeRounds + growth;
    rounds += static_cast<int>(std::ceil(std::log2(octaves * std::log(2.0) / rate) + kSlack));
  }
  return rounds * params.probes;
}

}  // namespace rat
