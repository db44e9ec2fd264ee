// One generalized Newton step of one row (Eq. 4), with step cap and box.
#pragma once

#include "params.h"
#include "pinv_row.h"

namespace levelset {

// Moves one point and returns its new status. The values and the Jacobian belong to the point as it
// came in, so a row that is already within tol is left where it is.
template <typename S, typename A, int L, typename Team, typename Columns>
LEVELSET_HD RowStatus newton_row(const Team& team, const NewtonParams<S>& p, std::int64_t row,
                                 std::int64_t point_row, Columns d) {
  const S* point = p.points + point_row * d;
  S* next = p.next + point_row * d;
  const S* level = p.level + point_row * p.level_stride;

  using Pinv = PinvRow<S, A, L, Team, Columns>;
  Pinv pinv(team, p.jacobian + row * p.outputs * d, p.outputs, d);
  A residual[Pinv::kSize];
  A largest = A(0);
  for (int k = 0; k < pinv.outputs(); ++k) {
    residual[k] = load(p.values[row * p.outputs + k]) - load(level[k]);
    largest = MaxKeepingNan<A>::combine(largest, A(fabs(residual[k])));
  }
  RowStatus status = RowStatus::kRunning;
  if (!(largest <= FloatRange<A>::largest)) {
    status = RowStatus::kNonFinite;
  } else if (largest <= A(p.tol)) {
    status = RowStatus::kConverged;
  }

  A shrink = A(1);
  if (status == RowStatus::kRunning) {
    const RowStatus rank = pinv.factorise();
    if (rank != RowStatus::kConverged) {
      status = rank;
    } else {
      const A length = pinv.prepare_apply(residual);
      if (!(length <= FloatRange<A>::largest)) status = RowStatus::kRankDeficient;
      if (length > A(p.max_step)) shrink = A(p.max_step) / length;
    }
  }
  const bool moves = status == RowStatus::kRunning;
  // 1 where a column changed, NaN where it is not finite, else 0.
  const auto visit = [&](std::int64_t j) {
    const S before = point[j];
    S after = before;
    if (moves) {
      A x = load(before) - shrink * pinv.apply(j);
      if (p.lower != nullptr && x < load(p.lower[j])) x = load(p.lower[j]);
      if (p.upper != nullptr && x > load(p.upper[j])) x = load(p.upper[j]);
      after = store<S>(x);
    }
    next[j] = after;
    const A to = load(after);
    const A zero_or_nan = to - to;
    return Partial<A, 1>{{to != load(before) ? A(1) + zero_or_nan : zero_or_nan}};
  };
  const A changed = team.template reduce<MaxKeepingNan, 1, A>(d, visit).value[0];
  if (moves && changed == A(0)) status = RowStatus::kStalled;
  if (changed != changed) status = RowStatus::kNonFinite;
  return status;
}

// The whole update of row i: who it is, whether it takes part, where its result goes.
template <typename S, typename A, int L, typename Team, typename Columns>
LEVELSET_HD void newton_update_row(const Team& team, const NewtonParams<S>& p, std::int64_t i,
                                   Columns d) {
  const std::int64_t point_row = p.index != nullptr ? p.index[i] : i;
  // The CPU glue refuses a bad index before the launch. A GPU cannot without waiting for it, and
  // must not write outside the tensor.
  if (point_row < 0 || point_row >= p.point_rows) return;
  const std::int8_t before =
      p.running != nullptr ? p.running[point_row] : std::int8_t(RowStatus::kRunning);
  if (before != std::int8_t(RowStatus::kRunning)) {
    if (p.next != p.points) {
      team.for_each(
          d, [&](std::int64_t j) { p.next[point_row * d + j] = p.points[point_row * d + j]; });
    }
    if (team.leads()) p.status[point_row] = before;
    return;
  }
  const RowStatus after = newton_row<S, A, L>(team, p, i, point_row, d);
  if (team.leads()) p.status[point_row] = std::int8_t(after);
}

}  // namespace levelset
