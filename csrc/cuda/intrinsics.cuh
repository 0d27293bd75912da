// All that kernels need of the device beyond C++, and how they are launched. Under nvcc these are CUDA's own; a plain C++
// compiler takes their twins from cuda_emulator.h (tests/cuda_emulator), so that the very same sources run on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define BNFAST_DEVICE __device__ __forceinline__
// Starts a kernel: (kernel, blocks, threads of a block, bytes of dynamic shared memory, stream, arguments); the value is
// cudaSuccess or what was wrong with the launch itself.
#define BNFAST_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...)          \
  [&]() -> cudaError_t {                                                           \
    kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__); \
    return cudaGetLastError();                                                     \
  }()
// An array of `count` in the shared memory of the block.
#define BNFAST_SHARED(type, name, count) __shared__ type name[count]

#else

#include <cuda_emulator.h>

#define BNFAST_DEVICE __attribute__((always_inline)) inline

#endif

namespace bnfast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// float and double by one name each; multiplications and additions are never contracted otherwise (-fmad=false).
BNFAST_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
BNFAST_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
// The rounded quotient. Plain `/` of floats is an approximate one on the device (-prec-div=false): activations need no more, and
// the rounded one calls a function, for which registers are saved to memory.
BNFAST_DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
BNFAST_DEVICE double quotient(double a, double b) { return a / b; }
BNFAST_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
BNFAST_DEVICE double square_root(double x) { return __dsqrt_rn(x); }
BNFAST_DEVICE float exponential(float x) { return expf(x); }
BNFAST_DEVICE double exponential(double x) { return exp(x); }
BNFAST_DEVICE bool is_finite(float x) { return fabsf(x) < INFINITY; }
BNFAST_DEVICE bool is_finite(double x) { return fabs(x) < INFINITY; }

}  // namespace bnfast::cuda
