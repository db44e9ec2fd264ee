#include "../core/pinv_row.h"
#include "rows.cuh"

namespace levelset::cuda {
namespace {

struct ApplyOp {
  template <typename A, int L, typename Team, typename S>
  static __device__ __forceinline__ void run(const Team& team, const PinvParams<S>& p,
                                             std::int64_t i) {
    pinv_apply_row<S, A, L>(team, p, i, p.columns);
  }
};

}  // namespace

template <typename S>
cudaError_t pinv_apply(const PinvParams<S>& params, RowTeam team, cudaStream_t stream) {
  return launch<ApplyOp>(params, team, stream);
}

template cudaError_t pinv_apply(const PinvParams<float>&, RowTeam, cudaStream_t);
template cudaError_t pinv_apply(const PinvParams<double>&, RowTeam, cudaStream_t);
template cudaError_t pinv_apply(const PinvParams<__half>&, RowTeam, cudaStream_t);
template cudaError_t pinv_apply(const PinvParams<__nv_bfloat16>&, RowTeam, cudaStream_t);

}  // namespace levelset::cuda
