// What the kernels see of a tensor: a pointer, a type and a shape, already checked by the bindings.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "scalars.h"

namespace rat {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16, kInt8, kUInt8, kInt32 };

// (rows, elements): each row is one dense block of memory, in any order of the inner dimensions.
// Tensors that are used together have the same order, so that element i of a row is the same
// pixel in all of them.
struct RowsView {
  void* data;
  DType dtype;
  int64_t rows;
  int64_t elements;
  int64_t row_stride;

  template <typename S>
  RAT_HD S* row(int64_t index) const {
    return static_cast<S*>(data) + index * row_stride;
  }
};

// (rows, columns) with any strides.
struct MatrixView {
  void* data;
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;

  template <typename S>
  RAT_HD S* row(int64_t index) const {
    return static_cast<S*>(data) + index * row_stride;
  }
};

template <typename S>
struct Tag {
  using type = S;
};

// Calls body(Tag<S>{}) with the element type S of `dtype`, among those that widen to T.
template <typename T, typename Body>
void with_element_type(DType dtype, Body&& body) {
  if constexpr (std::is_same_v<T, double>) {
    if (dtype == DType::kFloat64) return body(Tag<double>{});
  } else {
    if (dtype == DType::kFloat32) return body(Tag<float>{});
    if (dtype == DType::kFloat16) return body(Tag<Half>{});
    if (dtype == DType::kBFloat16) return body(Tag<BFloat16>{});
  }
  throw std::invalid_argument("tensor dtype does not match the dtype of the search state");
}

// Calls body(Tag<T>{}) with the type of the search state.
template <typename Body>
void with_state_type(DType dtype, Body&& body) {
  if (dtype == DType::kFloat64) return body(Tag<double>{});
  if (dtype == DType::kFloat32) return body(Tag<float>{});
  throw std::invalid_argument("the search state must be float32 or float64");
}

}  // namespace rat
