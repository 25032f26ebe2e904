// The operations on inputs, and on the list of active rows.
#include "cuda/launcher.cuh"
#include "cuda/launches.h"

namespace rat::cuda {

void inspect(Stream stream, RowsView x, Bounds bounds, MatrixView flags) {
  inspect(Launcher(stream), x, bounds, flags);
}

void aim(Stream stream, RowsView gradient, RowsView x, RowsView direction, Bounds bounds,
         const State& state) {
  aim(Launcher(stream), gradient, x, direction, bounds, state);
}

void perturb(Stream stream, RowsView x, RowsView direction, RowIndex index, MatrixView probes,
             Bounds bounds, RowsView out) {
  perturb(Launcher(stream), x, direction, index, probes, bounds, out);
}

void compact(Stream stream, RowIndex index, MatrixView brackets, int32_t* active, int32_t* count) {
  compact(Launcher(stream), index, brackets, active, count);
}

}  // namespace rat::cuda
