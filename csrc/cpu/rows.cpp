#include "rows.h"

#include "../core/dispatch.h"
#include "../core/newton_row.h"
#include "vector_kernels.h"

namespace levelset::cpu {

namespace {

// Rows [begin, end) by the vector kernel where it takes them, and by row_math(p, i, l) those that
// it leaves alone, or all. is_left(p, i) tells which it has left.
//
// The parameters are copied: the loops write int8_t, which may alias anything that has an address
// outside, and the compiler would load every pointer again for every row.
template <typename Params, typename Kernel, typename IsLeft, typename RowMath>
void walk(const Params& params, bool covered, Kernel kernel, IsLeft is_left, RowMath row_math,
          std::int64_t begin, std::int64_t end) {
  if (covered && !kernel(params, begin, end)) return;
  with_outputs(params.outputs, [&](auto l) {
    const Params p = params;
    for (std::int64_t i = begin; i < end; ++i) {
      if (!covered || is_left(p, i)) row_math(p, i, l);
    }
  });
}

template <typename S>
bool pinv_left(const PinvParams<S>& p, std::int64_t i) {
  return p.status[i] == kIrregularRow;
}

template <typename S>
bool newton_left(const NewtonParams<S>& p, std::int64_t i) {
  const std::int64_t row = p.index != nullptr ? p.index[i] : i;
  return row >= 0 && row < p.point_rows && p.status[row] == kIrregularRow;
}

}  // namespace

template <typename S>
void pinv_apply(const PinvParams<S>& params, std::int64_t begin, std::int64_t end) {
  const VectorKernels<S>& kernels = vector_kernels<S>();
  walk(
      params, kernels.covers(params.outputs, params.columns), kernels.pinv_apply, pinv_left<S>,
      [](const PinvParams<S>& p, std::int64_t i, auto l) {
        pinv_apply_row<S, S, l()>(SerialTeam{}, p, i, p.columns);
      },
      begin, end);
}

template <typename S>
void pinv_adjoint(const PinvParams<S>& params, std::int64_t begin, std::int64_t end) {
  const VectorKernels<S>& kernels = vector_kernels<S>();
  walk(
      params, kernels.covers(params.outputs, params.columns), kernels.pinv_adjoint, pinv_left<S>,
      [](const PinvParams<S>& p, std::int64_t i, auto l) {
        pinv_adjoint_row<S, S, l()>(SerialTeam{}, p, i, p.columns);
      },
      begin, end);
}

template <typename S>
void newton_update(const NewtonParams<S>& params, std::int64_t begin, std::int64_t end) {
  const VectorKernels<S>& kernels = vector_kernels<S>();
  const bool covered = kernels.covers(params.outputs, params.columns);
  walk(
      params, covered, kernels.newton_update, newton_left<S>,
      [covered](const NewtonParams<S>& p, std::int64_t i, auto l) {
        NewtonParams<S> one = p;
        // A row that was left runs, and its mark stands where that was said.
        if (covered) one.running = nullptr;
        newton_update_row<S, S, l()>(SerialTeam{}, one, i, one.columns);
      },
      begin, end);
}

template void pinv_apply(const PinvParams<float>&, std::int64_t, std::int64_t);
template void pinv_apply(const PinvParams<double>&, std::int64_t, std::int64_t);
template void pinv_adjoint(const PinvParams<float>&, std::int64_t, std::int64_t);
template void pinv_adjoint(const PinvParams<double>&, std::int64_t, std::int64_t);
template void newton_update(const NewtonParams<float>&, std::int64_t, std::int64_t);
template void newton_update(const NewtonParams<double>&, std::int64_t, std::int64_t);

}  // namespace levelset::cpu
