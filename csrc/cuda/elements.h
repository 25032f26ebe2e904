// The operations on elements (ops.h) on a GPU: one pack of kWidth neighbours a thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/block_team.h"
#include "ops.h"
#include "rule/element_ops.h"

namespace rat::cuda {

// ---- Packs --------------------------------------------------------------------------------------

constexpr int kPackBytes = 16;

// Aligned, so that it is moved by one access.
template <typename S, int kWidth>
struct alignas(sizeof(S) * kWidth) Pack {
  S values[kWidth];
};

// The pack that holds elements [k * kWidth, (k + 1) * kWidth) of a row.
template <int kWidth, typename S>
RAT_HD Pack<S, kWidth>& pack_at(S* row, int64_t k) {
  return reinterpret_cast<Pack<S, kWidth>*>(row)[k];
}
template <int kWidth, typename S>
RAT_HD const Pack<S, kWidth>& pack_at(const S* row, int64_t k) {
  return reinterpret_cast<const Pack<S, kWidth>*>(row)[k];
}

template <typename S>
constexpr int kWide = kPackBytes / sizeof(S);

// Packs of `width` elements cover every row of all views, and are aligned.
template <typename... S>
bool packable(int64_t width, const Rows<S>&... views) {
  const auto fits = [&](const auto& view) {
    const auto bytes = static_cast<uintptr_t>(width) * sizeof(*view.data);
    return reinterpret_cast<uintptr_t>(view.data) % bytes == 0 && view.row_stride % width == 0 &&
           view.elements % width == 0;
  };
  return (fits(views) && ...);
}

// Calls body with the width of the packs, an integral constant.
template <typename S, typename Body>
void with_width(bool wide, Body&& body) {
  if (wide) return body(std::integral_constant<int, kWide<S>>{});
  body(std::integral_constant<int, 1>{});
}

// ---- Inspect ------------------------------------------------------------------------------------

struct BitOr {
  RAT_HD int operator()(int a, int b) const { return a | b; }
};

template <typename S, int kWidth>
struct InspectKernel {
  static constexpr int kMaxBlock = kMaxThreads;
  Inspect<S> op;

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    for (int64_t i = thread.block(); i < op.x.rows; i += thread.blocks()) {
      int seen = 0;
      for (int64_t k = thread.rank(); k < op.x.elements / kWidth; k += thread.size()) {
        const Pack<S, kWidth> pack = pack_at<kWidth>(op.x.row(i), k);
        for (int j = 0; j < kWidth; ++j) {
          const wide_t<S> value = widen(pack.values[j]);
          if (!std::isfinite(value)) {
            seen |= kInputNotFinite;
          } else if (value < op.bounds.low || value > op.bounds.high) {
            seen |= kInputOutside;
          }
        }
      }
      seen = BlockTeam<Thread>{thread}.reduce(seen, BitOr{});
      if (seen & kInputNotFinite) seen = kInputNotFinite;
      if (thread.rank() == 0) *op.flags.row(i) = static_cast<uint8_t>(seen);
    }
  }
};

template <typename Launch, typename S>
void launch_on(const Launch& launch, const Inspect<S>& op) {
  with_width<S>(packable(kWide<S>, op.x), [&](auto width) {
    const InspectKernel<S, width> kernel{op};
    launch(kernel, op.x.rows, threads_for(op.x.elements / width, kernel.kMaxBlock));
  });
}

// ---- Aim ----------------------------------------------------------------------------------------

template <typename S, int kWidth>
struct AimKernel {
  static constexpr int kMaxBlock = kMaxThreads;
  Aim<S> op;

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    using T = wide_t<S>;
    for (int64_t i = thread.block(); i < op.x.rows; i += thread.blocks()) {
      Ray<T> ray{0, static_cast<T>(INFINITY), 0};
      for (int64_t k = thread.rank(); k < op.x.elements / kWidth; k += thread.size()) {
        const Pack<S, kWidth> gradient = pack_at<kWidth>(op.gradient.row(i), k);
        const Pack<S, kWidth> x = pack_at<kWidth>(op.x.row(i), k);
        Pack<int8_t, kWidth> d;
        for (int j = 0; j < kWidth; ++j) {
          const T value = widen(gradient.values[j]), from = widen(x.values[j]);
          d.values[j] = direction_of(value);
          const T along = slope_of(value, from, op.bounds.low, op.bounds.high);
          const T size = std::fabs(from), nearest = along > T(0) ? size : ray.nearest;
          ray = MergeRays{}(ray, Ray<T>{along, nearest, size});
        }
        pack_at<kWidth>(op.direction.row(i), k) = d;
      }
      ray = BlockTeam<Thread>{thread}.reduce(ray, MergeRays{});
      if (thread.rank() == 0) {
        op.state.search(i).aim(static_cast<T>(ray.slope), least_step<S>(ray));
      }
    }
  }
};

template <typename Launch, typename S>
void launch_on(const Launch& launch, const Aim<S>& op) {
  with_width<S>(packable(kWide<S>, op.gradient, op.x, op.direction), [&](auto width) {
    const AimKernel<S, width> kernel{op};
    launch(kernel, op.x.rows, threads_for(op.x.elements / width, kernel.kMaxBlock));
  });
}

// ---- Perturb ------------------------------------------------------------------------------------

// A row is cut into tiles of one pack a thread; a block takes a tile to all of the row's probes.
template <typename S, int kWidth>
struct PerturbKernel {
  static constexpr int kMaxBlock = 256;
  Perturb<S> op;
  int64_t tiles;  // a row

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    const int64_t packs = op.x.elements / kWidth, all_tiles = op.index.size() * tiles;
    for (int64_t tile = thread.block(); tile < all_tiles; tile += thread.blocks()) {
      const int64_t i = tile / tiles;
      const int64_t k = (tile - i * tiles) * thread.size() + thread.rank();
      if (k >= packs) continue;
      const int64_t row = op.index.data[i];
      const Pack<S, kWidth> from = pack_at<kWidth>(op.x.row(row), k);
      const Pack<int8_t, kWidth> d = pack_at<kWidth>(op.direction.row(row), k);
      const wide_t<S>* radii = op.probes.row(row);
      for (int64_t probe = 0; probe < op.probes.columns; ++probe) {
        const wide_t<S> radius = radii[probe * op.probes.column_stride];
        Pack<S, kWidth> to;
        for (int j = 0; j < kWidth; ++j) {
          to.values[j] = narrow<S>(
              perturbed(widen(from.values[j]), radius, d.values[j], op.bounds.low, op.bounds.high));
        }
        pack_at<kWidth>(op.out.row(i * op.probes.columns + probe), k) = to;
      }
    }
  }
};

template <typename Launch, typename S>
void launch_on(const Launch& launch, const Perturb<S>& op) {
  with_width<S>(packable(kWide<S>, op.x, op.direction, op.out), [&](auto width) {
    using Kernel = PerturbKernel<S, width>;
    const int64_t packs = op.x.elements / width;
    const int64_t tiles = divide_up(packs, Kernel::kMaxBlock);
    if (tiles == 0) return;
    launch(Kernel{op, tiles}, op.index.count * tiles,
           threads_for(divide_up(packs, tiles), Kernel::kMaxBlock));
  });
}

}  // namespace rat::cuda
