// The search of one row: what is known so far, and its settings.
#pragma once

#include <cmath>
#include <cstdint>

#include "platform.h"

namespace rat {

constexpr int kKnots = 3;       // points of the ray whose gaps a row remembers
constexpr int kMaxProbes = 32;  // probes per row and round

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
  T least_step;  // no smaller radius moves the input
  T rows;        // forward rows spent on the search so far
  T fallbacks;   // how many of the rounds bisected because the estimate could not be trusted
  T budget;      // rows left for the bracket; see the worst case in search.h
  T third;       // radius of the third knot; negative if there is none
  T previous;    // while nothing has flipped, the radius before `lower`; negative if there is none
  T streak;      // probes in a row that moved the same end of the bracket: > 0 upper, < 0 lower
  T lower_knot;  // 0, 1, 2 permuted: where the gaps at lower, upper (or previous) and third are
  T upper_knot;
  T third_knot;
  T status;  // Status

  RAT_HD bool flipped() const { return std::isfinite(upper); }
  RAT_HD bool active() const { return status == T(kActive); }
};

// The fields by name and in order, for the bindings.
constexpr const char* kBracketFields[] = {
    "lower",      "upper",      "prediction", "flipped_to", "margin", "slope",
    "least_step", "rows",       "fallbacks",  "budget",     "third",  "previous",
    "streak",     "lower_knot", "upper_knot", "third_knot", "status"};
constexpr int kFields = sizeof(Bracket<float>) / sizeof(float);
static_assert(sizeof kBracketFields / sizeof *kBracketFields == kFields, "one name per field");

// The gaps z_y - z_j to all classes j, at each of the row's knots.
template <typename T>
struct Knots {
  T* gaps;  // (kKnots, classes)
  int classes;

  RAT_HD T* operator[](T knot) const { return gaps + static_cast<int64_t>(knot) * classes; }
};

template <typename T>
struct SearchParams {
  T rtol;
  T eps_max;  // end of the ray: the largest radius looked at
  T temperature;
  int probes;     // per row and round
  T bisect_from;  // if > 0: plain doubling from here and bisection, instead of the rule
  int max_rows;   // a row that takes more is given up; see max_rows() in plan.h

  RAT_HD bool bisect() const { return bisect_from > T(0); }
};

}  // namespace rat
