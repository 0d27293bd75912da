// Kernels with one bug each, and what they are without it: what the emulator must find, and must not. Run by test_cuda_emulator.py.
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/intrinsics.cuh"

namespace {

using namespace bnfast::cuda;

enum Bug {
  kNone,
  kNoBarrier,
  kNoWarpBarrier,
  kTail,
  kShuffleMask,
  kDivergentShuffle,
  kLaneOutsideMask,
  kRace,
  kUnwritten,
  kEarlyReturn,
  kNoFence,
  kUnwrittenShared,
  kSharedEnd,
  kMisaligned,
  kReadOnly,
  kNoClusterBarrier,
  kEndsTooEarly,
  kBugs
};

constexpr int kThreads = 64, kBlocks = 5, kCount = kThreads * kBlocks - 3;

struct Arguments {
  const float* x;     // [kCount]
  float* parts;       // [kBlocks]
  float* total;       // [1]
  float* doubled;     // [kCount]
  unsigned* counter;
  unsigned* order;    // [kBlocks]: the turn in which each block came
};

// The sum of x: lanes by shuffles, warps through shared memory, blocks by whoever comes last; and 2 x.
template <Bug kBug>
__global__ void sum_kernel(const Arguments a) {
  BNFAST_SHARED(float, warps, kThreads / 32);
  BNFAST_SHARED(float, lanes, kThreads);
  BNFAST_SHARED(bool, is_last, 1);
  BNFAST_DYNAMIC_SHARED(float, dynamic);
  const int t = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x) * kThreads + t;
  if (kBug == kEarlyReturn && blockIdx.x == 0 && t >= 32) return;
  const int count = kBug == kTail ? kCount + 1 : kCount;
  float value = i < count ? a.x[i] : 0.0f;
  if (i < kCount - (kBug == kUnwritten)) a.doubled[i] = 2 * value;
  // Neighbours exchange through shared memory, and back.
  lanes[t] = value;
  if (kBug != kNoWarpBarrier) __syncwarp();
  value = lanes[t ^ 1];
  value = __shfl_xor_sync(kAllLanes, value, 1);
  for (int distance = 16; distance > 0; distance /= 2) {
    if (kBug == kDivergentShuffle && distance == 1 && t % 32 >= 16) break;
    value += __shfl_down_sync(kBug == kShuffleMask && t % 32 < 16 ? 0xffffu : kAllLanes, value, distance);
  }
  if (kBug == kLaneOutsideMask && t < 16) value += 0 * __shfl_sync(0xffffu, value, 20);
  const unsigned positive = __ballot_sync(kAllLanes, value > 0);
  if (positive == 0 && value > 0) value = -1;   // never
  if (t % 32 == 0) warps[t / 32] = value;
  dynamic[kBug == kSharedEnd ? t + 1 : t] = value;
  if (kBug != kNoBarrier) __syncthreads();
  if (kBug == kRace) dynamic[0] = value;
  BNFAST_SHARED(float, unwritten, 1);
  if (kBug == kUnwrittenShared && t == 0) warps[0] += unwritten[0];
  if (t == 0) a.parts[blockIdx.x] = warps[0] + warps[1];
  __syncthreads();
  if (t == 0) {
    if (kBug != kNoFence) __threadfence();
    const unsigned turn = atomicInc(a.counter, gridDim.x - 1);
    a.order[blockIdx.x] = turn;
    is_last[0] = turn == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last[0] && t == 0) {
    float sum = 0;
    for (int b = 0; b < kBlocks; ++b) sum += __ldcg(a.parts + b);
    a.total[0] = sum;
  }
  if (kBug == kMisaligned && i == 0) a.total[0] = static_cast<float>(__ldg(reinterpret_cast<const uint4*>(a.x + 1)).x);
  if (kBug == kReadOnly && i == 0) const_cast<float*>(a.x)[0] = 0;
}

// Reads and writes what sum_kernel wrote.
__global__ void halve_kernel(const Arguments a) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i < kCount) a.doubled[i] *= 0.5f;
}

// Each block takes what its neighbour in the cluster has; into the first element of `doubled` that belongs to it.
template <Bug kBug>
__global__ void cluster_kernel(const Arguments a) {
  BNFAST_SHARED(float, mine, 1);
  if (threadIdx.x == 0) mine[0] = static_cast<float>(blockIdx.y + 1);
  if (kBug != kNoClusterBarrier) cluster_sync();
  if (threadIdx.x == 0) a.doubled[blockIdx.y] = 2 * cluster_value(mine, blockIdx.y ^ 1);
  if (kBug != kEndsTooEarly) cluster_sync();
}

template <int kBug>
void run(int bug, const Arguments& a) {
  if constexpr (kBug < kBugs) {
    if (bug != kBug) return run<kBug + 1>(bug, a);
    void* const stream = nullptr;
    BNFAST_LAUNCH((sum_kernel<static_cast<Bug>(kBug)>), kBlocks, kThreads, kThreads * sizeof(float), stream, a);
    BNFAST_LAUNCH_CLUSTERS((cluster_kernel<static_cast<Bug>(kBug)>), dim3(1, 4), 4, kThreads, 0, stream, a);
    BNFAST_LAUNCH(halve_kernel, kBlocks, kThreads, 0, stream, a);
  }
}

std::string found;

}  // namespace

// Runs the kernels with one bug. Returns "" where nothing was found, else what. total, order: what the kernels made.
extern "C" __attribute__((visibility("default"))) const char* run_planted(int bug, float* total, unsigned* order) {
  // On the heap: what lies around them is nobody's.
  std::vector<float> x(kCount), doubled(kCount), parts(kBlocks);
  unsigned counter = 0;
  for (int i = 0; i < kCount; ++i) x[i] = 0.5f + static_cast<float>(i % 7);
  cuda_emulator::forget_all();
  cuda_emulator::watch("x", x.data(), kCount * sizeof(float), false, true);
  cuda_emulator::watch("parts", parts.data(), kBlocks * sizeof(float), true, false);
  cuda_emulator::watch("total", total, sizeof(float), true, false);
  cuda_emulator::watch("doubled", doubled.data(), kCount * sizeof(float), true, false);
  cuda_emulator::watch("counter", &counter, sizeof(counter), true, true);
  cuda_emulator::watch("order", order, kBlocks * sizeof(unsigned), true, false);
  try {
    run<0>(bug, {x.data(), parts.data(), total, doubled.data(), &counter, order});
    found.clear();
  } catch (const std::runtime_error& error) {
    found = error.what();
  }
  cuda_emulator::forget_all();
  return found.c_str();
}
