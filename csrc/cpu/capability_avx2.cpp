#include "capability_prelude.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define BNFAST_NAMESPACE avx2
#define BNFAST_VECTOR_BYTES 32
#include "capability_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
