// Which of the compiled capabilities this processor runs.
#include "capability.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace bnfast {

namespace baseline { extern const Capability capability; }
#if defined(__x86_64__)
namespace avx2 { extern const Capability capability; }
namespace avx512 { extern const Capability capability; }
#endif

namespace {

const Capability& choose() {
  const Capability* best = &baseline::capability;
  const char* wanted = std::getenv("BNFAST_CPU_CAPABILITY");
  const auto offer = [&](const Capability& candidate, bool runs_here) {
    const bool named = wanted && std::strcmp(wanted, candidate.name) == 0;
    if (named && !runs_here) {
      throw std::runtime_error(std::string("bnfast: BNFAST_CPU_CAPABILITY is ") + wanted + "; this processor does not run it");
    }
    if (named || (!wanted && runs_here)) best = &candidate;
    return named;
  };
  bool found = offer(baseline::capability, true);
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  found |= offer(avx2::capability, avx2);
  found |= offer(avx512::capability, avx512);
#endif
  if (wanted && !found) {
    throw std::runtime_error(std::string("bnfast: BNFAST_CPU_CAPABILITY is ") + wanted +
                             "; baseline, avx2 and avx512 are allowed");
  }
  return *best;
}

}  // namespace

const Capability& cpu_capability() {
  static const Capability& chosen = choose();
  return chosen;
}

}  // namespace bnfast
