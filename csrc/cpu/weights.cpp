// What the weight cache needs from the CPU.
#include "weights.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

namespace bnfast {

static constexpr int64_t kSamples = 4096;

int64_t weight_checksum(const at::Tensor& weight_in) {
  const at::Tensor weight = weight_in.is_non_overlapping_and_dense() ? weight_in : weight_in.contiguous();
  const int64_t count = weight.numel(), size = weight.element_size(), step = std::max<int64_t>(1, (count + kSamples - 1) / kSamples);
  const char* bytes = static_cast<const char*>(weight.const_data_ptr());
  uint64_t sum = 0xcbf29ce484222325u;
  for (int64_t i = 0; i < count; i += step) {
    uint64_t value = 0;
    std::memcpy(&value, bytes + i * size, std::min<int64_t>(size, 8));
    sum = (sum ^ value) * 0x9e3779b97f4a7c15u;
    sum ^= sum >> 29;
  }
  return static_cast<int64_t>(sum);
}

}  // namespace bnfast
