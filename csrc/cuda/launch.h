// CUDA launchers: each enqueues its kernels on `stream` and returns the launch's error code. The device
// must be current. No torch here. S is float, double, __half or __nv_bfloat16.
#pragma once

#include <cuda_runtime.h>

#include "../core/params.h"

namespace levelset::cuda {

// Who works on one row.
enum class RowTeam { kAuto = 0, kThread = 1, kWarp = 2, kBlock = 3 };

// The team that kAuto picks for rows of l * d numbers.
RowTeam choose_team(int outputs, std::int64_t columns);

template <typename S>
cudaError_t pinv_apply(const PinvParams<S>& params, RowTeam team, cudaStream_t stream);

template <typename S>
cudaError_t pinv_adjoint(const PinvParams<S>& params, RowTeam team, cudaStream_t stream);

template <typename S>
cudaError_t newton_update(const NewtonParams<S>& params, RowTeam team, cudaStream_t stream);

// Parts to cut a cloud into so that a small batch of queries still fills the device.
std::int64_t nearest_splits(std::int64_t queries, std::int64_t cloud_size);

template <typename S>
cudaError_t nearest(const NearestParams<S>& params, cudaStream_t stream);

}  // namespace levelset::cuda
