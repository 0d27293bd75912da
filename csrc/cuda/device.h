// The device that operators run on: the current stream, memory that outlives a call, and where the kernels' pointers come from.
// (The emulator of the tests has a header of this name.)
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <utility>

#define BNFAST_CUDA_OPERATORS(m) TORCH_LIBRARY_IMPL(bnfast, CUDA, m)

namespace bnfast::cuda {

// While it lives, z's device is the current one.
class Device {
 public:
  explicit Device(const at::Tensor& z) : guard_(z.device()), stream_(c10::cuda::getCurrentCUDAStream()) {}

  void* stream() const { return stream_.stream(); }

  // Memory of a tensor for kernels: that they read, that they fill, that they read and write.
  const void* input(const at::Tensor& t, const char*) const { return t.const_data_ptr(); }
  void* output(const at::Tensor& t, const char*) const { return t.mutable_data_ptr(); }
  void* updated(const at::Tensor& t, const char*) const { return t.mutable_data_ptr(); }

  // `count` counters that are 0, for the kernels of this stream, which leave them at 0. A graph gets counters of its own in each
  // call: it may run on another stream than it was captured on.
  unsigned* counters(int64_t count) {
    const auto zeros = [&](int64_t n) { return at::zeros({n}, at::TensorOptions().device(stream_.device()).dtype(at::kInt)); };
    if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
      own_counters_ = zeros(count);
    } else {
      static std::mutex mutex;
      static auto& kept = *new std::map<std::pair<c10::DeviceIndex, void*>, at::Tensor>;   // outlives the CUDA context's end
      const std::lock_guard<std::mutex> lock(mutex);
      at::Tensor& found = kept[{stream_.device_index(), stream()}];
      if (!found.defined() || found.numel() < count) found = zeros(std::max<int64_t>(count, kCounters));
      own_counters_ = found;
    }
    return reinterpret_cast<unsigned*>(own_counters_.mutable_data_ptr<int>());
  }

  void check(int error, const char* kernel) const {
    TORCH_CHECK(error == cudaSuccess, "bnfast: ", kernel, " did not start: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
  }

 private:
  static constexpr int64_t kCounters = 1 << 14;
  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
  at::Tensor own_counters_;
};

}  // namespace bnfast::cuda
