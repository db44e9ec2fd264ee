// Teams of CUDA threads that share one row. Every member calls every reduction, and every member
// gets the same bits back: the sums are xor butterflies, which add the same pairs on both sides.
#pragma once

#include <cuda_runtime.h>

#include "../core/team.h"

namespace levelset::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <template <typename> class Op, int K, typename A>
__device__ __forceinline__ void warp_reduce(Partial<A, K>& x) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    for (int k = 0; k < K; ++k) {
      x.value[k] = Op<A>::combine(x.value[k], __shfl_xor_sync(kFullWarp, x.value[k], offset));
    }
  }
}

// The 32 threads of one warp.
struct WarpTeam {
  int lane;

  template <template <typename> class Op, int K, typename A, typename Columns, typename Visit>
  __device__ __forceinline__ Partial<A, K> reduce(Columns d, Visit visit) const {
    Partial<A, K> total;
    for (int k = 0; k < K; ++k) total.value[k] = Op<A>::identity();
    for (std::int64_t j = lane; j < d; j += kWarpSize) {
      const Partial<A, K> term = visit(j);
      for (int k = 0; k < K; ++k) total.value[k] = Op<A>::combine(total.value[k], term.value[k]);
    }
    warp_reduce<Op, K>(total);
    return total;
  }

  template <typename Columns, typename Visit>
  __device__ __forceinline__ void for_each(Columns d, Visit visit) const {
    for (std::int64_t j = lane; j < d; j += kWarpSize) visit(j);
  }

  __device__ __forceinline__ bool leads() const { return lane == 0; }
};

// All threads of one block of kThreads.
template <int kThreads>
struct BlockTeam {
  static constexpr int kWarps = kThreads / kWarpSize;

  template <template <typename> class Op, int K, typename A, typename Columns, typename Visit>
  __device__ __forceinline__ Partial<A, K> reduce(Columns d, Visit visit) const {
    __shared__ A shared[kWarps][K];
    const int thread = int(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
    Partial<A, K> total;
    for (int k = 0; k < K; ++k) total.value[k] = Op<A>::identity();
    for (std::int64_t j = thread; j < d; j += kThreads) {
      const Partial<A, K> term = visit(j);
      for (int k = 0; k < K; ++k) total.value[k] = Op<A>::combine(total.value[k], term.value[k]);
    }
    warp_reduce<Op, K>(total);
    if (lane == 0) {
      for (int k = 0; k < K; ++k) shared[warp][k] = total.value[k];
    }
    __syncthreads();
    for (int k = 0; k < K; ++k) {
      total.value[k] = shared[0][k];
      for (int w = 1; w < kWarps; ++w)
        total.value[k] = Op<A>::combine(total.value[k], shared[w][k]);
    }
    // The next reduction may use the same shared memory.
    __syncthreads();
    return total;
  }

  template <typename Columns, typename Visit>
  __device__ __forceinline__ void for_each(Columns d, Visit visit) const {
    for (std::int64_t j = threadIdx.x; j < d; j += kThreads) visit(j);
  }

  __device__ __forceinline__ bool leads() const { return threadIdx.x == 0; }
};

}  // namespace levelset::cuda
