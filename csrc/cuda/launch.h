// CUDA launchers: each enqueues its kernels on `stream` and returns the launch's error code. The
// device must be current. No torch here. S is float, double, __half or __nv_bfloat16.
#pragma once

#include <cuda_runtime.h>

#include "../core/params.h"

namespace levelset::cuda {

// Who works on one row.
enum class RowTeam { kAuto = 0, kThread = 1, kWarp = 2, kBlock = 3 };

// The team that kAuto picks. A thread streams a short row from its own cache lines; past a few
// lines per thread the loads of neighbouring threads no longer share lines and a warp reads the row
// faster. The two limits follow from the sizes of a cache line and of a block and have not been
// measured yet: benchmarks/gpu_ops.py times the three teams side by side over d.
inline RowTeam choose_team(int outputs, std::int64_t columns) {
  constexpr std::int64_t kThreadNumbers = 32, kWarpNumbers = 8192;
  const std::int64_t numbers = outputs * columns;
  if (numbers <= kThreadNumbers) return RowTeam::kThread;
  return numbers <= kWarpNumbers ? RowTeam::kWarp : RowTeam::kBlock;
}

template <typename S>
cudaError_t pinv_apply(const PinvParams<S>& params, RowTeam team, cudaStream_t stream);

template <typename S>
cudaError_t pinv_adjoint(const PinvParams<S>& params, RowTeam team, cudaStream_t stream);

template <typename S>
cudaError_t newton_update(const NewtonParams<S>& params, RowTeam team, cudaStream_t stream);

template <typename S>
cudaError_t bracket_update(const BracketParams<S>& params, RowTeam team, cudaStream_t stream);

// Parts to cut a cloud into so that a small batch of queries still fills the device.
std::int64_t nearest_splits(std::int64_t queries, std::int64_t cloud_size);

template <typename S>
cudaError_t nearest(const NearestParams<S>& params, cudaStream_t stream);

}  // namespace levelset::cuda
