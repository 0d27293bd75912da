// What the weight cache needs from the CPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace bnfast {

// A checksum of a CPU tensor over 1,024 to 4,096 evenly spaced elements (all, where it has fewer), at least one for each index of the
// first dimension where that has at most 2,048; in the order of memory for dense tensors.
int64_t weight_checksum(const at::Tensor& weight);

}  // namespace bnfast
