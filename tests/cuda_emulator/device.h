// In place of csrc/cuda/device.h: tensors on the CPU, which the emulator is told of.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include "cuda_emulator.h"

#define BNFAST_CUDA_OPERATORS(m) TORCH_LIBRARY_IMPL(bnfast_emulated, CPU, m)

namespace bnfast::cuda {

class Device {
 public:
  explicit Device(const at::Tensor&) { cuda_emulator::forget_all(); }
  ~Device() { cuda_emulator::forget_all(); }

  void* stream() const { return nullptr; }

  const void* input(const at::Tensor& t, const char* name) const {
    cuda_emulator::watch(name, t.const_data_ptr(), t.nbytes(), false, true);
    return t.const_data_ptr();
  }
  void* output(const at::Tensor& t, const char* name) const {
    cuda_emulator::watch(name, t.const_data_ptr(), t.nbytes(), true, false);
    return t.mutable_data_ptr();
  }
  void* updated(const at::Tensor& t, const char* name) const {
    cuda_emulator::watch(name, t.const_data_ptr(), t.nbytes(), true, true);
    return t.mutable_data_ptr();
  }

  // The same for all calls, so that one which is not left at 0 shows in the next.
  unsigned* counters(int64_t count) {
    static at::Tensor kept;
    if (!kept.defined() || kept.numel() < count) kept = at::zeros({count}, at::kInt);
    return static_cast<unsigned*>(updated(kept.slice(0, 0, count), "counters"));
  }

  void check(int error, const char* kernel) const { TORCH_CHECK(error == 0, kernel, ": error ", error); }
};

}  // namespace bnfast::cuda
