#include "../core/pinv_row.h"
#include "rows.cuh"

namespace levelset::cuda {
namespace {

struct AdjointOp {
  template <typename A, int L, typename Team, typename S>
  static __device__ __forceinline__ void run(const Team& team, const PinvParams<S>& p,
                                             std::int64_t i) {
    pinv_adjoint_row<S, A, L>(team, p, i, p.columns);
  }
};

}  // namespace

template <typename S>
cudaError_t pinv_adjoint(const PinvParams<S>& params, RowTeam team, cudaStream_t stream) {
  return launch<AdjointOp>(params, team, stream);
}

template cudaError_t pinv_adjoint(const PinvParams<float>&, RowTeam, cudaStream_t);
template cudaError_t pinv_adjoint(const PinvParams<double>&, RowTeam, cudaStream_t);
template cudaError_t pinv_adjoint(const PinvParams<__half>&, RowTeam, cudaStream_t);
template cudaError_t pinv_adjoint(const PinvParams<__nv_bfloat16>&, RowTeam, cudaStream_t);

}  // namespace levelset::cuda
