// What each capability provides: one set of kernels per family and dtype. No torch headers: the kernels include it.
#pragma once

#include "bn.h"
#include "conv_dot.h"
#include "conv_grouped.h"
#include "conv_pointwise.h"
#include "conv_winograd.h"
#include "max_pool.h"

// Where the compiler knows the instructions and the operating system's way to ask for them is known.
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define BNFAST_HAS_AMX
#endif

namespace bnfast {

enum class Dtype : int { kFloat, kDouble, kBf16, kF16, kCount };

struct Capability {
  const char* name;
  BnKernels bn[static_cast<int>(Dtype::kCount)];
  GroupedKernels grouped[static_cast<int>(Dtype::kCount)];
  MaxPoolKernels max_pool[static_cast<int>(Dtype::kCount)];
  WinogradKernels winograd[static_cast<int>(Dtype::kCount)];
  PointwiseKernels pointwise;   // float32
  DotKernels dot;               // bfloat16
};

// What a capability has for bfloat16 in place of another's.
struct Bf16Kernels {
  BnKernels bn;
  GroupedKernels grouped;
  MaxPoolKernels max_pool;
  WinogradKernels winograd;
  DotKernels dot;
};

// The best that this processor runs, or what BNFAST_CPU_CAPABILITY (baseline, avx2, avx512, avx512_bf16, amx) asks for, if it can.
const Capability& cpu_capability();

}  // namespace bnfast
