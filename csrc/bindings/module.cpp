// pybind11: the only file that knows Python. It turns torch tensors into checked views and calls
// the core. It never allocates tensor memory and does not link torch: a tensor is read through its
// public attributes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "ops.h"

namespace py = pybind11;

namespace rat {
namespace {

[[noreturn]] void fail(const std::string& name, const std::string& what) {
  throw py::value_error("rat_ext core: " + name + " " + what);
}

// A torch.Tensor as its attributes describe it.
struct Tensor {
  std::string name;
  void* data;
  DType dtype;
  bool cuda;
  int device_index;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;

  int64_t rows() const { return sizes[0]; }
};

DType dtype_of(const py::handle& tensor, const std::string& name) {
  const std::string text = py::str(tensor.attr("dtype"));
  if (text == "torch.float32") return DType::kFloat32;
  if (text == "torch.float64") return DType::kFloat64;
  if (text == "torch.float16") return DType::kFloat16;
  if (text == "torch.bfloat16") return DType::kBFloat16;
  if (text == "torch.int8") return DType::kInt8;
  if (text == "torch.uint8") return DType::kUInt8;
  if (text == "torch.int32") return DType::kInt32;
  fail(name, "has dtype " + text + ", which the core does not know");
}

Tensor read(const py::handle& tensor, const char* name) {
  Tensor t;
  t.name = name;
  t.dtype = dtype_of(tensor, name);
  t.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  t.sizes = tensor.attr("shape").cast<std::vector<int64_t>>();
  t.strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
  t.cuda = tensor.attr("is_cuda").cast<bool>();
  t.device_index = t.cuda ? tensor.attr("device").attr("index").cast<int>() : -1;
  if (!t.cuda && !tensor.attr("is_cpu").cast<bool>()) {
    fail(name, "is on device " + std::string(py::str(tensor.attr("device"))) +
                   "; the core works on CPU and CUDA tensors");
  }
  if (t.sizes.empty()) fail(name, "must have a batch dimension");
  return t;
}

std::optional<Tensor> read_optional(const py::handle& tensor, const char* name) {
  if (tensor.is_none()) return std::nullopt;
  return read(tensor, name);
}

RowsView rows_view(const Tensor& t) {
  // Walk the inner dimensions from the smallest stride: a dense block leaves no gap.
  std::vector<size_t> order;
  int64_t elements = 1;
  for (size_t d = 1; d < t.sizes.size(); ++d) {
    if (t.sizes[d] != 1) order.push_back(d);
    elements *= t.sizes[d];
  }
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return t.strides[a] < t.strides[b]; });
  int64_t expected = 1;
  for (const size_t d : order) {
    if (elements > 0 && t.strides[d] != expected) fail(t.name, "must have dense rows");
    expected *= t.sizes[d];
  }
  return {t.data, t.dtype, t.rows(), elements, t.strides[0]};
}

MatrixView matrix_view(const Tensor& t) {
  if (t.sizes.size() != 2) fail(t.name, "must be a matrix");
  return {t.data, t.dtype, t.sizes[0], t.sizes[1], t.strides[0], t.strides[1]};
}

RowIndex row_index(const Tensor& t) {
  if (t.dtype != DType::kInt32 || t.sizes.size() != 1 || (t.sizes[0] > 1 && t.strides[0] != 1)) {
    fail(t.name, "must be a contiguous int32 vector");
  }
  return {static_cast<const int32_t*>(t.data), t.sizes[0], nullptr};
}

// The first entries of `index`, as many as the tensor `active_count` says.
RowIndex row_index(const Tensor& index, const std::optional<Tensor>& active_count) {
  RowIndex rows = row_index(index);
  if (active_count) {
    const RowIndex number = row_index(*active_count);
    if (number.count != 1) fail(active_count->name, "must have one element");
    rows.active = number.data;
  }
  return rows;
}

void require(bool condition, const Tensor& t, const char* what) {
  if (!condition) fail(t.name, what);
}

// The memory order of a tensor's inner dimensions must be that of x.
void require_same_layout(const Tensor& t, const Tensor& x) {
  require(t.sizes.size() == x.sizes.size(), t, "must have the rank of x");
  for (size_t d = 1; d < x.sizes.size(); ++d) {
    require(t.sizes[d] == x.sizes[d], t, "must have the row shape of x");
    require(x.sizes[d] == 1 || t.strides[d] == x.strides[d], t, "must have the memory layout of x");
  }
}

// Where an operation runs, found from the tensors it is given.
class Place {
 public:
  Place(int threads, std::optional<uintptr_t> stream, std::initializer_list<const Tensor*> tensors)
      : threads_(threads), stream_(stream), first_(**tensors.begin()) {
    for (const Tensor* t : tensors) {
      if (t->cuda != first_.cuda || t->device_index != first_.device_index) {
        fail(t->name, "is on another device than " + first_.name);
      }
    }
  }

  // Calls on_cpu(threads) or on_cuda(stream) without the GIL.
  template <typename OnCpu, typename OnCuda>
  void run(OnCpu&& on_cpu, [[maybe_unused]] OnCuda&& on_cuda) const {
    if (!first_.cuda) {
      py::gil_scoped_release release;
      return on_cpu(threads_);
    }
#if defined(RAT_EXT_WITH_CUDA)
    if (!stream_) fail(first_.name, "is on a CUDA device: a stream is needed");
    py::gil_scoped_release release;
    on_cuda(cuda::Stream{first_.device_index, reinterpret_cast<void*>(*stream_)});
#else
    throw std::runtime_error(
        "rat_ext was built without CUDA, but the input is on a CUDA device. Rebuild it where nvcc "
        "is "
        "installed (RAT_EXT_CUDA=1 pip install --no-cache-dir --force-reinstall --no-deps .), or "
        "move the model and the input to the CPU. `rat-ext info` says why CUDA was left out.");
#endif
  }

 private:
  int threads_;
  std::optional<uintptr_t> stream_;
  const Tensor& first_;
};

#if defined(RAT_EXT_WITH_CUDA)
#define RAT_RUN(place, op, ...)                                    \
  (place).run([&](int threads) { cpu::op(threads, __VA_ARGS__); }, \
              [&](cuda::Stream stream) { cuda::op(stream, __VA_ARGS__); })
#else
#define RAT_RUN(place, op, ...) \
  (place).run([&](int threads) { cpu::op(threads, __VA_ARGS__); }, [](auto) {})
#endif

// The tensors and settings of a batch of searches. It keeps the tensors alive.
class PyState {
 public:
  PyState(py::object brackets, py::object gaps, py::object probes, double rtol, double eps_max,
          double eps_min, double temperature, bool bisect)
      : owners_{brackets, gaps, probes},
        brackets_(read(brackets, "brackets")),
        gaps_(read(gaps, "gaps")),
        probes_(read(probes, "probes")) {
    state_.brackets = matrix_view(brackets_);
    state_.gaps = matrix_view(gaps_);
    state_.probes = matrix_view(probes_);
    require(state_.brackets.columns == kFields, brackets_, "must have one column per field");
    require(state_.gaps.columns % kKnots == 0, gaps_, "must have kKnots blocks of classes");
    require(state_.probes.columns >= 1 && state_.probes.columns <= kMaxProbes, probes_,
            "must have 1 to 32 columns");
    for (const Tensor* t : {&brackets_, &gaps_, &probes_}) {
      require(t->dtype == brackets_.dtype, *t, "must have the dtype of brackets");
      require(t->rows() == brackets_.rows(), *t, "must have one row per sample");
      require(t->strides[1] == 1 || t->sizes[1] <= 1, *t, "must have contiguous rows");
    }
    state_.probes.column_stride = 1;
    state_.params = {
        rtol,          eps_max, eps_min, temperature, static_cast<int>(state_.probes.columns),
        bisect ? 1 : 0};
  }

  const State& state() const { return state_; }
  const Tensor& brackets() const { return brackets_; }
  const Tensor& probes() const { return probes_; }
  int64_t classes() const { return state_.gaps.columns / kKnots; }

  // The state of rows [begin, begin + count).
  State slice(int64_t begin, int64_t count) const {
    require(begin >= 0 && begin + count <= brackets_.rows(), brackets_,
            "is too short for the slice");
    State part = state_;
    const int64_t size = state_.brackets.dtype == DType::kFloat64 ? 8 : 4;
    for (MatrixView* view : {&part.brackets, &part.gaps, &part.probes}) {
      view->data = static_cast<char*>(view->data) + begin * view->row_stride * size;
      view->rows = count;
    }
    return part;
  }

  int max_rows() const { return rat::max_rows(state_.params); }

 private:
  py::object owners_[3];
  Tensor brackets_, gaps_, probes_;
  State state_;
};

void require_logits(const Tensor& logits, const PyState& state, int64_t rows) {
  require(logits.sizes.size() == 2 && logits.sizes[1] == state.classes(), logits,
          "must be (rows, classes)");
  require(logits.rows() == rows, logits, "must have one row per probe");
}

using Stream = std::optional<uintptr_t>;

void inspect(py::object x_, double low, double high, py::object flags_, int threads,
             Stream stream) {
  const Tensor x = read(x_, "x"), flags = read(flags_, "flags");
  require(flags.dtype == DType::kUInt8 && flags.rows() == x.rows(), flags,
          "must be uint8, one per row");
  const RowsView rows = rows_view(x);
  const MatrixView out{flags.data, flags.dtype, flags.rows(), 1, flags.strides[0], 1};
  const Bounds bounds{low, high};
  RAT_RUN(Place(threads, stream, {&x, &flags}), inspect, rows, bounds, out);
}

void start(py::object logits_, py::object seed_, const PyState& state, int64_t begin, int threads,
           Stream stream) {
  const Tensor logits = read(logits_, "logits"), seed = read(seed_, "seed");
  require_logits(logits, state, logits.rows());
  require(seed.dtype == logits.dtype && seed.sizes == logits.sizes, seed, "must be like logits");
  const State part = state.slice(begin, logits.rows());
  const MatrixView z = matrix_view(logits), s = matrix_view(seed);
  RAT_RUN(Place(threads, stream, {&logits, &seed, &state.brackets()}), start, z, s, part);
}

void aim(py::object gradient_, py::object x_, py::object direction_, double low, double high,
         const PyState& state, int64_t begin, int threads, Stream stream) {
  const Tensor gradient = read(gradient_, "gradient"), x = read(x_, "x"),
               direction = read(direction_, "direction");
  require(gradient.dtype == x.dtype, gradient, "must have the dtype of x");
  require(direction.dtype == DType::kInt8, direction, "must be int8");
  for (const Tensor* t : {&gradient, &direction}) {
    require(t->rows() == x.rows(), *t, "must have the rows of x");
    require_same_layout(*t, x);
  }
  const State part = state.slice(begin, x.rows());
  const RowsView g = rows_view(gradient), rows = rows_view(x), d = rows_view(direction);
  const Bounds bounds{low, high};
  RAT_RUN(Place(threads, stream, {&x, &gradient, &direction, &state.brackets()}), aim, g, rows, d,
          bounds, part);
}

void perturb(py::object x_, py::object direction_, py::object index_, py::object probes_,
             double low, double high, py::object out_, py::object active_count_, int threads,
             Stream stream) {
  const Tensor x = read(x_, "x"), direction = read(direction_, "direction"),
               index = read(index_, "index"), probes = read(probes_, "probes"),
               out = read(out_, "out");
  const std::optional<Tensor> active_count = read_optional(active_count_, "active_count");
  const RowIndex rows = row_index(index, active_count);
  const MatrixView radii = matrix_view(probes);
  require(direction.dtype == DType::kInt8 && direction.rows() == x.rows(), direction,
          "must be int8 with the rows of x");
  require(radii.rows == x.rows(), probes, "must have one row per row of x");
  require(out.dtype == x.dtype && out.rows() == rows.count * radii.columns, out,
          "must have the dtype of x and one row per probe");
  require_same_layout(direction, x);
  require_same_layout(out, x);
  const RowsView from = rows_view(x), d = rows_view(direction), to = rows_view(out);
  const Bounds bounds{low, high};
  const Tensor& number = active_count ? *active_count : index;
  RAT_RUN(Place(threads, stream, {&x, &direction, &index, &number, &probes, &out}), perturb, from,
          d, rows, radii, bounds, to);
}

void advance(py::object logits_, py::object index_, const PyState& state, py::object active_count_,
             int threads, Stream stream) {
  const Tensor logits = read(logits_, "logits"), index = read(index_, "index");
  const std::optional<Tensor> active_count = read_optional(active_count_, "active_count");
  const RowIndex rows = row_index(index, active_count);
  require_logits(logits, state, rows.count * state.state().params.probes);
  const MatrixView z = matrix_view(logits);
  const Tensor& number = active_count ? *active_count : index;
  RAT_RUN(Place(threads, stream, {&logits, &index, &number, &state.brackets()}), advance, z, rows,
          state.state());
}

void extrapolate(py::object logits_, py::object index_, double h, const PyState& state,
                 py::object active_count_, int threads, Stream stream) {
  const Tensor logits = read(logits_, "logits"), index = read(index_, "index");
  const std::optional<Tensor> active_count = read_optional(active_count_, "active_count");
  const RowIndex rows = row_index(index, active_count);
  require_logits(logits, state, rows.count);
  const MatrixView z = matrix_view(logits);
  const Tensor& number = active_count ? *active_count : index;
  RAT_RUN(Place(threads, stream, {&logits, &index, &number, &state.brackets()}), extrapolate, z,
          rows, h, state.state());
}

void compact(py::object index_, const PyState& state, py::object active_, py::object count_,
             py::object active_count_, int threads, Stream stream) {
  const Tensor index = read(index_, "index"), active = read(active_, "active"),
               count = read(count_, "count");
  const std::optional<Tensor> active_count = read_optional(active_count_, "active_count");
  const RowIndex rows = row_index(index, active_count);
  require(row_index(active).count >= rows.count, active, "must have room for every row");
  require(row_index(count).count == 1, count, "must have one element");
  auto* kept = static_cast<int32_t*>(active.data);
  auto* number = static_cast<int32_t*>(count.data);
  const Tensor& old = active_count ? *active_count : index;
  RAT_RUN(Place(threads, stream, {&index, &active, &count, &old, &state.brackets()}), compact, rows,
          state.state().brackets, kept, number);
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
  m.attr("INPUT_NOT_FINITE") = static_cast<int>(rat::kInputNotFinite);
  m.attr("INPUT_OUTSIDE") = static_cast<int>(rat::kInputOutside);

  m.attr("BUILD_VERSION") = RAT_EXT_VERSION;
  m.attr("BUILD_CUDA_VERSION") = RAT_EXT_CUDA_VERSION;  // empty without CUDA
  m.attr("BUILD_CUDA_REASON") = RAT_EXT_CUDA_REASON;    // why CUDA was left out; else empty
  m.attr("BUILD_CUDA_ARCHS") = RAT_EXT_CUDA_ARCHS;
  m.attr("BUILD_COMPILER") = RAT_EXT_COMPILER;
  m.attr("BUILD_TYPE") = RAT_EXT_BUILD_TYPE;

  py::class_<rat::PyState>(m, "State", py::module_local())
      .def(py::init<py::object, py::object, py::object, double, double, double, double, bool>(),
           "brackets"_a, "gaps"_a, "probes"_a, py::kw_only(), "rtol"_a, "eps_max"_a, "eps_min"_a,
           "temperature"_a, "bisect"_a)
      .def("max_rows", &rat::PyState::max_rows);

  const auto threads = "threads"_a = 1;
  const auto stream = "stream"_a = py::none();
  const auto active = "active_count"_a = py::none();
  m.def("inspect", &rat::inspect, "x"_a, "low"_a, "high"_a, "flags"_a, threads, stream);
  m.def("start", &rat::start, "logits"_a, "seed"_a, "state"_a, "begin"_a, threads, stream);
  m.def("aim", &rat::aim, "gradient"_a, "x"_a, "direction"_a, "low"_a, "high"_a, "state"_a,
        "begin"_a, threads, stream);
  m.def("perturb", &rat::perturb, "x"_a, "direction"_a, "index"_a, "probes"_a, "low"_a, "high"_a,
        "out"_a, active, threads, stream);
  m.def("advance", &rat::advance, "logits"_a, "index"_a, "state"_a, active, threads, stream);
  m.def("extrapolate", &rat::extrapolate, "logits"_a, "index"_a, "h"_a, "state"_a, active, threads,
        stream);
  m.def("compact", &rat::compact, "index"_a, "state"_a, "active"_a, "count"_a, active, threads,
        stream);
}
