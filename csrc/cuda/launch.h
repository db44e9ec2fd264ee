// CUDA launchers: each enqueues its kernels on `stream` and returns the launch's error code. The
// device must be current. No torch here. S is float, double, __half or __nv_bfloat16.
#pragma once

#include <cuda_runtime.h>

#include "../core/params.h"
#include "mlp_plan.h"

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

// A strided matrix in device memory; `at` is null where it is missing.
struct MlpMatrix {
  const float* at;
  std::int64_t row_stride, column_stride;
};

// One layer, to be packed as mlp_plan has placed it.
struct MlpPackParams {
  int width;                             // W of the plan
  std::int64_t outputs, hidden, inputs;  // as in MlpLayer
  MlpMatrix hidden_matrix;               // W_k, (outputs, hidden)
  MlpMatrix input_matrix;                // U_k, (outputs, inputs)
  const float* bias;                     // (outputs,) or null
  std::int64_t bias_stride;
  float* packed;          // where the layer's bias_at is
  std::uint32_t* coarse;  // where its coarse_forward_at is, or null
};

cudaError_t mlp_pack(const MlpPackParams& params, cudaStream_t stream);

// Newton's iteration from `start`, or, where jacobian is null, F at `start` alone.
struct MlpParams {
  MlpLayer layers[kMlpLayers];
  int count;                    // layers, the linear one at the end among them
  int dimension;                // d
  int outputs;                  // l
  const float* packed;          // parameters
  const std::uint32_t* coarse;  // the same in pairs of bfloat16, for kCoarse, or null
  std::int64_t rows;            // n
  const float* start;           // (n, d); may be the same memory as points, but for kCoarse
  const std::int32_t* begun;    // (n,) updates that rows have behind them, or null for none
  const float* level;           // c, (n, l), or (1, l) with level_stride 0
  std::int64_t level_stride;
  const float* lower;  // (d,) or null
  const float* upper;  // (d,) or null
  std::int64_t max_iters;
  double tol;
  double max_step;
  float* points;             // (n, d)
  float* values;             // (n, l)
  float* jacobian;           // (n, l, d), or null: then neither points, status nor iterations
  std::int8_t* status;       // (n,)
  std::int32_t* iterations;  // (n,)
  float* slopes;             // (blocks, hidden layers, kMlpTile) scratch; unused without jacobian
  unsigned long long* next;  // scratch: the first row that nobody has taken
};

// Bytes of shared memory that a block of the fused kernel may ask for on a device.
cudaError_t mlp_shared_memory(int device, int* bytes);

// Whether kTensor and kCoarse are possible on the current device.
cudaError_t mlp_tensor(const MlpParams& params, const MlpPlan& plan, bool* has);

// Blocks that work on the rows, and for which `slopes` needs room. Also makes the kernel ready for
// its shared memory; an error where this device has not that much. Not for kAuto.
cudaError_t mlp_blocks(const MlpParams& params, const MlpPlan& plan, MlpProduct product,
                       std::int64_t* blocks);

// With kCoarse: one evaluation and one update of every row. Points and iterations are written, and
// may be `start` and `begun` of the launch that follows.
cudaError_t mlp_newton(const MlpParams& params, const MlpPlan& plan, MlpProduct product,
                       std::int64_t blocks, cudaStream_t stream);

using MlpKernel = void (*)(MlpParams);
MlpKernel mlp_tensor_kernel(int width);
MlpKernel mlp_coarse_kernel(int width);

}  // namespace levelset::cuda
