// The CUDA runtime that the core is linked with.
#include <cuda_runtime_api.h>

namespace rat::cuda {

int runtime_version() {
  int version = 0;
  cudaRuntimeGetVersion(&version);
  return version;
}

}  // namespace rat::cuda
