#include "../core/bracket_row.h"
#include "rows.cuh"

namespace levelset::cuda {
namespace {

struct BracketOp {
  template <typename A, int, typename Team, typename S>
  static __device__ __forceinline__ void run(const Team& team, const BracketParams<S>& p,
                                             std::int64_t i) {
    bracket_update_row<S, A>(team, p, i, p.columns);
  }
};

}  // namespace

template <typename S>
cudaError_t bracket_update(const BracketParams<S>& p, RowTeam team, cudaStream_t stream) {
  using A = typename Storage<S>::Arithmetic;
  if (p.rows == 0) return cudaSuccess;
  // A row is three vectors: start, end and point.
  if (team == RowTeam::kAuto) team = choose_team(3, p.columns);
  const auto blocks = [&](std::int64_t rows) { return (p.rows + rows - 1) / rows; };
  switch (team) {
    case RowTeam::kThread:
      return enqueue_rows(thread_per_row<BracketOp, A, 1, BracketParams, S>, blocks(kRowThreads), p,
                          stream);
    case RowTeam::kWarp:
      return enqueue_rows(warp_per_row<BracketOp, A, 1, BracketParams, S>,
                          blocks(kRowThreads / kWarpSize), p, stream);
    default:
      return enqueue_rows(block_per_row<BracketOp, A, 1, BracketParams, S>, blocks(1), p, stream);
  }
}

template cudaError_t bracket_update(const BracketParams<float>&, RowTeam, cudaStream_t);
template cudaError_t bracket_update(const BracketParams<double>&, RowTeam, cudaStream_t);
template cudaError_t bracket_update(const BracketParams<__half>&, RowTeam, cudaStream_t);
template cudaError_t bracket_update(const BracketParams<__nv_bfloat16>&, RowTeam, cudaStream_t);

}  // namespace levelset::cuda
