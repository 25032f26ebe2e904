// Splits rows over threads. Threads are started for each large operation rather than kept in a
// pool: the operations are few and long next to the cost of a thread, no state outlives a call, and
// fork stays safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "ops.h"

namespace rat::cpu {

// Work that a thread must have before it pays to start one.
constexpr int64_t kElementsPerThread = int64_t{1} << 18;

// Calls body(row) for row in [0, rows).
template <typename Body>
void for_rows(Threads threads, int64_t rows, int64_t elements_per_row, Body&& body) {
  const int64_t useful = rows * std::max<int64_t>(elements_per_row, 1) / kElementsPerThread;
  const int64_t parts = std::max<int64_t>(1, std::min({int64_t{threads.most}, useful, rows}));
  auto run = [&](int64_t part) {
    const int64_t end = rows * (part + 1) / parts;
    for (int64_t row = rows * part / parts; row < end; ++row) body(row);
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(parts - 1));
  for (int64_t part = 1; part < parts; ++part) others.emplace_back(run, part);
  run(0);
  for (std::thread& other : others) other.join();
}

}  // namespace rat::cpu
