// Kernels and launch of the row ops, the same for all of them. Each op is instantiated in a file of
// its own, so that they compile side by side.
#pragma once

#include <algorithm>

#include "../core/dispatch.h"
#include "launch.h"
#include "storage.cuh"
#include "team.cuh"

namespace levelset::cuda {

// Declared to the compiler with one resident block at least: left to choose, it spills a few
// registers of the Newton kernels for an occupancy that a kernel bound by memory does not need.
constexpr int kRowThreads = 256;
constexpr std::int64_t kMaxRowBlocks = 1 << 20;  // larger grids loop over rows instead

// Op::run<A, L>(team, p, i) does one row. A kernel only finds out which row is whose.
template <typename Op, typename A, int L, template <typename> class Params, typename S>
__global__ void __launch_bounds__(kRowThreads, 1) thread_per_row(const Params<S> p) {
  const SerialTeam team;
  const std::int64_t step = std::int64_t(gridDim.x) * kRowThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kRowThreads + threadIdx.x; i < p.rows;
       i += step) {
    Op::template run<A, L>(team, p, i);
  }
}

template <typename Op, typename A, int L, template <typename> class Params, typename S>
__global__ void __launch_bounds__(kRowThreads, 1) warp_per_row(const Params<S> p) {
  const WarpTeam team{int(threadIdx.x) % kWarpSize};
  constexpr int kRows = kRowThreads / kWarpSize;
  const std::int64_t step = std::int64_t(gridDim.x) * kRows;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kRows + threadIdx.x / kWarpSize; i < p.rows;
       i += step) {
    Op::template run<A, L>(team, p, i);
  }
}

template <typename Op, typename A, int L, template <typename> class Params, typename S>
__global__ void __launch_bounds__(kRowThreads, 1) block_per_row(const Params<S> p) {
  const BlockTeam<kRowThreads> team;
  for (std::int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) Op::template run<A, L>(team, p, i);
}

template <typename Kernel, typename P>
cudaError_t enqueue_rows(Kernel kernel, std::int64_t blocks, const P& params, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(std::min(blocks, kMaxRowBlocks)));
  config.blockDim = dim3(kRowThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <typename Op, template <typename> class Params, typename S>
cudaError_t launch(const Params<S>& p, RowTeam team, cudaStream_t stream) {
  using A = typename Storage<S>::Arithmetic;
  constexpr int kRowsPerWarpBlock = kRowThreads / kWarpSize;
  if (p.rows == 0) return cudaSuccess;
  if (team == RowTeam::kAuto) team = choose_team(p.outputs, p.columns);
  const std::int64_t warp_blocks = (p.rows + kRowsPerWarpBlock - 1) / kRowsPerWarpBlock;
  const std::int64_t thread_blocks = (p.rows + kRowThreads - 1) / kRowThreads;
  return with_outputs(p.outputs, [&](auto l) {
    constexpr int L = l();
    // For l > 2 the warp is the only team: the factorisation is too large to give every thread one.
    if constexpr (L != kAnyOutputs) {
      if (team == RowTeam::kThread) {
        return enqueue_rows(thread_per_row<Op, A, L, Params, S>, thread_blocks, p, stream);
      }
      if (team == RowTeam::kBlock) {
        return enqueue_rows(block_per_row<Op, A, L, Params, S>, p.rows, p, stream);
      }
    }
    return enqueue_rows(warp_per_row<Op, A, L, Params, S>, warp_blocks, p, stream);
  });
}

}  // namespace levelset::cuda
