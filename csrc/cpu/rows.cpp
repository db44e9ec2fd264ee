#include "rows.h"

#include "../core/dispatch.h"
#include "../core/newton_row.h"

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

template <typename S>
void pinv_apply(const PinvParams<S>& p, std::int64_t begin, std::int64_t end) {
  specialised(p, [&](auto l, auto d) {
    for (std::int64_t i = begin; i < end; ++i) pinv_apply_row<S, S, l()>(SerialTeam{}, p, i, d);
  });
}

template <typename S>
void pinv_adjoint(const PinvParams<S>& p, std::int64_t begin, std::int64_t end) {
  specialised(p, [&](auto l, auto d) {
    for (std::int64_t i = begin; i < end; ++i) pinv_adjoint_row<S, S, l()>(SerialTeam{}, p, i, d);
  });
}

template <typename S>
void newton_update(const NewtonParams<S>& p, std::int64_t begin, std::int64_t end) {
  specialised(p, [&](auto l, auto d) {
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
