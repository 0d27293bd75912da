// What the weight cache needs from the CPU.
#pragma once

#include <ATen/core/Tensor.h>

namespace bnfast {

// A checksum of a CPU tensor over at most 4,096 evenly spaced elements, in the order of memory for dense tensors.
int64_t weight_checksum(const at::Tensor& weight);

}  // namespace bnfast
