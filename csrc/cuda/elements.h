// The operations on elements (ops.h) on a GPU: one pack of kWidth neighbours a thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/block_team.h"
#include "ops.h"

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

// One of the tiles (ops.h) that rows are cut into.
struct Tile {
  int64_t row, number;
  int64_t begin, end;  // its packs
};

template <int kWidth>
RAT_HD Tile tile_at(int64_t i, int64_t tiles, int64_t elements) {
  constexpr int64_t kPacks = kTileElements / kWidth;
  const int64_t row = i / tiles, number = i - row * tiles, begin = number * kPacks;
  const int64_t end = begin + kPacks, packs = elements / kWidth;
  return {row, number, begin, end < packs ? end : packs};
}

template <int kWidth>
int threads_for_tile(int64_t elements) {
  return threads_for(std::min(elements, kTileElements) / kWidth, kMaxThreads);
}

// ---- Inspect ------------------------------------------------------------------------------------

struct Max {
  RAT_HD int operator()(int a, int b) const { return a > b ? a : b; }
};

template <typename S, int kWidth>
struct InspectKernel {
  static constexpr int kMaxBlock = kMaxThreads;
  Inspect<S> op;

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    const int64_t tiles = op.flags.columns;
    for (int64_t i = thread.block(); i < op.x.rows * tiles; i += thread.blocks()) {
      const Tile tile = tile_at<kWidth>(i, tiles, op.x.elements);
      int worst = 0;
      for (int64_t k = tile.begin + thread.rank(); k < tile.end; k += thread.size()) {
        const Pack<S, kWidth> pack = pack_at<kWidth>(op.x.row(tile.row), k);
        for (int j = 0; j < kWidth; ++j) worst = Max{}(worst, flag_of(widen(pack.values[j])));
      }
      worst = BlockTeam<Thread>{thread}.reduce(worst, Max{});
      if (thread.rank() == 0) {
        op.flags.row(tile.row)[tile.number * op.flags.column_stride] = static_cast<uint8_t>(worst);
      }
    }
  }

  RAT_HD int flag_of(wide_t<S> value) const {
    if (!std::isfinite(value)) return kInputNotFinite;
    return value < op.bounds.low || value > op.bounds.high ? kInputOutside : 0;
  }
};

template <typename Launch, typename S>
void launch_on(const Launch& launch, const Inspect<S>& op) {
  with_width<S>(packable(kWide<S>, op.x), [&](auto width) {
    launch(InspectKernel<S, width>{op}, op.x.rows * op.flags.columns,
           threads_for_tile<width>(op.x.elements));
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
    const int64_t tiles = op.tiles.columns;
    for (int64_t i = thread.block(); i < op.x.rows * tiles; i += thread.blocks()) {
      const Tile tile = tile_at<kWidth>(i, tiles, op.x.elements);
      Ray<T> ray{0, static_cast<T>(INFINITY), 0};
      for (int64_t k = tile.begin + thread.rank(); k < tile.end; k += thread.size()) {
        const Pack<S, kWidth> gradient = pack_at<kWidth>(op.gradient.row(tile.row), k);
        const Pack<S, kWidth> x = pack_at<kWidth>(op.x.row(tile.row), k);
        Pack<int8_t, kWidth> d;
        for (int j = 0; j < kWidth; ++j) {
          const T value = widen(gradient.values[j]), from = widen(x.values[j]);
          d.values[j] = direction_of(value);
          const T along = slope_of(value, from, op.bounds.low, op.bounds.high);
          const T size = std::fabs(from), nearest = along > T(0) ? size : ray.nearest;
          ray = MergeRays{}(ray, Ray<T>{along, nearest, size});
        }
        pack_at<kWidth>(op.direction.row(tile.row), k) = d;
      }
      ray = BlockTeam<Thread>{thread}.reduce(ray, MergeRays{});
      if (thread.rank() != 0) continue;
      op.tiles.row(tile.row)[tile.number] = ray;
      if (tiles == 1) op.plan(tile.row, ray);
    }
  }
};

// Merges the tiles of each row, in their order. One thread a row.
template <typename S>
struct PlanKernel {
  static constexpr int kMaxBlock = 256;
  Aim<S> op;

  template <typename Thread>
  RAT_HD void operator()(const Thread& thread) const {
    const int64_t all = thread.blocks() * thread.size();
    for (int64_t i = thread.block() * thread.size() + thread.rank(); i < op.x.rows; i += all) {
      Ray<wide_t<S>> ray = op.tiles.row(i)[0];
      for (int64_t t = 1; t < op.tiles.columns; ++t) ray = MergeRays{}(ray, op.tiles.row(i)[t]);
      op.plan(i, ray);
    }
  }
};

template <typename Launch, typename S>
void launch_on(const Launch& launch, const Aim<S>& op) {
  const int64_t tiles = op.tiles.columns;
  with_width<S>(packable(kWide<S>, op.gradient, op.x, op.direction), [&](auto width) {
    launch(AimKernel<S, width>{op}, op.x.rows * tiles, threads_for_tile<width>(op.x.elements));
  });
  if (tiles == 1) return;  // then it has planned as well
  const int threads = threads_for(op.x.rows, PlanKernel<S>::kMaxBlock);
  launch(PlanKernel<S>{op}, divide_up(op.x.rows, threads), threads);
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
