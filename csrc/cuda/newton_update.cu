#include "../core/newton_row.h"
#include "rows.cuh"

namespace levelset::cuda {
namespace {

struct NewtonOp {
  template <typename A, int L, typename Team, typename S>
  static __device__ __forceinline__ void run(const Team& team, const NewtonParams<S>& p,
                                             std::int64_t i) {
    newton_update_row<S, A, L>(team, p, i, p.columns);
  }
};

}  // namespace

template <typename S>
cudaError_t newton_update(const NewtonParams<S>& params, RowTeam team, cudaStream_t stream) {
  return launch<NewtonOp>(params, team, stream);
}

template cudaError_t newton_update(const NewtonParams<float>&, RowTeam, cudaStream_t);
template cudaError_t newton_update(const NewtonParams<double>&, RowTeam, cudaStream_t);
template cudaError_t newton_update(const NewtonParams<__half>&, RowTeam, cudaStream_t);
template cudaError_t newton_update(const NewtonParams<__nv_bfloat16>&, RowTeam, cudaStream_t);

}  // namespace levelset::cuda
