// Launching a kernel on a stream.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/block_team.h"
#include "ops.h"

namespace rat::cuda {

// One thread of a grid, as the hardware has it. The host pass compiles the kernels, too, but never
// calls them.
class DeviceThread {
 public:
  RAT_HD explicit DeviceThread(void* scratch) : scratch_(scratch) {}
#if defined(__CUDA_ARCH__)
  RAT_HD int rank() const { return static_cast<int>(threadIdx.x); }
  RAT_HD int size() const { return static_cast<int>(blockDim.x); }
  RAT_HD int64_t block() const { return blockIdx.x; }
  RAT_HD int64_t blocks() const { return gridDim.x; }
  RAT_HD void sync() const { __syncthreads(); }
  RAT_HD uint32_t ballot(bool vote) const { return __ballot_sync(~0u, vote); }
#else
  RAT_HD int rank() const { return 0; }
  RAT_HD int size() const { return 0; }
  RAT_HD int64_t block() const { return 0; }
  RAT_HD int64_t blocks() const { return 0; }
  RAT_HD void sync() const {}
  RAT_HD uint32_t ballot(bool) const { return 0; }
#endif
  RAT_HD void* scratch() const { return scratch_; }

  // The value of the lane whose number differs in the bit `offset`.
  template <typename V>
  RAT_HD V shuffle_xor(V value, [[maybe_unused]] int offset) const {
#if defined(__CUDA_ARCH__)
    static_assert(sizeof(V) % sizeof(uint32_t) == 0);
    uint32_t words[sizeof(V) / sizeof(uint32_t)];
    memcpy(words, &value, sizeof(V));
    for (uint32_t& word : words) word = __shfl_xor_sync(~0u, word, offset);
    memcpy(&value, words, sizeof(V));
#endif
    return value;
  }

 private:
  void* scratch_;
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kMaxBlock) call(const __grid_constant__ Kernel kernel) {
  __shared__ alignas(16) unsigned char scratch[kScratch];
  kernel(DeviceThread(scratch));
}

// Makes a device current, and puts back the one that was.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device_ != before_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  static void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // reported here, so no later call shall report it again
    std::string message = std::string("rat_ext core: ") + what + ": " + cudaGetErrorString(error);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      message += no_kernel();
    }
    throw std::runtime_error(message);
  }

 private:
  // What to do where the current device has no kernel.
  static std::string no_kernel() {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string arch = std::to_string(major) + std::to_string(minor);
    return ". CUDA device " + std::to_string(device) + " is sm_" + arch +
           ", and rat_ext was built for " + RAT_EXT_BUILT_FOR +
           ": rebuild it with RAT_EXT_CUDA_ARCHS=" + arch;
  }

  int device_;
  int before_ = 0;
};

class Launcher {
 public:
  explicit Launcher(Stream stream) : stream_(stream) {}

  template <typename Kernel>
  void operator()(const Kernel& kernel, int64_t blocks, int threads) const {
    if (blocks == 0) return;
    const DeviceGuard guard(stream_.device);
    const int64_t most = std::numeric_limits<int32_t>::max();
    const dim3 grid(static_cast<unsigned>(std::min(blocks, most)));
    void* arguments[] = {const_cast<Kernel*>(&kernel)};
    DeviceGuard::check(cudaLaunchKernel(call<Kernel>, grid, dim3(static_cast<unsigned>(threads)),
                                        arguments, 0, static_cast<cudaStream_t>(stream_.handle)),
                       kernel.op.kName);
  }

 private:
  Stream stream_;
};

}  // namespace rat::cuda
