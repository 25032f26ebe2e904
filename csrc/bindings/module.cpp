// The Python module: checks the tensors of each operation and runs it where they are.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>

#include "bindings/tensors.h"
#include "ops.h"

namespace rat {
namespace {

using Stream = std::optional<uintptr_t>;
using OptionalTensor = std::optional<Tensor>;

// Where an operation runs, found from the tensors it is given.
class Place {
 public:
  Place(int threads, Stream stream, std::initializer_list<const Tensor*> tensors,
        const OptionalTensor& active_count = std::nullopt)
      : threads_(threads), stream_(stream), first_(**tensors.begin()) {
    for (const Tensor* t : tensors) require_here(*t);
    if (active_count) require_here(*active_count);
  }

  // Without the GIL.
  template <typename Op>
  void run(const Op& op) const {
    if (!first_.cuda) {
      py::gil_scoped_release release;
      return cpu::run(cpu::Threads{threads_}, op);
    }
#if defined(RAT_EXT_WITH_CUDA)
    if (!stream_) fail(first_.name, "is on a CUDA device: a stream is needed");
    py::gil_scoped_release release;
    cuda::run(cuda::Stream{first_.device_index, reinterpret_cast<void*>(*stream_)}, op);
#else
    throw std::runtime_error(
        "rat_ext was built without CUDA, but the input is on a CUDA device. Rebuild it where nvcc "
        "is installed (RAT_EXT_CUDA=1 pip install --no-cache-dir --force-reinstall --no-deps .), "
        "or move the model and the input to the CPU. `rat-ext info` says why CUDA was left out.");
#endif
  }

 private:
  void require_here(const Tensor& t) const {
    if (t.cuda != first_.cuda || t.device_index != first_.device_index) {
      fail(t.name, "is on another device than " + first_.name);
    }
  }

  int threads_;
  Stream stream_;
  const Tensor& first_;
};

// The tensors and settings of a batch of searches. It keeps the tensors alive.
class PyState {
 public:
  PyState(py::object brackets, py::object gaps, py::object probes, double rtol, double eps_max,
          double temperature, double bisect_from)
      : owners_{brackets, gaps, probes},
        brackets_(read(brackets, "brackets")),
        gaps_(read(gaps, "gaps")),
        probes_(read(probes, "probes")) {
    for (const Tensor* t : {&brackets_, &gaps_, &probes_}) require_matrix(*t);
    require(brackets_.sizes[1] == kFields, brackets_, "must have one column per field");
    require(gaps_.sizes[1] % kKnots == 0, gaps_, "must have kKnots blocks of classes");
    require(probes_.sizes[1] >= 1 && probes_.sizes[1] <= kMaxProbes, probes_,
            "must have 1 to 32 columns");
    for (const Tensor* t : {&brackets_, &gaps_, &probes_}) {
      require(t->dtype == brackets_.dtype, *t, "must have the dtype of brackets");
      require(t->rows() == brackets_.rows(), *t, "must have one row per sample");
      require(t->strides[1] == 1 || t->sizes[1] <= 1, *t, "must have contiguous rows");
    }
    if (!(rtol > 0 && rtol < 1 && eps_max > 0 && std::isfinite(eps_max) && temperature > 0)) {
      fail("State", "needs rtol in (0, 1), a finite eps_max > 0 and a temperature > 0");
    }
    params_ = {rtol, eps_max, temperature, static_cast<int>(probes_.sizes[1]), bisect_from, 0};
    params_.max_rows =
        dtype() == DType::kFloat64 ? rat::max_rows<double>(params_) : rat::max_rows<float>(params_);
  }

  DType dtype() const { return brackets_.dtype; }
  const Tensor& brackets() const { return brackets_; }
  int64_t classes() const { return gaps_.sizes[1] / kKnots; }
  int probes() const { return params_.probes; }
  int max_rows() const { return params_.max_rows; }

  void require_rows(int64_t begin, int64_t count) const {
    require(begin >= 0 && begin + count <= brackets_.rows(), brackets_,
            "is too short for the slice");
  }

  // The state of rows [begin, begin + count), which must be there.
  template <typename T>
  State<T> slice(int64_t begin, int64_t count) const {
    const auto part = [&](const Tensor& t) {
      Matrix<T> view = matrix_view<T>(t);
      view.data = view.row(begin);
      view.rows = count;
      return view;
    };
    const SearchParams<T> params{
        static_cast<T>(params_.rtol),        static_cast<T>(params_.eps_max),
        static_cast<T>(params_.temperature), params_.probes,
        static_cast<T>(params_.bisect_from), params_.max_rows};
    return {part(brackets_), part(gaps_), part(probes_), params};
  }
  template <typename T>
  State<T> all() const {
    return slice<T>(0, brackets_.rows());
  }

 private:
  py::object owners_[3];
  Tensor brackets_, gaps_, probes_;
  SearchParams<double> params_;
};

template <typename T>
Bounds<T> bounds(double low, double high) {
  return {static_cast<T>(low), static_cast<T>(high)};
}

// Room for the rays of the tiles of the rows of x.
template <typename T, typename S>
Matrix<Ray<T>> ray_room(const Tensor& t, const Rows<S>& x) {
  constexpr int64_t kDoubles = 3;
  static_assert(sizeof(Ray<T>) <= kDoubles * sizeof(double));
  const int64_t tiles = tiles_of(x.elements);
  require(t.dtype == DType::kFloat64 && t.sizes == std::vector<int64_t>{x.rows, tiles, kDoubles}, t,
          "must be float64, (rows, tiles, 3)");
  require(t.strides == std::vector<int64_t>{tiles * kDoubles, kDoubles, 1}, t,
          "must be contiguous");
  return {static_cast<Ray<T>*>(t.data), x.rows, tiles, tiles, 1};
}

void require_logits(const Tensor& logits, const PyState& state, int64_t rows) {
  require(logits.sizes.size() == 2 && logits.sizes[1] == state.classes(), logits,
          "must be (rows, classes)");
  require(logits.rows() == rows, logits, "must have one row per probe");
}

void inspect(py::object x_, double low, double high, py::object flags_, int threads,
             Stream stream) {
  const Tensor x = read(x_, "x"), flags = read(flags_, "flags");
  require(flags.dtype == DType::kUInt8, flags, "must be uint8");
  const Place place(threads, stream, {&x, &flags});
  with_type(x.dtype, wide(x.dtype), [&](auto s) {
    using S = decltype(s);
    const Rows<const S> rows = rows_view<const S>(x);
    require(flags.sizes == std::vector<int64_t>{rows.rows, tiles_of(rows.elements)}, flags,
            "must be (rows, tiles)");
    place.run(Inspect<S>{rows, bounds<wide_t<S>>(low, high), matrix_view<uint8_t>(flags)});
  });
}

void start(py::object logits_, py::object seed_, const PyState& state, int64_t begin, int threads,
           Stream stream) {
  const Tensor logits = read(logits_, "logits"), seed = read(seed_, "seed");
  require_logits(logits, state, logits.rows());
  require(seed.dtype == logits.dtype && seed.sizes == logits.sizes, seed, "must be like logits");
  state.require_rows(begin, logits.rows());
  const Place place(threads, stream, {&logits, &seed, &state.brackets()});
  with_type(logits.dtype, state.dtype(), [&](auto s) {
    using S = decltype(s);
    place.run(Start<S>{matrix_view<const S>(logits), matrix_view<S>(seed),
                       state.slice<wide_t<S>>(begin, logits.rows())});
  });
}

void aim(py::object gradient_, py::object x_, py::object direction_, double low, double high,
         const PyState& state, int64_t begin, py::object tiles_, int threads, Stream stream) {
  const Tensor gradient = read(gradient_, "gradient"), x = read(x_, "x"),
               direction = read(direction_, "direction"), tiles = read(tiles_, "tiles");
  require(gradient.dtype == x.dtype, gradient, "must have the dtype of x");
  require(direction.dtype == DType::kInt8, direction, "must be int8");
  for (const Tensor* t : {&gradient, &direction}) {
    require(t->rows() == x.rows(), *t, "must have the rows of x");
    require_same_layout(*t, x);
  }
  state.require_rows(begin, x.rows());
  const Place place(threads, stream, {&x, &gradient, &direction, &tiles, &state.brackets()});
  with_type(x.dtype, state.dtype(), [&](auto s) {
    using S = decltype(s);
    using T = wide_t<S>;
    const Rows<const S> rows = rows_view<const S>(x);
    place.run(Aim<S>{rows_view<const S>(gradient), rows, rows_view<int8_t>(direction),
                     bounds<T>(low, high), state.slice<T>(begin, x.rows()),
                     ray_room<T>(tiles, rows)});
  });
}

void perturb(py::object x_, py::object direction_, py::object index_, py::object probes_,
             double low, double high, py::object out_, py::object active_count_, int threads,
             Stream stream) {
  const Tensor x = read(x_, "x"), direction = read(direction_, "direction"),
               index = read(index_, "index"), probes = read(probes_, "probes"),
               out = read(out_, "out");
  const OptionalTensor active_count = read_optional(active_count_, "active_count");
  const RowIndex rows = row_index(index, active_count);
  require_matrix(probes);
  require(direction.dtype == DType::kInt8 && direction.rows() == x.rows(), direction,
          "must be int8 with the rows of x");
  require(probes.rows() == x.rows(), probes, "must have one row per row of x");
  require(out.dtype == x.dtype && out.rows() == rows.count * probes.sizes[1], out,
          "must have the dtype of x and one row per probe");
  require_same_layout(direction, x);
  require_same_layout(out, x);
  const Place place(threads, stream, {&x, &direction, &index, &probes, &out}, active_count);
  with_type(x.dtype, probes.dtype, [&](auto s) {
    using S = decltype(s);
    using T = wide_t<S>;
    place.run(Perturb<S>{rows_view<const S>(x), rows_view<const int8_t>(direction), rows,
                         matrix_view<const T>(probes), bounds<T>(low, high), rows_view<S>(out)});
  });
}

void advance(py::object logits_, py::object index_, const PyState& state, py::object active_count_,
             int threads, Stream stream) {
  const Tensor logits = read(logits_, "logits"), index = read(index_, "index");
  const OptionalTensor active_count = read_optional(active_count_, "active_count");
  const RowIndex rows = row_index(index, active_count);
  require_logits(logits, state, rows.count * state.probes());
  const Place place(threads, stream, {&logits, &index, &state.brackets()}, active_count);
  with_type(logits.dtype, state.dtype(), [&](auto s) {
    using S = decltype(s);
    place.run(Advance<S>{matrix_view<const S>(logits), rows, state.all<wide_t<S>>()});
  });
}

void extrapolate(py::object logits_, py::object index_, double h, const PyState& state,
                 py::object active_count_, int threads, Stream stream) {
  const Tensor logits = read(logits_, "logits"), index = read(index_, "index");
  const OptionalTensor active_count = read_optional(active_count_, "active_count");
  const RowIndex rows = row_index(index, active_count);
  require_logits(logits, state, rows.count);
  const Place place(threads, stream, {&logits, &index, &state.brackets()}, active_count);
  with_type(logits.dtype, state.dtype(), [&](auto s) {
    using S = decltype(s);
    using T = wide_t<S>;
    place.run(
        Extrapolate<S>{matrix_view<const S>(logits), rows, static_cast<T>(h), state.all<T>()});
  });
}

void compact(py::object index_, const PyState& state, py::object active_, py::object count_,
             py::object active_count_, int threads, Stream stream) {
  const Tensor index = read(index_, "index"), active = read(active_, "active"),
               count = read(count_, "count");
  const OptionalTensor active_count = read_optional(active_count_, "active_count");
  const RowIndex rows = row_index(index, active_count);
  int32_t* kept = int32_vector(active);
  require(active.rows() >= rows.count, active, "must have room for every row");
  int32_t* number = int32_vector(count);
  require(count.rows() == 1, count, "must have one element");
  const Place place(threads, stream, {&index, &active, &count, &state.brackets()}, active_count);
  with_type(state.dtype(), state.dtype(), [&](auto s) {
    using T = wide_t<decltype(s)>;
    place.run(Compact<T>{rows, state.all<T>(), kept, number});
  });
}

}  // namespace
}  // namespace rat

PYBIND11_MODULE(RAT_EXT_MODULE, m) {
  using namespace pybind11::literals;
  m.doc() =
      "The compiled core of rat_ext. Use the rat_ext package; this module checks shapes, not "
      "sense.";
  py::list fields;
  for (const char* name : rat::kBracketFields) fields.append(name);
  m.attr("BRACKET_FIELDS") = py::tuple(fields);
  m.attr("KNOTS") = rat::kKnots;
  m.attr("MAX_PROBES") = rat::kMaxProbes;
  m.attr("ACTIVE") = static_cast<int>(rat::kActive);
  m.attr("FOUND") = static_cast<int>(rat::kFound);
  m.attr("NOT_FOUND") = static_cast<int>(rat::kNotFound);
  m.attr("NOT_FINITE") = static_cast<int>(rat::kNotFinite);
  m.attr("TILE_ELEMENTS") = rat::kTileElements;
  m.attr("INPUT_NOT_FINITE") = static_cast<int>(rat::kInputNotFinite);
  m.attr("INPUT_OUTSIDE") = static_cast<int>(rat::kInputOutside);

  m.attr("BUILD_VERSION") = RAT_EXT_VERSION;
  m.attr("BUILD_CUDA_VERSION") = RAT_EXT_CUDA_VERSION;  // empty without CUDA
  m.attr("BUILD_CUDA_REASON") = RAT_EXT_CUDA_REASON;    // why CUDA was left out; else empty
  m.attr("BUILD_CUDA_ARCHS") = RAT_EXT_CUDA_ARCHS;
  m.attr("BUILD_COMPILER") = RAT_EXT_COMPILER;
  m.attr("BUILD_TYPE") = RAT_EXT_BUILD_TYPE;

  py::class_<rat::PyState>(m, "State", py::module_local())
      .def(py::init<py::object, py::object, py::object, double, double, double, double>(),
           "brackets"_a, "gaps"_a, "probes"_a, py::kw_only(), "rtol"_a, "eps_max"_a,
           "temperature"_a, "bisect_from"_a)
      .def("max_rows", &rat::PyState::max_rows);

  const auto threads = "threads"_a = 1;
  const auto stream = "stream"_a = py::none();
  const auto active = "active_count"_a = py::none();
  m.def("inspect", &rat::inspect, "x"_a, "low"_a, "high"_a, "flags"_a, threads, stream);
  m.def("start", &rat::start, "logits"_a, "seed"_a, "state"_a, "begin"_a, threads, stream);
  m.def("aim", &rat::aim, "gradient"_a, "x"_a, "direction"_a, "low"_a, "high"_a, "state"_a,
        "begin"_a, "tiles"_a, threads, stream);
  m.def("perturb", &rat::perturb, "x"_a, "direction"_a, "index"_a, "probes"_a, "low"_a, "high"_a,
        "out"_a, active, threads, stream);
  m.def("advance", &rat::advance, "logits"_a, "index"_a, "state"_a, active, threads, stream);
  m.def("extrapolate", &rat::extrapolate, "logits"_a, "index"_a, "h"_a, "state"_a, active, threads,
        stream);
  m.def("compact", &rat::compact, "index"_a, "state"_a, "active"_a, "count"_a, active, threads,
        stream);
}
