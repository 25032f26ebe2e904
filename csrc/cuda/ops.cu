#include "cuda/compact.h"
#include "cuda/elements.h"
#include "cuda/launcher.cuh"
#include "cuda/logits.h"

namespace rat::cuda {

void run(Stream stream, const Operation& operation) {
  std::visit([launch = Launcher(stream)](const auto& op) { launch_on(launch, op); }, operation);
}

}  // namespace rat::cuda
