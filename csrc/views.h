// What the operations see of a tensor: a pointer and a shape, already checked by the bindings.
#pragma once

#include <cstdint>

#include "platform.h"

namespace rat {

// (rows, elements): each row is one dense block of memory, in any order of the inner dimensions.
// Tensors that are used together have the same order, so that element i of a row is the same
// pixel in all of them.
template <typename S>
struct Rows {
  S* data;
  int64_t rows;
  int64_t elements;
  int64_t row_stride;

  RAT_HD S* row(int64_t index) const { return data + index * row_stride; }
};

// (rows, columns) with any strides.
template <typename S>
struct Matrix {
  S* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;

  RAT_HD S* row(int64_t index) const { return data + index * row_stride; }
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

}  // namespace rat
