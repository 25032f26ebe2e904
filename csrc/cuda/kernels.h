// The kernels, as function objects that hold their arguments and are called by every thread.
//
// They are written against `Thread` (block_team.h) instead of CUDA's built-ins, so that a plain
// C++ compiler compiles them as well and the tests run the same index arithmetic without a GPU.
// All loops stride over the grid, so that any number of blocks is right.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/block_team.h"
#include "ops.h"
#include "rule/element_ops.h"

namespace rat::cuda {

// ---- Logits: one block a row --------------------------------------------------------------------

template <typename T, typename L>
struct Start {
  static constexpr const char* kName = "start";
  static constexpr int kMaxBlock = 256;
  MatrixView logits, seed;
  State state;
  SearchParams<T> params;

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    for (int64_t i = thread.block(); i < logits.rows; i += thread.blocks()) {
      state.search<T>(i, params).start(BlockTeam<Thread>{thread},
                                       LogitRow<L>{logits.row<L>(i), logits.column_stride},
                                       seed.row<L>(i), seed.column_stride);
    }
  }
};

template <typename T, typename L>
struct Advance {
  static constexpr const char* kName = "advance";
  static constexpr int kMaxBlock = 256;
  MatrixView logits;
  RowIndex index;
  State state;
  SearchParams<T> params;

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    const int64_t rows = index.size();
    for (int64_t i = thread.block(); i < rows; i += thread.blocks()) {
      state.search<T>(index.data[i], params)
          .round(BlockTeam<Thread>{thread},
                 LogitRow<L>{logits.row<L>(i * params.probes), logits.column_stride},
                 logits.row_stride);
    }
  }
};

template <typename T, typename L>
struct Extrapolate {
  static constexpr const char* kName = "extrapolate";
  static constexpr int kMaxBlock = 256;
  MatrixView logits;
  RowIndex index;
  T h;
  State state;
  SearchParams<T> params;

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    const int64_t rows = index.size();
    for (int64_t i = thread.block(); i < rows; i += thread.blocks()) {
      state.search<T>(index.data[i], params)
          .extrapolate(BlockTeam<Thread>{thread}, h,
                       LogitRow<L>{logits.row<L>(i), logits.column_stride});
    }
  }
};

// ---- Elements: one pack of kWidth neighbours a thread -------------------------------------------

// Aligned, so that it is moved by one access.
template <typename S, int kWidth>
struct alignas(sizeof(S) * kWidth) Pack {
  S values[kWidth];
};

template <typename S, int kWidth>
RAT_HD Pack<S, kWidth>& pack_at(S* row, int64_t index) {
  return reinterpret_cast<Pack<S, kWidth>*>(row)[index];
}
template <typename S, int kWidth>
RAT_HD const Pack<S, kWidth>& pack_at(const S* row, int64_t index) {
  return reinterpret_cast<const Pack<S, kWidth>*>(row)[index];
}

struct BitOr {
  RAT_HD int operator()(int a, int b) const { return a | b; }
};

template <typename T, typename S, int kWidth>
struct Inspect {
  static constexpr const char* kName = "inspect";
  static constexpr int kMaxBlock = kMaxThreads;
  RowsView x;
  T low, high;
  MatrixView flags;

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    for (int64_t i = thread.block(); i < x.rows; i += thread.blocks()) {
      const S* values = x.row<S>(i);
      int seen = 0;
      for (int64_t k = thread.rank(); k < x.elements / kWidth; k += thread.size()) {
        const Pack<S, kWidth> pack = pack_at<S, kWidth>(values, k);
        for (int j = 0; j < kWidth; ++j) {
          const T value = widen(pack.values[j]);
          if (!std::isfinite(value)) {
            seen |= kInputNotFinite;
          } else if (value < low || value > high) {
            seen |= kInputOutside;
          }
        }
      }
      seen = BlockTeam<Thread>{thread}.reduce(seen, BitOr{});
      if (seen & kInputNotFinite) seen = kInputNotFinite;
      if (thread.rank() == 0) *flags.row<uint8_t>(i) = static_cast<uint8_t>(seen);
    }
  }
};

template <typename T, typename S, int kWidth>
struct Aim {
  static constexpr const char* kName = "aim";
  static constexpr int kMaxBlock = kMaxThreads;
  RowsView gradient, x, direction;
  T low, high;
  State state;
  SearchParams<T> params;

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    for (int64_t i = thread.block(); i < x.rows; i += thread.blocks()) {
      const S* gradients = gradient.row<S>(i);
      const S* values = x.row<S>(i);
      int8_t* directions = direction.row<int8_t>(i);
      double slope = 0;
      for (int64_t k = thread.rank(); k < x.elements / kWidth; k += thread.size()) {
        const Pack<S, kWidth> g = pack_at<S, kWidth>(gradients, k);
        const Pack<S, kWidth> from = pack_at<S, kWidth>(values, k);
        Pack<int8_t, kWidth> d;
        for (int j = 0; j < kWidth; ++j) {
          const T value = widen(g.values[j]);
          d.values[j] = direction_of(value);
          slope += slope_of(value, widen(from.values[j]), low, high);
        }
        pack_at<int8_t, kWidth>(directions, k) = d;
      }
      slope = BlockTeam<Thread>{thread}.reduce(slope, Add{});
      if (thread.rank() == 0) state.search<T>(i, params).aim(static_cast<T>(slope));
    }
  }
};

// A row is cut into tiles of one pack a thread; a block takes a tile to all of the row's probes.
template <typename T, typename S, int kWidth>
struct Perturb {
  static constexpr const char* kName = "perturb";
  static constexpr int kMaxBlock = 256;
  RowsView x, direction;
  RowIndex index;
  MatrixView probes;
  T low, high;
  RowsView out;
  int64_t tiles;  // a row

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    const int64_t packs = x.elements / kWidth, all_tiles = index.size() * tiles;
    for (int64_t tile = thread.block(); tile < all_tiles; tile += thread.blocks()) {
      const int64_t i = tile / tiles;
      const int64_t k = (tile - i * tiles) * thread.size() + thread.rank();
      if (k >= packs) continue;
      const int64_t row = index.data[i];
      const Pack<S, kWidth> from = pack_at<S, kWidth>(x.row<S>(row), k);
      const Pack<int8_t, kWidth> d = pack_at<int8_t, kWidth>(direction.row<int8_t>(row), k);
      const T* radii = probes.row<T>(row);
      for (int64_t probe = 0; probe < probes.columns; ++probe) {
        const T radius = radii[probe * probes.column_stride];
        Pack<S, kWidth> to;
        for (int j = 0; j < kWidth; ++j) {
          to.values[j] =
              narrow<S>(perturbed(widen(from.values[j]), radius, d.values[j], low, high));
        }
        pack_at<S, kWidth>(out.row<S>(i * probes.columns + probe), k) = to;
      }
    }
  }
};

// ---- The list of active rows: one block ---------------------------------------------------------

RAT_HD int count_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  int count = 0;
  for (; bits != 0; bits &= bits - 1) ++count;
  return count;
#endif
}

template <typename T>
struct Compact {
  static constexpr const char* kName = "compact";
  static constexpr int kMaxBlock = kMaxThreads;
  RowIndex index;
  MatrixView brackets;
  int32_t* active;  // may be index.data
  int32_t* count;   // may be index.active

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    const int lane = thread.rank() % kWarp, warp = thread.rank() / kWarp;
    int* kept_in_warp = static_cast<int*>(thread.scratch());
    const int64_t rows = index.size();
    int32_t kept = 0;
    for (int64_t begin = 0; begin < rows; begin += thread.size()) {
      const int64_t i = begin + thread.rank();
      const int32_t row = i < rows ? index.data[i] : 0;
      const bool keep = i < rows && is_active(row);
      const uint32_t kept_lanes = thread.ballot(keep);
      if (lane == 0) kept_in_warp[warp] = count_bits(kept_lanes);
      thread.sync();  // and all rows of this chunk are read before any is overwritten
      int32_t position = kept + count_bits(kept_lanes & ((uint32_t{1} << lane) - 1));
      for (int w = 0; w < thread.size() / kWarp; ++w) {
        if (w < warp) position += kept_in_warp[w];
        kept += kept_in_warp[w];
      }
      if (keep) active[position] = row;
      thread.sync();  // the counts are read before the next chunk's are written
    }
    thread.sync();  // every thread has read the old count
    if (thread.rank() == 0) *count = kept;
  }

 private:
  RAT_HD bool is_active(int32_t row) const {
    return reinterpret_cast<const Bracket<T>*>(brackets.row<T>(row))->status == T(kActive);
  }
};

}  // namespace rat::cuda
