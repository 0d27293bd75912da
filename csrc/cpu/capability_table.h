// The table of kernels that each capability fills, and what operators need to look into it.
#pragma once

#include <ATen/core/Tensor.h>

#include "capability.h"

namespace bnfast {

inline Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::kFloat;
    case at::kDouble: return Dtype::kDouble;
    case at::kBFloat16: return Dtype::kBf16;
    case at::kHalf: return Dtype::kF16;
    default: TORCH_CHECK(false, "bnfast: z is ", t.scalar_type(), "; float32, float64, bfloat16 and float16 are allowed");
  }
}

}  // namespace bnfast
