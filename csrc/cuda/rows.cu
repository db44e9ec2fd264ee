#include <algorithm>

#include "../core/dispatch.h"
#include "../core/newton_row.h"
#include "launch.h"
#include "storage.cuh"
#include "team.cuh"

namespace levelset::cuda {
namespace {

// Declared to the compiler with one resident block at least: left to choose, it spills a few registers
// of the Newton kernels for an occupancy that a kernel bound by memory does not need.
constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 1 << 20;  // larger grids loop over rows instead

// The three ops, each as one call for one row. A kernel only finds out which row is whose.
struct ApplyOp {
  template <typename A, int L, typename Team, typename S>
  static __device__ __forceinline__ void run(const Team& team, const PinvParams<S>& p,
                                             std::int64_t i) {
    pinv_apply_row<S, A, L>(team, p, i, p.columns);
  }
};

struct AdjointOp {
  template <typename A, int L, typename Team, typename S>
  static __device__ __forceinline__ void run(const Team& team, const PinvParams<S>& p,
                                             std::int64_t i) {
    pinv_adjoint_row<S, A, L>(team, p, i, p.columns);
  }
};

struct NewtonOp {
  template <typename A, int L, typename Team, typename S>
  static __device__ __forceinline__ void run(const Team& team, const NewtonParams<S>& p,
                                             std::int64_t i) {
    newton_update_row<S, A, L>(team, p, i, p.columns);
  }
};

template <typename Op, typename A, int L, template <typename> class Params, typename S>
__global__ void __launch_bounds__(kThreads, 1) thread_per_row(const Params<S> p) {
  const SerialTeam team;
  const std::int64_t step = std::int64_t(gridDim.x) * kThreads;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.rows; i += step) {
    Op::template run<A, L>(team, p, i);
  }
}

template <typename Op, typename A, int L, template <typename> class Params, typename S>
__global__ void __launch_bounds__(kThreads, 1) warp_per_row(const Params<S> p) {
  const WarpTeam team{int(threadIdx.x) % kWarpSize};
  constexpr int kRows = kThreads / kWarpSize;
  const std::int64_t step = std::int64_t(gridDim.x) * kRows;
  for (std::int64_t i = std::int64_t(blockIdx.x) * kRows + threadIdx.x / kWarpSize; i < p.rows;
       i += step) {
    Op::template run<A, L>(team, p, i);
  }
}

template <typename Op, typename A, int L, template <typename> class Params, typename S>
__global__ void __launch_bounds__(kThreads, 1) block_per_row(const Params<S> p) {
  const BlockTeam<kThreads> team;
  for (std::int64_t i = blockIdx.x; i < p.rows; i += gridDim.x) Op::template run<A, L>(team, p, i);
}

template <typename Kernel, typename P>
cudaError_t enqueue(Kernel kernel, std::int64_t blocks, const P& params, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(std::min(blocks, kMaxBlocks)));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <typename Op, template <typename> class Params, typename S>
cudaError_t launch(const Params<S>& p, RowTeam team, cudaStream_t stream) {
  using A = typename Storage<S>::Arithmetic;
  constexpr int kRowsPerWarpBlock = kThreads / kWarpSize;
  if (p.rows == 0) return cudaSuccess;
  if (team == RowTeam::kAuto) team = choose_team(p.outputs, p.columns);
  const std::int64_t warp_blocks = (p.rows + kRowsPerWarpBlock - 1) / kRowsPerWarpBlock;
  const std::int64_t thread_blocks = (p.rows + kThreads - 1) / kThreads;
  return with_outputs(p.outputs, [&](auto l) {
    constexpr int L = l();
    // For l > 2 the warp is the only team: the factorisation is too large to give every thread one.
    if constexpr (L != kAnyOutputs) {
      if (team == RowTeam::kThread) {
        return enqueue(thread_per_row<Op, A, L, Params, S>, thread_blocks, p, stream);
      }
      if (team == RowTeam::kBlock) {
        return enqueue(block_per_row<Op, A, L, Params, S>, p.rows, p, stream);
      }
    }
    return enqueue(warp_per_row<Op, A, L, Params, S>, warp_blocks, p, stream);
  });
}

}  // namespace

// A thread streams a short row from its own cache lines; past a few lines per thread the loads of
// neighbouring threads no longer share lines and a warp reads the row faster. `levelset-ext bench ops`
// measures the three teams side by side.
RowTeam choose_team(int outputs, std::int64_t columns) {
  constexpr std::int64_t kThreadNumbers = 32, kWarpNumbers = 8192;
  const std::int64_t numbers = outputs * columns;
  if (numbers <= kThreadNumbers) return RowTeam::kThread;
  return numbers <= kWarpNumbers ? RowTeam::kWarp : RowTeam::kBlock;
}

template <typename S>
cudaError_t pinv_apply(const PinvParams<S>& params, RowTeam team, cudaStream_t stream) {
  return launch<ApplyOp>(params, team, stream);
}

template <typename S>
cudaError_t pinv_adjoint(const PinvParams<S>& params, RowTeam team, cudaStream_t stream) {
  return launch<AdjointOp>(params, team, stream);
}

template <typename S>
cudaError_t newton_update(const NewtonParams<S>& params, RowTeam team, cudaStream_t stream) {
  return launch<NewtonOp>(params, team, stream);
}

#define LEVELSET_INSTANTIATE(S)                                                         \
  template cudaError_t pinv_apply(const PinvParams<S>&, RowTeam, cudaStream_t);         \
  template cudaError_t pinv_adjoint(const PinvParams<S>&, RowTeam, cudaStream_t);       \
  template cudaError_t newton_update(const NewtonParams<S>&, RowTeam, cudaStream_t);
LEVELSET_INSTANTIATE(float)
LEVELSET_INSTANTIATE(double)
LEVELSET_INSTANTIATE(__half)
LEVELSET_INSTANTIATE(__nv_bfloat16)
#undef LEVELSET_INSTANTIATE

}  // namespace levelset::cuda
