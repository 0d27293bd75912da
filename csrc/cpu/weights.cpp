// What the weight cache needs from the CPU.
#include "weights.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>

namespace bnfast {

namespace {

constexpr int64_t kSamples = 1024, kMostSamples = 4096;
constexpr int kChains = 8;   // independent ones, which hide the latency of the multiplication

uint64_t mixed(uint64_t sum, uint64_t value) { return (sum ^ value) * 0x9e3779b97f4a7c15u; }

template <class Word>
uint64_t checksum(const Word* words, int64_t count, int64_t step) {
  uint64_t chains[kChains] = {};
  int64_t i = 0;
  for (; i + (kChains - 1) * step < count; i += kChains * step) {
    for (int k = 0; k < kChains; ++k) chains[k] = mixed(chains[k], words[i + k * step]) + 1;
  }
  for (; i < count; i += step) chains[0] = mixed(chains[0], words[i]) + 1;
  uint64_t sum = 0;
  for (const uint64_t chain : chains) {
    sum = mixed(sum, chain);
    sum ^= sum >> 29;
  }
  return sum;
}

}  // namespace

int64_t weight_checksum(const at::Tensor& weight_in) {
  const at::Tensor weight = weight_in.is_non_overlapping_and_dense() ? weight_in : weight_in.contiguous();
  // Each sample is a line from memory, mostly.
  const int64_t count = weight.numel(), filters = weight.dim() > 0 ? weight.size(0) : 1;
  const int64_t samples = std::clamp(2 * filters, kSamples, kMostSamples);
  const int64_t step = std::max<int64_t>(1, (count + samples - 1) / samples);
  const void* data = weight.const_data_ptr();
  const auto run = [&](auto word) { return static_cast<int64_t>(checksum(static_cast<const decltype(word)*>(data), count, step)); };
  switch (weight.element_size()) {
    case 2: return run(uint16_t{});
    case 4: return run(uint32_t{});
    case 8: return run(uint64_t{});
    default: TORCH_CHECK(false, "bnfast: weight is ", weight.scalar_type(), "; floating point types of 2, 4 and 8 bytes are allowed");
  }
}

}  // namespace bnfast
