// Checked views of torch tensors. A tensor is read through its public attributes, so that nothing
// here links torch; its memory is torch's.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "scalars.h"
#include "views.h"

namespace py = pybind11;

namespace rat {

[[noreturn]] inline void fail(const std::string& name, const std::string& what) {
  throw py::value_error("rat_ext core: " + name + " " + what);
}

// ---- Element types ------------------------------------------------------------------------------

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16, kInt8, kUInt8, kInt32 };

inline DType dtype_of(const py::handle& tensor, const std::string& name) {
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

// The dtype of the search state for elements of this one.
inline DType wide(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Calls body(S{}) for the type S of the elements, which the state's dtype must fit.
template <typename Body>
void with_type(DType element, DType state, Body&& body) {
  if (state != wide(state)) {
    throw std::invalid_argument("the search state must be float32 or float64");
  }
  if (state == wide(element)) {
    if (element == DType::kFloat64) return body(double{});
    if (element == DType::kFloat32) return body(float{});
    if (element == DType::kFloat16) return body(Half{});
    if (element == DType::kBFloat16) return body(BFloat16{});
  }
  throw std::invalid_argument("tensor dtype does not match the dtype of the search state");
}

// ---- Tensors ------------------------------------------------------------------------------------

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

inline Tensor read(const py::handle& tensor, const char* name) {
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

inline std::optional<Tensor> read_optional(const py::handle& tensor, const char* name) {
  if (tensor.is_none()) return std::nullopt;
  return read(tensor, name);
}

inline void require(bool condition, const Tensor& t, const char* what) {
  if (!condition) fail(t.name, what);
}

inline void require_matrix(const Tensor& t) { require(t.sizes.size() == 2, t, "must be a matrix"); }

inline void require_dense_rows(const Tensor& t) {
  // Walk the inner dimensions from the smallest stride: a dense block leaves no gap.
  std::vector<size_t> order;
  for (size_t d = 1; d < t.sizes.size(); ++d) {
    if (t.sizes[d] == 0) return;
    if (t.sizes[d] != 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return t.strides[a] < t.strides[b]; });
  int64_t expected = 1;
  for (const size_t d : order) {
    require(t.strides[d] == expected, t, "must have dense rows");
    expected *= t.sizes[d];
  }
}

// The memory order of a tensor's inner dimensions must be that of x.
inline void require_same_layout(const Tensor& t, const Tensor& x) {
  require(t.sizes.size() == x.sizes.size(), t, "must have the rank of x");
  for (size_t d = 1; d < x.sizes.size(); ++d) {
    require(t.sizes[d] == x.sizes[d], t, "must have the row shape of x");
    require(x.sizes[d] == 1 || t.strides[d] == x.strides[d], t, "must have the memory layout of x");
  }
}

// ---- Views: S is the type that the dtype was found to be ----------------------------------------

template <typename S>
Rows<S> rows_view(const Tensor& t) {
  require_dense_rows(t);
  int64_t elements = 1;
  for (size_t d = 1; d < t.sizes.size(); ++d) elements *= t.sizes[d];
  return {static_cast<S*>(t.data), t.rows(), elements, t.strides[0]};
}

template <typename S>
Matrix<S> matrix_view(const Tensor& t) {
  require_matrix(t);
  return {static_cast<S*>(t.data), t.sizes[0], t.sizes[1], t.strides[0], t.strides[1]};
}

inline int32_t* int32_vector(const Tensor& t) {
  if (t.dtype != DType::kInt32 || t.sizes.size() != 1 || (t.sizes[0] > 1 && t.strides[0] != 1)) {
    fail(t.name, "must be a contiguous int32 vector");
  }
  return static_cast<int32_t*>(t.data);
}

// The first entries of `index`, as many as the tensor `active_count` says.
inline RowIndex row_index(const Tensor& index, const std::optional<Tensor>& active_count) {
  RowIndex rows{int32_vector(index), index.rows(), nullptr};
  if (active_count) {
    rows.active = int32_vector(*active_count);
    require(active_count->rows() == 1, *active_count, "must have one element");
  }
  return rows;
}

}  // namespace rat
