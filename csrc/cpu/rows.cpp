#include "rows.h"

#include "../core/dispatch.h"
#include "../core/newton_row.h"
#include "vector_kernels.h"

namespace levelset::cpu {

namespace {

// Calls run(outputs, columns) with both as the row math wants them.
template <typename Params, typename Run>
void specialised(const Params& p, Run run) {
  with_outputs(p.outputs, [&](auto l) {
    if constexpr (l() == kAnyOutputs) {
      run(l, p.columns);
    } else {
      with_columns(p.columns, [&](auto d) { run(l, d); });
    }
  });
}

}  // namespace

// The parameters are copied before each loop: the loops write int8_t, which may alias anything that
// has an address outside, and the compiler would load every pointer again for every row.

template <typename S>
void pinv_apply(const PinvParams<S>& params, std::int64_t begin, std::int64_t end) {
  specialised(params, [&](auto l, auto d) {
    const PinvParams<S> p = params;
    for (std::int64_t i = begin; i < end; ++i) pinv_apply_row<S, S, l()>(SerialTeam{}, p, i, d);
  });
}

template <typename S>
void pinv_adjoint(const PinvParams<S>& params, std::int64_t begin, std::int64_t end) {
  specialised(params, [&](auto l, auto d) {
    const PinvParams<S> p = params;
    for (std::int64_t i = begin; i < end; ++i) pinv_adjoint_row<S, S, l()>(SerialTeam{}, p, i, d);
  });
}

template <typename S>
void newton_update(const NewtonParams<S>& params, std::int64_t begin, std::int64_t end) {
  if (params.outputs == 1 && (params.columns == 2 || params.columns == 3)) {
    const VectorKernels<S>& kernels = vector_kernels<S>();
    const auto run = params.columns == 2 ? kernels.newton_plane : kernels.newton_space;
    if (!run(params, begin, end)) return;
    with_columns(params.columns, [&](auto d) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t row = params.index != nullptr ? params.index[i] : i;
        if (row < 0 || row >= params.point_rows || params.status[row] != kIrregularRow) continue;
        NewtonParams<S> p = params;
        p.running = nullptr;  // it runs, and its mark stands where that was said
        newton_update_row<S, S, 1>(SerialTeam{}, p, i, d);
      }
    });
    return;
  }
  specialised(params, [&](auto l, auto d) {
    const NewtonParams<S> p = params;
    for (std::int64_t i = begin; i < end; ++i) newton_update_row<S, S, l()>(SerialTeam{}, p, i, d);
  });
}

template void pinv_apply(const PinvParams<float>&, std::int64_t, std::int64_t);
template void pinv_apply(const PinvParams<double>&, std::int64_t, std::int64_t);
template void pinv_adjoint(const PinvParams<float>&, std::int64_t, std::int64_t);
template void pinv_adjoint(const PinvParams<double>&, std::int64_t, std::int64_t);
template void newton_update(const NewtonParams<float>&, std::int64_t, std::int64_t);
template void newton_update(const NewtonParams<double>&, std::int64_t, std::int64_t);

}  // namespace levelset::cpu
