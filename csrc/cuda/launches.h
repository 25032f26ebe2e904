// How each operation is launched: which kernel for which types, and how many threads.
//
// `Launch` is called with a kernel, the number of blocks that would take one turn each, and the
// threads of a block: Launcher (launcher.cuh) on a GPU, HostLauncher (tests/kernels_on_host) in the
// tests.
#pragma once

#include <algorithm>

#include "cuda/kernels.h"

namespace rat::cuda {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads of a block that walks `steps` steps: whole warps, no more than are of use.
inline int threads_for(int64_t steps, int most) {
  return static_cast<int>(std::clamp<int64_t>(divide_up(steps, kWarp) * kWarp, kWarp, most));
}

// A warp is quickest for few classes; for more, a block hides the latency of walking them.
inline int threads_for_classes(int64_t classes) { return classes <= 256 ? kWarp : 256; }

constexpr int64_t kPackBytes = 16;

// Elements of `width` neighbours can be moved as one in every row.
template <typename S>
bool packable(const RowsView& view, int64_t width) {
  const int64_t bytes = width * int64_t{sizeof(S)};
  return reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(bytes) == 0 &&
         view.row_stride % width == 0 && view.elements % width == 0;
}

template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};

template <typename Launch>
void inspect(const Launch& launch, RowsView x, Bounds bounds, MatrixView flags) {
  auto body = [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = wide_t<S>;
    auto run = [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const Inspect<T, S, kWidth> kernel{x, static_cast<T>(bounds.low), static_cast<T>(bounds.high),
                                         flags};
      launch(kernel, x.rows, threads_for(x.elements / kWidth, kMaxThreads));
    };
    constexpr int kWide = kPackBytes / sizeof(S);
    if (packable<S>(x, kWide)) return run(Width<kWide>{});
    run(Width<1>{});
  };
  if (x.dtype == DType::kFloat64) return with_element_type<double>(x.dtype, body);
  with_element_type<float>(x.dtype, body);
}

template <typename Launch>
void start(const Launch& launch, MatrixView logits, MatrixView seed, const State& state) {
  with_state_type(state.brackets.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    with_element_type<T>(logits.dtype, [&](auto tag) {
      using L = typename decltype(tag)::type;
      const Start<T, L> kernel{logits, seed, state, state.typed_params<T>()};
      launch(kernel, logits.rows, threads_for_classes(logits.columns));
    });
  });
}

template <typename Launch>
void aim(const Launch& launch, RowsView gradient, RowsView x, RowsView direction, Bounds bounds,
         const State& state) {
  with_state_type(state.brackets.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    with_element_type<T>(x.dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      auto run = [&](auto width) {
        constexpr int kWidth = decltype(width)::value;
        const Aim<T, S, kWidth> kernel{gradient,
                                       x,
                                       direction,
                                       static_cast<T>(bounds.low),
                                       static_cast<T>(bounds.high),
                                       state,
                                       state.typed_params<T>()};
        launch(kernel, x.rows, threads_for(x.elements / kWidth, kMaxThreads));
      };
      constexpr int kWide = kPackBytes / sizeof(S);
      if (packable<S>(gradient, kWide) && packable<S>(x, kWide) &&
          packable<int8_t>(direction, kWide)) {
        return run(Width<kWide>{});
      }
      run(Width<1>{});
    });
  });
}

template <typename Launch>
void perturb(const Launch& launch, RowsView x, RowsView direction, RowIndex index,
             MatrixView probes, Bounds bounds, RowsView out) {
  with_state_type(probes.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    with_element_type<T>(x.dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      auto run = [&](auto width) {
        using Kernel = Perturb<T, S, decltype(width)::value>;
        const int64_t packs = x.elements / decltype(width)::value;
        const int64_t tiles = divide_up(packs, Kernel::kMaxBlock);
        if (tiles == 0) return;
        const Kernel kernel{
            x,   direction, index, probes, static_cast<T>(bounds.low), static_cast<T>(bounds.high),
            out, tiles};
        launch(kernel, index.count * tiles,
               threads_for(divide_up(packs, tiles), Kernel::kMaxBlock));
      };
      constexpr int kWide = kPackBytes / sizeof(S);
      if (packable<S>(x, kWide) && packable<int8_t>(direction, kWide) && packable<S>(out, kWide)) {
        return run(Width<kWide>{});
      }
      run(Width<1>{});
    });
  });
}

template <typename Launch>
void advance(const Launch& launch, MatrixView logits, RowIndex index, const State& state) {
  with_state_type(state.brackets.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    with_element_type<T>(logits.dtype, [&](auto tag) {
      using L = typename decltype(tag)::type;
      const Advance<T, L> kernel{logits, index, state, state.typed_params<T>()};
      launch(kernel, index.count, threads_for_classes(logits.columns));
    });
  });
}

template <typename Launch>
void extrapolate(const Launch& launch, MatrixView logits, RowIndex index, double h,
                 const State& state) {
  with_state_type(state.brackets.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    with_element_type<T>(logits.dtype, [&](auto tag) {
      using L = typename decltype(tag)::type;
      const Extrapolate<T, L> kernel{logits, index, static_cast<T>(h), state,
                                     state.typed_params<T>()};
      launch(kernel, index.count, threads_for_classes(logits.columns));
    });
  });
}

template <typename Launch>
void compact(const Launch& launch, RowIndex index, MatrixView brackets, int32_t* active,
             int32_t* count) {
  with_state_type(brackets.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    // One block also for no rows: the count is written.
    launch(Compact<T>{index, brackets, active, count}, 1, threads_for(index.count, kMaxThreads));
  });
}

}  // namespace rat::cuda
