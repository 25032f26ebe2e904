#include "ops.h"

#include <array>
#include <limits>

#include "cpu/parallel.h"
#include "rule/element_ops.h"

namespace rat::cpu {

void inspect(int threads, RowsView x, Bounds bounds, MatrixView flags) {
  auto body = [&](auto tag) {
    using S = typename decltype(tag)::type;
    using T = wide_t<S>;
    const T low = static_cast<T>(bounds.low), high = static_cast<T>(bounds.high);
    for_rows(threads, x.rows, x.elements, [&](int64_t i) {
      const S* values = x.row<S>(i);
      // Counts rather than branches, so that the loop vectorises.
      int64_t not_finite = 0, outside = 0;
      for (int64_t k = 0; k < x.elements; ++k) {
        const T value = widen(values[k]);
        not_finite += !(std::fabs(value) <= std::numeric_limits<T>::max());
        outside += (value < low) | (value > high);
      }
      const bool infinite = not_finite > 0;
      *flags.row<uint8_t>(i) = static_cast<uint8_t>((infinite ? kInputNotFinite : 0) |
                                                    (outside > 0 && !infinite ? kInputOutside : 0));
    });
  };
  if (x.dtype == DType::kFloat64) return with_element_type<double>(x.dtype, body);
  with_element_type<float>(x.dtype, body);
}

void start(int threads, MatrixView logits, MatrixView seed, const State& state) {
  with_state_type(state.brackets.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    const SearchParams<T> params = state.typed_params<T>();
    with_element_type<T>(logits.dtype, [&](auto tag) {
      using L = typename decltype(tag)::type;
      for_rows(threads, logits.rows, logits.columns * 16, [&](int64_t i) {
        state.search<T>(i, params).start(SerialTeam{},
                                         LogitRow<L>{logits.row<L>(i), logits.column_stride},
                                         seed.row<L>(i), seed.column_stride);
      });
    });
  });
}

void aim(int threads, RowsView gradient, RowsView x, RowsView direction, Bounds bounds,
         const State& state) {
  with_state_type(state.brackets.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    const SearchParams<T> params = state.typed_params<T>();
    const T low = static_cast<T>(bounds.low), high = static_cast<T>(bounds.high);
    with_element_type<T>(x.dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      for_rows(threads, x.rows, x.elements, [&](int64_t i) {
        const S* g = gradient.row<S>(i);
        const S* values = x.row<S>(i);
        int8_t* d = direction.row<int8_t>(i);
        // Independent partial sums: vectorisable, and more accurate than one running sum.
        constexpr int kLanes = 64;
        std::array<T, kLanes> partial{};
        int64_t k = 0;
        for (; k + kLanes <= x.elements; k += kLanes) {
          for (int lane = 0; lane < kLanes; ++lane) {
            const T value = widen(g[k + lane]);
            d[k + lane] = direction_of(value);
            partial[lane] += slope_of(value, widen(values[k + lane]), low, high);
          }
        }
        double slope = 0;
        for (; k < x.elements; ++k) {
          const T value = widen(g[k]);
          d[k] = direction_of(value);
          slope += slope_of(value, widen(values[k]), low, high);
        }
        for (const T sum : partial) slope += sum;
        state.search<T>(i, params).aim(static_cast<T>(slope));
      });
    });
  });
}

void perturb(int threads, RowsView x, RowsView direction, RowIndex index, MatrixView probes,
             Bounds bounds, RowsView out) {
  with_state_type(probes.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    const T low = static_cast<T>(bounds.low), high = static_cast<T>(bounds.high);
    with_element_type<T>(x.dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      for_rows(threads, index.size() * probes.columns, x.elements, [&](int64_t i) {
        const int64_t row = index.data[i / probes.columns];
        const T radius = probes.row<T>(row)[(i % probes.columns) * probes.column_stride];
        const S* from = x.row<S>(row);
        const int8_t* d = direction.row<int8_t>(row);
        S* to = out.row<S>(i);
        for (int64_t k = 0; k < x.elements; ++k) {
          to[k] = narrow<S>(perturbed(widen(from[k]), radius, d[k], low, high));
        }
      });
    });
  });
}

void advance(int threads, MatrixView logits, RowIndex index, const State& state) {
  with_state_type(state.brackets.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    const SearchParams<T> params = state.typed_params<T>();
    with_element_type<T>(logits.dtype, [&](auto tag) {
      using L = typename decltype(tag)::type;
      for_rows(threads, index.size(), logits.columns * 64 * params.probes, [&](int64_t i) {
        state.search<T>(index.data[i], params)
            .round(SerialTeam{},
                   LogitRow<L>{logits.row<L>(i * params.probes), logits.column_stride},
                   logits.row_stride);
      });
    });
  });
}

void extrapolate(int threads, MatrixView logits, RowIndex index, double h, const State& state) {
  with_state_type(state.brackets.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    const SearchParams<T> params = state.typed_params<T>();
    with_element_type<T>(logits.dtype, [&](auto tag) {
      using L = typename decltype(tag)::type;
      for_rows(threads, index.size(), logits.columns * 16, [&](int64_t i) {
        state.search<T>(index.data[i], params)
            .extrapolate(SerialTeam{}, static_cast<T>(h),
                         LogitRow<L>{logits.row<L>(i), logits.column_stride});
      });
    });
  });
}

void compact(int, RowIndex index, MatrixView brackets, int32_t* active, int32_t* count) {
  with_state_type(brackets.dtype, [&](auto state_tag) {
    using T = typename decltype(state_tag)::type;
    const int64_t rows = index.size();
    int32_t kept = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const auto* row = reinterpret_cast<const Bracket<T>*>(brackets.row<T>(index.data[i]));
      if (row->status == T(kActive)) active[kept++] = index.data[i];
    }
    *count = kept;
  });
}

}  // namespace rat::cpu
