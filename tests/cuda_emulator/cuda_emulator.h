// CUDA for a plain C++ compiler: what kernels and launchers need of the language and the runtime, as far as they need it.
// emulator.cpp runs the threads and watches their accesses to memory; README.md says what it finds.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

namespace cuda_emulator {

// ---- for whoever launches ---------------------------------------------------------------------------------------------

// Runs all blocks. Throws std::runtime_error for the first thing that is wrong; what the launch wrote until then stays.
// cluster: so many blocks side by side in y are there at once, and form a cluster.
void launch(const char* kernel, dim3 blocks, unsigned cluster, dim3 threads, size_t shared_bytes, void (*run)(const void*),
            const void* body);
template <class F>
void launch(const char* kernel, dim3 blocks, unsigned cluster, dim3 threads, size_t shared_bytes, const F& body) {
  launch(kernel, blocks, cluster, threads, shared_bytes, [](const void* f) { (*static_cast<const F*>(f))(); }, &body);
}

// Kernels may read [at, at + bytes), and write where writable; nothing else but what they put there is known where not filled.
// Ranges that overlap become one.
void watch(const char* name, const void* at, size_t bytes, bool writable, bool filled);
void forget_all();
// Whether launches run all their blocks (a test may want those at the ends of a large grid alone).
bool runs_all_blocks();

// ---- for kernels --------------------------------------------------------------------------------------------------------

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();

void* shared_array(const void* key, size_t bytes);
void* dynamic_shared();

void sync_threads();
void sync_cluster();
// Where the block of that rank in the cluster has what this one has at `mine`.
const void* shared_of_rank(const void* mine, unsigned rank);
void sync_warp(unsigned mask);
void thread_fence();

enum class Exchange { kIndex, kDown, kXor, kBallot };
uint64_t exchange(Exchange kind, unsigned mask, uint64_t value, int lanes);
template <class T>
T exchange(Exchange kind, unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = exchange(kind, mask, bits, lanes);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

unsigned atomic_increment(unsigned* at, unsigned limit);
unsigned atomic_add(unsigned* at, unsigned value);

// One access of the size of T, as the instruction makes it.
void saw(const void* at, size_t bytes, bool writes);
template <class T> __attribute__((no_sanitize("thread"))) T read_once(const T* at) {
  saw(at, sizeof(T), false);
  return *at;
}
template <class T> __attribute__((no_sanitize("thread"))) void write_once(T* at, const T& value) {
  saw(at, sizeof(T), true);
  *at = value;
}

}  // namespace cuda_emulator

#define threadIdx (::cuda_emulator::thread_index())
#define blockIdx (::cuda_emulator::block_index())
#define blockDim (::cuda_emulator::block_size())
#define gridDim (::cuda_emulator::grid_size())

#define BNFAST_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...)                                          \
  (static_cast<void>(stream),                                                                                      \
   ::cuda_emulator::launch(#kernel, blocks, 1, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }), cudaSuccess)
#define BNFAST_LAUNCH_CLUSTERS(kernel, blocks, cluster, threads, shared_bytes, stream, ...)                        \
  (static_cast<void>(stream),                                                                                      \
   ::cuda_emulator::launch(#kernel, blocks, cluster, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }), cudaSuccess)
#define BNFAST_SHARED(type, name, count)   \
  static const char name##_key = 0;        \
  type* const name = static_cast<type*>(::cuda_emulator::shared_array(&name##_key, sizeof(type) * (count)))
#define BNFAST_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::cuda_emulator::dynamic_shared())

inline void __syncthreads() { cuda_emulator::sync_threads(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_emulator::sync_warp(mask); }
inline void __threadfence() { cuda_emulator::thread_fence(); }

template <class T> T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_emulator::exchange(cuda_emulator::Exchange::kIndex, mask, value, lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int lanes) {
  return cuda_emulator::exchange(cuda_emulator::Exchange::kDown, mask, value, lanes);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_emulator::exchange(cuda_emulator::Exchange::kXor, mask, value, lanes);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return static_cast<unsigned>(cuda_emulator::exchange(cuda_emulator::Exchange::kBallot, mask, uint64_t{predicate}, 0));
}

inline unsigned atomicInc(unsigned* at, unsigned limit) { return cuda_emulator::atomic_increment(at, limit); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return cuda_emulator::atomic_add(at, value); }

template <class T> T __ldg(const T* at) { return cuda_emulator::read_once(at); }
template <class T> T __ldcs(const T* at) { return cuda_emulator::read_once(at); }
template <class T> T __ldcg(const T* at) { return cuda_emulator::read_once(at); }
template <class T> void __stcs(T* at, const T& value) { cuda_emulator::write_once(at, value); }

inline int min(int a, int b) { return a < b ? a : b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline double __hiloint2double(int high, int low) {
  return std::bit_cast<double>(uint64_t{static_cast<unsigned>(high)} << 32 | static_cast<unsigned>(low));
}
inline int __double2hiint(double x) { return static_cast<int>(std::bit_cast<uint64_t>(x) >> 32); }
inline int __double2loint(double x) { return static_cast<int>(std::bit_cast<uint64_t>(x)); }

struct __half { _Float16 value; };
inline __half __ushort_as_half(unsigned short bits) { return {std::bit_cast<_Float16>(bits)}; }
inline unsigned short __half_as_ushort(__half x) { return std::bit_cast<unsigned short>(x.value); }
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

struct __nv_bfloat16 { unsigned short bits; };
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = std::bit_cast<unsigned>(x);
  if (x != x) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
