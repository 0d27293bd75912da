// Everything from the standard library that the kernels use, included before any target pragma: its inline functions are
// then compiled for the baseline, and a copy that the linker keeps runs everywhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "capability.h"

#define BNFAST_STRINGIFY_(x) #x
#define BNFAST_STRINGIFY(x) BNFAST_STRINGIFY_(x)
