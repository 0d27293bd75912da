#include "capability_prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq")
#endif

#define BNFAST_NAMESPACE avx512
#define BNFAST_VECTOR_BYTES 64
#include "capability_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
