// The bracket rule: where a row's search probes next, and when it is done.
//
// A row searches its ray x(e) = clip(x + e * d) for the radius at which the prediction y changes.
// It keeps a bracket lower < upper with the prediction kept at `lower` and changed at `upper`, and
// is done when upper - lower <= rtol * upper. A probe costs one row of a forward pass, which is all
// that a radius costs, so the rule's one aim is to need few of them.
//
// How the next probe is found. Along the ray the gaps g_j(e) = z_y(e) - z_j(e) are curved, mostly
// in the same way for all classes (the network saturates). A common factor (1 + c*e) straightens
// them: with g_j(e) * (1 + c*e) linear in e for every class j, the crossing of each class is the
// root of a line and the earliest one is the estimate of the radius. c is fitted to the gaps
// averaged with the softmax weights of the runner-ups: to their slope at 0, which the ray's
// backward pass gives for free, or, once two probes have not flipped or there is a bracket, to a
// third known point.
//   - The first probe is the linear estimate margin / slope times kFirstStep: gradients shrink
//     along the ray, so that the linear estimate falls short. (The margin, not the log-odds: the
//     latter are negative for a hesitant prediction.)
//   - An estimate is probed half a tolerance off, towards the end of the bracket that is further
//     away, so that the next probe, one tolerance back, closes the bracket.
//   - While nothing has flipped, an estimate from the slope stays short, the more so the further it
//     reaches beyond the last probe. It is stretched by kStretch times the square of that reach: a
//     probe on the far side leaves a bracket that interpolation closes in two more, one on the near
//     side leaves nothing.
//   - Where kPatience probes in a row have moved the same end of the bracket, and it creeps or the
//     budget below is nearly spent, estimates err to one side. The probe then goes past them, twice
//     as far each time, up to bisection.
//   - While nothing has flipped, the step may grow by factors that rise from probe to probe, and
//     after kFreeRounds it must: the end of the ray is reached in O(sqrt(log)) probes.
//   - In a bracket each row has a budget: the probes that geometric bisection would take from the
//     first bracket, plus kSlack. A probe that could leave a bracket which bisection cannot close
//     within the budget is replaced by bisection (a fallback). Hence the worst case, in max_rows().
//
// Everything here runs for one row, over a Team (team.h), on the CPU and on the GPU alike.
#pragma once

#include <cmath>
#include <cstdint>

#include "rule/row_ops.h"

namespace rat {

constexpr int kKnots = 3;       // points of the ray whose gaps a row remembers
constexpr int kMaxProbes = 32;  // probes per row and round
constexpr double kFirstStep = 1.15;
constexpr double kStretch = 0.5;
constexpr int kFreeRounds = 4;         // rounds without a flip before the step is made to grow
constexpr double kPatience = 3;        // moves of one end in a row before a probe goes past it
constexpr double kCreep = 0.6;         // an end creeps if its next move is so much of its last one
constexpr double kSlack = 4;           // probes that a row may spend beyond geometric bisection
constexpr double kFirstSpread = 1.25;  // ratio of neighbouring first probes when there are several

enum Status : int { kActive = 0, kFound = 1, kNotFound = 2, kNotFinite = 3 };

// What is known of one row. Every field has the tensor's type, so that a batch of brackets is one
// (rows, fields) tensor whose columns Python can read; counts and classes are exact below 2^24.
template <typename T>
struct Bracket {
  T lower;       // largest probed radius at which the prediction is known to hold
  T upper;       // smallest probed radius at which it has changed; inf until one is seen
  T prediction;  // y, the class at radius 0
  T flipped_to;  // class at `upper`; -1 until one is seen
  T margin;      // z_y minus the runner-up's logit at radius 0, over the temperature; >= 0
  T slope;       // minus the derivative of the log-odds along the ray at radius 0; >= 0
  T rows;        // forward rows spent on the search so far
  T fallbacks;   // how many of the rounds bisected because the estimate could not be trusted
  T budget;      // rows left for the bracket; see the worst case above
  T third;       // radius of the third knot; negative if there is none
  T previous;    // while nothing has flipped, the radius before `lower`; negative if there is none
  T streak;      // probes in a row that moved the same end of the bracket: > 0 upper, < 0 lower
  T lower_knot;  // 0, 1, 2 permuted: where the gaps at lower, upper (or previous) and third are
  T upper_knot;
  T third_knot;
  T status;  // Status
};

// The fields by name and in order, for the bindings.
constexpr const char* kBracketFields[] = {"lower",      "upper",      "prediction", "flipped_to",
                                          "margin",     "slope",      "rows",       "fallbacks",
                                          "budget",     "third",      "previous",   "streak",
                                          "lower_knot", "upper_knot", "third_knot", "status"};
constexpr int kFields = sizeof(Bracket<float>) / sizeof(float);
static_assert(sizeof kBracketFields / sizeof *kBracketFields == kFields, "one name per field");

template <typename T>
struct SearchParams {
  T rtol;
  T eps_max;  // end of the ray: the largest radius looked at
  T eps_min;  // radii below are not told apart from 0 (resolution of the input's dtype)
  T temperature;
  int probes;  // per row and round
  int bisect;  // plain doubling and bisection instead of the rule above
};

template <typename T>
RAT_HD T clamp(T value, T low, T high) {
  return value < low ? low : (value > high ? high : value);
}

template <typename T>
struct Search {
  Bracket<T>& row;
  T* gaps;    // (kKnots, classes)
  T* probes;  // (params.probes,), ascending
  int classes;
  const SearchParams<T>& params;

  RAT_HD T* knot(T index) const { return gaps + static_cast<int64_t>(index) * classes; }
  RAT_HD bool flipped() const { return std::isfinite(row.upper); }
  RAT_HD bool active() const { return row.status == T(kActive); }
  // `lower` as a positive number, for ratios.
  RAT_HD T floor() const { return row.lower > params.eps_min ? row.lower : params.eps_min; }
  RAT_HD T midpoint() const { return std::sqrt(floor()) * std::sqrt(row.upper); }

  // Closing steps aim just inside the tolerance, so that rounding cannot leave a bracket open.
  RAT_HD T step() const { return params.rtol * T(0.97); }
  RAT_HD T closing_above() const { return floor() / (T(1) - step()); }
  RAT_HD T closing_below() const { return row.upper * (T(1) - step()); }

  // How many geometric bisections close the bracket (a, b); not rounded, negative if it is closed.
  RAT_HD T bisections(T a, T b) const {
    if (a < params.eps_min) a = params.eps_min;
    return std::log2(std::log(b / a) / -std::log1p(-params.rtol));
  }

  // ---- start ------------------------------------------------------------------------------------

  template <typename L, typename S, typename Team>
  RAT_HD void start(const Team& team, LogitRow<L> logits, S* seed, int64_t seed_stride) {
    const TopTwo<T> top = top_two<T>(team, logits, classes);
    log_odds_seed<T>(team, logits, classes, top, params.temperature, seed, seed_stride);
    for (int j = team.rank(); j < classes; j += team.size()) knot(0)[j] = top.first - logits[j];
    if (team.rank() == 0) {
      row = Bracket<T>{};
      row.upper = static_cast<T>(INFINITY);
      row.prediction = static_cast<T>(top.index);
      row.flipped_to = T(-1);
      row.margin = (top.first - top.second) / params.temperature;
      row.third = T(-1);
      row.previous = T(-1);
      row.upper_knot = T(1);
      row.third_knot = T(2);
      row.status = T(top.finite ? kActive : kNotFinite);
    }
    team.sync();
  }

  // The ray is known: `slope` is the fall along it of z_y - sum_j w_j z_j, whose weights w are the
  // seed's: of the log-odds, but for the temperature. One member calls.
  RAT_HD void aim(T slope) {
    slope /= params.temperature;
    row.slope = slope;
    if (!std::isfinite(slope)) row.status = T(kNotFinite);
    if (!active()) return;
    if (slope == T(0)) {  // no element can move: every point of the ray is x itself
      row.lower = params.eps_max;
      row.status = T(kNotFound);
      return;
    }
    const T first = params.bisect ? params.eps_max * T(1e-6) : T(kFirstStep) * row.margin / slope;
    const T ratio = params.bisect ? T(2) : T(kFirstSpread);
    const T centre = params.bisect ? T(0) : T(params.probes - 1) / 2;
    for (int i = 0; i < params.probes; ++i) {
      place(i, first * std::pow(ratio, T(i) - centre), params.eps_min, params.eps_max);
    }
  }

  // ---- one round
  // ---------------------------------------------------------------------------------

  // The logits at this round's probes, ascending, are consecutive rows from `first` on.
  template <typename L, typename Team>
  RAT_HD void round(const Team& team, LogitRow<L> first, int64_t row_stride) {
    const bool was_flipped = flipped();
    for (int i = 0; i < params.probes; ++i) {
      const LogitRow<L> logits{first.data + i * row_stride, first.stride};
      if (!observe(team, probes[i], logits)) break;
    }
    plan(team, was_flipped);
  }

  // Returns false when the remaining probes of this round say nothing more: the row has flipped, or
  // is not finite.
  template <typename L, typename Team>
  RAT_HD bool observe(const Team& team, T probe, LogitRow<L> logits) {
    const TopTwo<T> top = top_two<T>(team, logits, classes);
    if (!top.finite) {
      if (team.rank() == 0) row.status = T(kNotFinite);
      team.sync();
      return false;
    }
    const bool flip = top.index != static_cast<int>(row.prediction);
    // While nothing has flipped the third knot stays at the origin, whose slope is known, and the
    // upper one is that of `previous`.
    const bool from_origin = row.third < T(0);
    T* slot;
    if (flip) {
      slot = flipped() ? &row.third_knot : &row.upper_knot;
    } else {
      slot = flipped() || from_origin ? &row.third_knot : &row.upper_knot;
    }
    T* values = knot(*slot);
    const T own = logits[static_cast<int>(row.prediction)];
    for (int j = team.rank(); j < classes; j += team.size()) values[j] = own - logits[j];
    team.sync();
    if (team.rank() == 0) {
      T& end = flip ? row.upper : row.lower;
      T& end_knot = flip ? row.upper_knot : row.lower_knot;
      if (flipped()) {
        const T before = flip ? larger(row.streak, T(0)) : -larger(-row.streak, T(0));
        row.streak = before + (flip ? T(1) : T(-1));
      }
      if (slot != &end_knot) {  // the displaced end becomes the third knot, or `previous`
        (slot == &row.third_knot ? row.third : row.previous) = end;
        const T displaced = end_knot;
        end_knot = *slot;
        *slot = displaced;
      }
      end = probe;
      if (flip) row.flipped_to = static_cast<T>(top.index);
    }
    team.sync();
    return !flip;
  }

  // Settles the row, or plans its next probes.
  template <typename Team>
  RAT_HD void plan(const Team& team, bool was_flipped) {
    T estimate = 0;
    if (active() && !params.bisect && !closed() && (flipped() || row.lower < params.eps_max)) {
      estimate = crossing(team);
    }
    team.sync();  // every member has read what settle() changes
    if (team.rank() == 0) settle(was_flipped, estimate);
    team.sync();
  }

  // ---- RR-Fast ----------------------------------------------------------------------------------

  // Settles the row from its logits at the small radius h: each class's gap is taken as linear, and
  // the radius is the smallest crossing over the classes.
  template <typename L, typename Team>
  RAT_HD void extrapolate(const Team& team, T h, LogitRow<L> logits) {
    if (!active()) return;
    const T inf = static_cast<T>(INFINITY);
    const int y = static_cast<int>(row.prediction);
    const T own = logits[y];
    Crossing first{inf, classes, std::isfinite(own) ? 1 : 0};
    for (int j = team.rank(); j < classes; j += team.size()) {
      if (j == y) continue;
      const T z = logits[j], gap = knot(0)[j], fall = gap - (own - z);
      first.finite &= std::isfinite(z) ? 1 : 0;
      if (fall > T(0) && h * gap / fall < first.radius) {
        first.radius = h * gap / fall;
        first.index = j;
      }
    }
    first = team.reduce(first, MergeCrossing{});
    team.sync();
    if (team.rank() != 0) return;
    row.rows = T(1);
    if (!first.finite) {
      row.status = T(kNotFinite);
    } else if (std::isfinite(first.radius)) {
      row.lower = row.upper = first.radius;
      row.flipped_to = static_cast<T>(first.index);
      row.status = T(kFound);
    } else {
      row.lower = params.eps_max;
      row.status = T(kNotFound);
    }
  }

  // ---- the estimate -----------------------------------------------------------------------------

  // Earliest crossing over the classes of the straightened gaps; inf if none lies ahead.
  template <typename Team>
  RAT_HD T crossing(const Team& team) const {
    const T inf = static_cast<T>(INFINITY);
    // The line is drawn through u < v, the knots nearest to the crossing.
    const bool behind = !flipped() && row.previous >= T(0);
    const bool use_slope = flipped() ? row.third < T(0) : !behind;
    const T u = flipped() ? row.lower : (behind ? row.previous : T(0));
    const T v = flipped() ? row.upper : row.lower;
    const T knot_behind = behind ? row.upper_knot : row.third_knot;
    const T* gap_u = knot(flipped() ? row.lower_knot : knot_behind);
    const T* gap_v = knot(flipped() ? row.upper_knot : row.lower_knot);
    const T* gap_w = knot(row.third_knot);  // read only without the slope
    const int y = static_cast<int>(row.prediction);

    // Softmax weights of the other classes at the knot where the curvature is measured.
    const T* gap_at = use_slope ? gap_u : gap_v;
    T nearest = inf;
    for (int j = team.rank(); j < classes; j += team.size()) {
      if (j != y && gap_at[j] < nearest) nearest = gap_at[j];
    }
    nearest = team.reduce(nearest, Min{});
    T mass = 0, mean_u = 0, mean_v = 0, mean_w = 0;
    for (int j = team.rank(); j < classes; j += team.size()) {
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
    for (int j = team.rank(); j < classes; j += team.size()) {
      if (j == y) continue;
      const T line_u = gap_u[j] * scale_u, fall = line_u - gap_v[j] * scale_v;
      if (!(fall > T(0))) continue;
      const T e = u + line_u * (v - u) / fall;
      if (e >= row.lower && T(1) + c * e > T(0) && e < root) root = e;
    }
    return team.reduce(root, Min{});
  }

 private:
  struct Crossing {
    T radius;
    int index;
    int finite;
  };
  struct MergeCrossing {
    RAT_HD Crossing operator()(const Crossing& a, const Crossing& b) const {
      const bool b_first = b.radius < a.radius || (b.radius == a.radius && b.index < a.index);
      return {b_first ? b.radius : a.radius, b_first ? b.index : a.index, a.finite & b.finite};
    }
  };

  RAT_HD bool closed() const { return flipped() && row.upper - floor() <= params.rtol * row.upper; }

  // Writes probe i, kept ascending and inside [low, high].
  RAT_HD void place(int i, T radius, T low, T high) {
    radius = clamp(radius, low, high);
    probes[i] = i > 0 && radius < probes[i - 1] ? probes[i - 1] : radius;
  }

  RAT_HD void settle(bool was_flipped, T estimate) {
    if (!active()) return;
    row.rows += static_cast<T>(params.probes);
    if (flipped()) {
      row.budget = was_flipped ? row.budget - T(1)
                               : bisections(row.lower, row.upper) + static_cast<T>(kSlack);
      if (closed()) {
        row.status = T(kFound);
      } else if (params.bisect) {
        split(false);
      } else {
        narrow_bracket(estimate);
      }
    } else if (row.lower >= params.eps_max) {
      row.status = T(kNotFound);
    } else {
      expand(estimate);
    }
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
      if (params.bisect) {
        radius = row.lower * std::exp2(T(i + 1));
      } else {
        const T offset = last == 0 ? T(0.5) : T(i) - T(last) / 2;
        radius =
            clamp(estimate * (T(1) + step() * offset), i == last ? low : closing_above(), high);
      }
      place(i, radius, params.eps_min, params.eps_max);
    }
  }

  // Even split of the bracket: bisection for one probe. Geometric, but for the plain bisection.
  RAT_HD void split(bool fallback) {
    if (fallback) row.fallbacks += T(1);
    const T parts = static_cast<T>(params.probes + 1);
    const T ratio = row.upper / floor();
    for (int i = 0; i < params.probes; ++i) {
      const T part = static_cast<T>(i + 1) / parts;
      const T radius =
          fallback ? floor() * std::pow(ratio, part) : row.lower + (row.upper - row.lower) * part;
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

  RAT_HD static T larger(T a, T b) { return a > b ? a : b; }
};

// No row takes more forward rows than this, whatever the model: the rounds in which nothing flips
// (kFreeRounds free ones, then steps by 2, 4, 8, ... from eps_min to eps_max) and the budget of the
// widest bracket. For the plain bisection: doublings from 1e-6 of the ray, then halvings.
template <typename T>
inline int max_rows(const SearchParams<T>& params) {
  const double octaves = std::log2(double(params.eps_max) / double(params.eps_min));
  const double rate = -std::log1p(-double(params.rtol));
  int rounds = 3;
  if (params.bisect) {
    rounds +=
        static_cast<int>(std::ceil(std::log2(1e6) + octaves - std::log2(double(params.rtol))));
  } else {
    int growth = 1;
    for (double reached = 0; reached < octaves; ++growth) reached += growth;
    rounds = kFreeRounds + growth;
    rounds += static_cast<int>(std::ceil(std::log2(octaves * std::log(2.0) / rate) + kSlack));
  }
  return rounds * params.probes;
}

}  // namespace rat
