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

  // The same for all calls, which must leave them at 0.
  unsigned* counters(int64_t count) {
    static at::Tensor kept;
    const bool is_clean = !kept.defined() || !kept.any().item<bool>();
    if (!is_clean) kept.zero_();
    TORCH_CHECK(is_clean, "the launch before this one has not left its counters at 0");
    if (!kept.defined() || kept.numel() < count) kept = at::zeros({count}, at::kInt);
    own_ = cuda_emulator::runs_all_blocks() ? kept.slice(0, 0, count) : at::zeros({count}, at::kInt);
    return static_cast<unsigned*>(updated(own_, "counters"));
  }

  void check(int error, const char* kernel) const { TORCH_CHECK(error == 0, kernel, ": error ", error); }

 private:
  at::Tensor own_;
};

}  // namespace bnfast::cuda
