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
// bracket.h holds what is known of a row, estimate.h tells where it flips, plan.h where it probes
// next; what happens to a row, from its first logits to its radius, is below. All of it runs for
// one row, over a Team (team.h), on the CPU and on the GPU alike.
#pragma once

#include <cmath>
#include <cstdint>

#include "rule/bracket.h"
#include "rule/estimate.h"
#include "rule/plan.h"
#include "rule/row_ops.h"

namespace rat {

template <typename T>
struct Search {
  Bracket<T>& row;
  Knots<T> knots;
  T* probes;  // (params.probes,), ascending
  const SearchParams<T>& params;

  // From the clean logits; `seed` is where the backward pass starts.
  template <typename L, typename Team>
  RAT_HD void start(const Team& team, LogitRow<L> logits, L* seed, int64_t seed_stride) {
    const TopTwo<T> top = top_two(team, logits, knots.classes);
    log_odds_seed(team, logits, knots.classes, top, params.temperature, seed, seed_stride);
    T* gaps = knots[0];
    for (int j = team.rank(); j < knots.classes; j += team.size()) gaps[j] = top.first - logits[j];
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
  RAT_HD void aim(T slope, T least_step) {
    row.slope = slope / params.temperature;
    row.least_step = least_step < params.eps_max ? least_step : params.eps_max;
    if (!std::isfinite(row.slope)) row.status = T(kNotFinite);
    if (!row.active()) return;
    if (row.slope == T(0)) {  // no element can move: every point of the ray is x itself
      row.lower = params.eps_max;
      row.status = T(kNotFound);
    } else {
      planner().first();
    }
  }

  // The logits at this round's probes, ascending, are consecutive rows from `first` on.
  template <typename L, typename Team>
  RAT_HD void round(const Team& team, const Matrix<const L>& logits, int64_t first) {
    const bool was_flipped = row.flipped();
    for (int i = 0; i < params.probes; ++i) {
      if (!observe(team, probes[i], logit_row(logits, first + i))) break;
    }
    plan(team, was_flipped);
  }

  // RR-Fast: settles the row from its logits at the small radius h. Each class's gap is taken as
  // linear, and the radius is the smallest crossing over the classes.
  template <typename L, typename Team>
  RAT_HD void extrapolate(const Team& team, T h, LogitRow<L> logits) {
    if (!row.active()) return;
    const T inf = static_cast<T>(INFINITY);
    const int y = static_cast<int>(row.prediction);
    const T own = logits[y];
    const T* gaps = knots[0];
    Crossing first{inf, knots.classes, std::isfinite(own) ? 1 : 0};
    for (int j = team.rank(); j < knots.classes; j += team.size()) {
      if (j == y) continue;
      const T z = logits[j], gap = gaps[j], fall = gap - (own - z);
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

  RAT_HD Planner<T> planner() const { return {row, probes, params}; }

  // Returns false when the remaining probes of this round say nothing more: the row has flipped, or
  // is not finite.
  template <typename L, typename Team>
  RAT_HD bool observe(const Team& team, T probe, LogitRow<L> logits) {
    const TopTwo<T> top = top_two(team, logits, knots.classes);
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
      slot = row.flipped() ? &row.third_knot : &row.upper_knot;
    } else {
      slot = row.flipped() || from_origin ? &row.third_knot : &row.upper_knot;
    }
    T* values = knots[*slot];
    const T own = logits[static_cast<int>(row.prediction)];
    for (int j = team.rank(); j < knots.classes; j += team.size()) values[j] = own - logits[j];
    team.sync();
    if (team.rank() == 0) {
      T& end = flip ? row.upper : row.lower;
      T& end_knot = flip ? row.upper_knot : row.lower_knot;
      if (row.flipped()) {
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
    if (row.active() && !params.bisect() && !planner().closed() &&
        (row.flipped() || row.lower < params.eps_max)) {
      estimate = crossing(team, row, knots, params);
    }
    team.sync();  // every member has read what settle() changes
    if (team.rank() == 0) planner().settle(was_flipped, estimate);
    team.sync();
  }
};

}  // namespace rat
