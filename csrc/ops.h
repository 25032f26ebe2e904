// The operations of the core, once for the CPU and once for CUDA, with the same arguments.
//
// One search: start() reads the logits of the clean forward and writes the seed of the backward
// pass; aim() turns the input gradient into the ray and the first probes; then rounds of perturb(),
// the model, advance() and compact() until no row is active. extrapolate() ends RR-Fast instead.
#pragma once

#include "rule/search.h"
#include "views.h"

namespace rat {

struct Bounds {
  double low;
  double high;
};

// The state of a batch of searches. All tensors have one row per sample.
struct State {
  MatrixView brackets;  // (rows, kFields) of T
  MatrixView gaps;      // (rows, kKnots * classes) of T
  MatrixView probes;    // (rows, params.probes) of T
  SearchParams<double> params;

  template <typename T>
  RAT_HD Search<T> search(int64_t index, const SearchParams<T>& typed) const {
    return {*reinterpret_cast<Bracket<T>*>(brackets.row<T>(index)), gaps.row<T>(index),
            probes.row<T>(index), static_cast<int>(gaps.columns / kKnots), typed};
  }
  template <typename T>
  SearchParams<T> typed_params() const {
    return {static_cast<T>(params.rtol),
            static_cast<T>(params.eps_max),
            static_cast<T>(params.eps_min),
            static_cast<T>(params.temperature),
            params.probes,
            params.bisect};
  }
};

// Indices into the rows of the whole batch.
struct RowIndex {
  const int32_t* data;
  int64_t count;
  // Where the number of entries that count is kept, if it is known only on the device (a captured
  // graph cannot know it): entries beyond it are left alone. Null: all count.
  const int32_t* active;

  RAT_HD int64_t size() const { return active != nullptr && *active < count ? *active : count; }
};

enum InputFlag : uint8_t { kInputNotFinite = 1, kInputOutside = 2 };

#define RAT_DECLARE_OPS(Where)                                                                    \
  /* flags (rows, 1) of uint8: InputFlag bits of each row of x. */                                \
  void inspect(Where where, RowsView x, Bounds bounds, MatrixView flags);                         \
  /* logits and seed (rows, classes), aligned with the state. */                                  \
  void start(Where where, MatrixView logits, MatrixView seed, const State& state);                \
  /* direction (rows, elements) of int8 is written; x and gradient have one dtype. */             \
  void aim(Where where, RowsView gradient, RowsView x, RowsView direction, Bounds bounds,         \
           const State& state);                                                                   \
  /* out (index.count * probes, elements): the rows in `index`, each at every one of its probes.  \
   */                                                                                             \
  void perturb(Where where, RowsView x, RowsView direction, RowIndex index, MatrixView probes,    \
               Bounds bounds, RowsView out);                                                      \
  /* logits (index.count * probes, classes) at those points. */                                   \
  void advance(Where where, MatrixView logits, RowIndex index, const State& state);               \
  /* logits (index.count, classes) at radius h. */                                                \
  void extrapolate(Where where, MatrixView logits, RowIndex index, double h, const State& state); \
  /* The rows of `index` that are still active, in order, and how many they are. */               \
  void compact(Where where, RowIndex index, MatrixView brackets, int32_t* active, int32_t* count);

namespace cpu {
RAT_DECLARE_OPS(int)  // where: the largest number of threads
}
#if defined(RAT_EXT_WITH_CUDA)
namespace cuda {
struct Stream {
  int device;
  void* handle;  // cudaStream_t
};
RAT_DECLARE_OPS(Stream)
}  // namespace cuda
#endif

}  // namespace rat
