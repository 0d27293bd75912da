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
// The same for clusters of blocks: those side by side in y.
#define BNFAST_LAUNCH_CLUSTERS(kernel, blocks, cluster, threads, shared_bytes, stream, ...)                        \
  ::bnfast::cuda::launch_clusters(kernel, blocks, cluster, threads, shared_bytes, stream, __VA_ARGS__)
// The dynamic shared memory of the block.
#define BNFAST_DYNAMIC_SHARED(type, name)            \
  extern __shared__ uint4 bnfast_dynamic_shared[];   \
  type* const name = reinterpret_cast<type*>(bnfast_dynamic_shared)
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

// ---- clusters of blocks, from compute capability 9.0 on -------------------------------------------------------------------

#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// All threads of the cluster's blocks reach it before any goes on; what they wrote before is visible behind it.
BNFAST_DEVICE void cluster_sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#endif
}
// What the block of that rank has in its shared memory where this one has `mine`.
template <class T>
BNFAST_DEVICE T cluster_value(const T* mine, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return *static_cast<const T*>(__cluster_map_shared_rank(mine, rank));
#else
  return *mine;
#endif
}

template <class A>
cudaError_t launch_clusters(void (*kernel)(A), dim3 blocks, int cluster, int threads, size_t shared_bytes, void* stream, const A& a) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = attribute.val.clusterDim.z = 1;
  attribute.val.clusterDim.y = cluster;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, a);
}

// Whether the current device has clusters, and code for this kernel that uses them.
template <class A>
bool runs_clusters(void (*kernel)(A)) {
  int device = 0, major = 0;
  cudaFuncAttributes attributes;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9 &&
         cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}
#else
constexpr bool kHasClusters = true;
BNFAST_DEVICE void cluster_sync() { cuda_emulator::sync_cluster(); }
template <class T>
BNFAST_DEVICE T cluster_value(const T* mine, unsigned rank) {
  return cuda_emulator::read_once(static_cast<const T*>(cuda_emulator::shared_of_rank(mine, rank)));
}
template <class A> bool runs_clusters(void (*)(A)) { return true; }
#endif

}  // namespace bnfast::cuda
