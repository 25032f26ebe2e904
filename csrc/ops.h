// The operations of the core: each is a struct of its arguments, which run() carries out on the CPU
// or on a CUDA device.
//
// One search: Start reads the logits of the clean forward and writes the seed of the backward pass;
// Aim turns the input gradient into the ray and the first probes; then rounds of Perturb, the
// model, Advance and Compact until no row is active. Extrapolate ends RR-Fast instead.
//
// S is the element type of the tensors of the model, its inputs and logits.
#pragma once

#include <cstdint>
#include <variant>

#include "rule/element_ops.h"
#include "rule/search.h"
#include "scalars.h"
#include "views.h"

namespace rat {

template <typename T>
struct Bounds {
  T low;
  T high;
};

// The state of a batch of searches. All tensors have one row per sample and contiguous rows.
template <typename T>
struct State {
  Matrix<T> brackets;  // (rows, kFields)
  Matrix<T> gaps;      // (rows, kKnots * classes)
  Matrix<T> probes;    // (rows, params.probes)
  SearchParams<T> params;

  RAT_HD Bracket<T>& bracket(int64_t i) const {
    return *reinterpret_cast<Bracket<T>*>(brackets.row(i));
  }
  RAT_HD Search<T> search(int64_t i) const {
    const Knots<T> knots{gaps.row(i), static_cast<int>(gaps.columns / kKnots)};
    return {bracket(i), knots, probes.row(i), params};
  }
};

// ---- Operations on elements: cpu/ops.cpp and cuda/elements.h ------------------------------------

// The worse has the larger number.
enum InputFlag : uint8_t { kInputOutside = 1, kInputNotFinite = 2 };

// What is summed up over a row is summed up over tiles of this many elements first, so that a GPU
// works on few but long rows with many blocks.
constexpr int64_t kTileElements = 8192;

constexpr int64_t tiles_of(int64_t elements) {
  return elements <= kTileElements ? 1 : (elements - 1) / kTileElements + 1;
}

// The worst that is wrong with each tile of each row of x.
template <typename S>
struct Inspect {
  static constexpr const char* kName = "inspect";
  Rows<const S> x;
  Bounds<wide_t<S>> bounds;
  Matrix<uint8_t> flags;  // (rows, tiles) of InputFlag, or 0
};

// The rays and their first probes, from the gradient of the seeded logits in x.
template <typename S>
struct Aim {
  static constexpr const char* kName = "aim";
  Rows<const S> gradient, x;
  Rows<int8_t> direction;  // is written
  Bounds<wide_t<S>> bounds;
  State<wide_t<S>> state;
  Matrix<Ray<wide_t<S>>> tiles;  // (rows, tiles): room

  RAT_HD void plan(int64_t i, const Ray<wide_t<S>>& ray) const {
    state.search(i).aim(static_cast<wide_t<S>>(ray.slope), least_step<S>(ray));
  }
};

// The rows in `index`, each at every one of its probes.
template <typename S>
struct Perturb {
  static constexpr const char* kName = "perturb";
  Rows<const S> x;
  Rows<const int8_t> direction;
  RowIndex index;
  Matrix<const wide_t<S>> probes;
  Bounds<wide_t<S>> bounds;
  Rows<S> out;  // (index.count * probes, elements)
};

// The rows of `index` that are still active, in order, and how many they are. T is the state's.
template <typename T>
struct Compact {
  static constexpr const char* kName = "compact";
  RowIndex index;
  State<T> state;
  int32_t* active;  // may be index.data
  int32_t* count;   // may be index.active
};

// ---- Operations on logits, a row at a time ------------------------------------------------------
//
// row() is what is done to the i-th of rows() rows, by a team on the CPU or the GPU. slots() is the
// most that rows() can be; the host may ask it also where rows() is known only on the device.
// work() is what a row costs, in elements.

template <typename S>
struct Start {
  static constexpr const char* kName = "start";
  Matrix<const S> logits;  // (rows, classes), aligned with the state
  Matrix<S> seed;          // (rows, classes)
  State<wide_t<S>> state;

  int64_t slots() const { return logits.rows; }
  int64_t work() const { return logits.columns * 16; }
  RAT_HD int64_t rows() const { return logits.rows; }
  template <typename Team>
  RAT_HD void row(const Team& team, int64_t i) const {
    state.search(i).start(team, logit_row(logits, i), seed.row(i), seed.column_stride);
  }
};

template <typename S>
struct Advance {
  static constexpr const char* kName = "advance";
  Matrix<const S> logits;  // (index.count * probes, classes), at the probes
  RowIndex index;
  State<wide_t<S>> state;

  int64_t slots() const { return index.count; }
  int64_t work() const { return logits.columns * 64 * state.params.probes; }
  RAT_HD int64_t rows() const { return index.size(); }
  template <typename Team>
  RAT_HD void row(const Team& team, int64_t i) const {
    state.search(index.data[i]).round(team, logits, i * state.params.probes);
  }
};

template <typename S>
struct Extrapolate {
  static constexpr const char* kName = "extrapolate";
  Matrix<const S> logits;  // (index.count, classes), at radius h
  RowIndex index;
  wide_t<S> h;
  State<wide_t<S>> state;

  int64_t slots() const { return index.count; }
  int64_t work() const { return logits.columns * 16; }
  RAT_HD int64_t rows() const { return index.size(); }
  template <typename Team>
  RAT_HD void row(const Team& team, int64_t i) const {
    state.search(index.data[i]).extrapolate(team, h, logit_row(logits, i));
  }
};

// ---- run() --------------------------------------------------------------------------------------

template <typename... S>
using OperationsOn =
    std::variant<Inspect<S>..., Aim<S>..., Perturb<S>..., Start<S>..., Advance<S>...,
                 Extrapolate<S>..., Compact<float>, Compact<double>>;
using Operation = OperationsOn<double, float, Half, BFloat16>;

namespace cpu {
struct Threads {
  int most;
};
void run(Threads threads, const Operation& operation);
}  // namespace cpu

namespace cuda {
struct Stream {
  int device;
  void* handle;  // cudaStream_t
};
void run(Stream stream, const Operation& operation);
}  // namespace cuda

}  // namespace rat
