// What each capability provides: one set of kernels per family and dtype. No torch headers: the kernels include it.
#pragma once

#include "bn.h"
#include "conv_grouped.h"
#include "conv_pointwise.h"
#include "conv_winograd.h"
#include "max_pool.h"

namespace bnfast {

enum class Dtype : int { kFloat, kDouble, kBf16, kF16, kCount };

struct Capability {
  const char* name;
  BnKernels bn[static_cast<int>(Dtype::kCount)];
  GroupedKernels grouped[static_cast<int>(Dtype::kCount)];
  MaxPoolKernels max_pool[static_cast<int>(Dtype::kCount)];
  WinogradKernels winograd[static_cast<int>(Dtype::kCount)];
  PointwiseKernels pointwise;   // float32
};

// The best that this processor runs, or what BNFAST_CPU_CAPABILITY (baseline, avx2, avx512) asks for, if it can.
const Capability& cpu_capability();

}  // namespace bnfast
