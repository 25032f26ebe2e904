// The operations on logits. Apart from the others so that the two compile side by side.
#include "cuda/launcher.cuh"
#include "cuda/launches.h"

namespace rat::cuda {

void start(Stream stream, MatrixView logits, MatrixView seed, const State& state) {
  start(Launcher(stream), logits, seed, state);
}

void advance(Stream stream, MatrixView logits, RowIndex index, const State& state) {
  advance(Launcher(stream), logits, index, state);
}

void extrapolate(Stream stream, MatrixView logits, RowIndex index, double h, const State& state) {
  extrapolate(Launcher(stream), logits, index, h, state);
}

}  // namespace rat::cuda
