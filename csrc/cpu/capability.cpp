// Which of the compiled capabilities this processor runs.
#include "capability.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bnfast {

namespace baseline { extern const Capability capability; }
#if defined(__x86_64__)
namespace avx2 { extern const Capability capability; }
namespace avx512 { extern const Capability capability; }
namespace avx512_bf16 { extern const Bf16Kernels kernels; }
#endif
#ifdef BNFAST_HAS_AMX
namespace amx { extern const DotKernels kernels; }
#endif

namespace {

#if defined(__x86_64__)
// Bits of the processor's leaf 7: AVX512_BF16, and the two parts of AMX that are used.
bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
}

Capability with_bf16(Capability c, const char* name, const Bf16Kernels& kernels) {
  constexpr int kBf16 = static_cast<int>(Dtype::kBf16);
  c.name = name;
  c.bn[kBf16] = kernels.bn;
  c.grouped[kBf16] = kernels.grouped;
  c.max_pool[kBf16] = kernels.max_pool;
  c.winograd[kBf16] = kernels.winograd;
  c.dot = kernels.dot;
  return c;
}
#endif

#ifdef BNFAST_HAS_AMX
// Also asks the operating system for room to keep the matrices in, which it gives a process once for all of its threads.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Capability choose() {
  Capability best = baseline::capability;
  const char* wanted = std::getenv("BNFAST_CPU_CAPABILITY");
  const auto offer = [&](const Capability& candidate, bool runs_here) {
    const bool named = wanted && std::strcmp(wanted, candidate.name) == 0;
    if (named && !runs_here) {
      throw std::runtime_error(std::string("bnfast: BNFAST_CPU_CAPABILITY is ") + wanted + "; this processor does not run it");
    }
    if (named || (!wanted && runs_here)) best = candidate;
    return named;
  };
  bool found = offer(baseline::capability, true);
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && has_avx512_bf16();
  found |= offer(avx2::capability, avx2);
  found |= offer(avx512::capability, avx512);
  const Capability bf16 = with_bf16(avx512::capability, "avx512_bf16", avx512_bf16::kernels);
  found |= offer(bf16, avx512_bf16);
#ifdef BNFAST_HAS_AMX
  Capability with_amx = bf16;
  with_amx.name = "amx";
  with_amx.dot = amx::kernels;
  found |= offer(with_amx, avx512_bf16 && has_amx());
#endif
#endif
  if (wanted && !found) {
    throw std::runtime_error(std::string("bnfast: BNFAST_CPU_CAPABILITY is ") + wanted +
                             "; baseline, avx2, avx512, avx512_bf16 and amx are allowed");
  }
  return best;
}

}  // namespace

const Capability& cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace bnfast
