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
  if (status != RowStatus::kRunning) {
    // NaN where the point itself is not finite, else 0.
    const A spoiled = team.template reduce<Sum, 1, A>(d,
                                                      [&](std::int64_t j) {
                                                        const S x = point[j];
                                                        next[j] = x;
                                                        return Partial<A, 1>{{load(x) - load(x)}};
                                                      })
                          .value[0];
    return spoiled == A(0) ? status : RowStatus::kNonFinite;
  }
  // Two sums: columns that changed, and 0 or NaN for columns that are finite, before and after, or
  // not: a box would clamp an infinite one.
  const bool boxed = p.lower != nullptr || p.upper != nullptr;
  const auto land = [&](std::int64_t j, A x) {
    const S after = store<S>(x);
    const A from = load(point[j]), to = load(after);
    next[j] = after;
    return Partial<A, 2>{{to != from ? A(1) : A(0), (to - to) + (from - from)}};
  };
  const Partial<A, 2> landed =
      boxed ? team.template reduce<Sum, 2, A>(d,
                                              [&](std::int64_t j) {
                                                A x = load(point[j]) - shrink * pinv.apply(j);
                                                if (p.lower != nullptr && x < load(p.lower[j]))
                                                  x = load(p.lower[j]);
                                                if (p.upper != nullptr && x > load(p.upper[j]))
                                                  x = load(p.upper[j]);
                                                return land(j, x);
                                              })
            : team.template reduce<Sum, 2, A>(d, [&](std::int64_t j) {
                return land(j, load(point[j]) - shrink * pinv.apply(j));
              });
  if (landed.value[1] != A(0)) return RowStatus::kNonFinite;
  return landed.value[0] > A(0) ? RowStatus::kRunning : RowStatus::kStalled;
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

// A row whose last update was its last, judged by F at its point.
template <typename S>
LEVELSET_HD RowStatus last_verdict(const S* values, const S* level, int outputs, const S* point,
                                   std::int64_t d, double tol) {
  using A = typename Storage<S>::Arithmetic;
  A largest = A(0);
  for (int o = 0; o < outputs; ++o) {
    largest = MaxKeepingNan<A>::combine(largest, A(fabs(load(values[o]) - load(level[o]))));
  }
  bool finite = largest <= FloatRange<A>::largest;
  for (std::int64_t j = 0; j < d; ++j) finite = finite && load(point[j]) - load(point[j]) == A(0);
  if (!finite) return RowStatus::kNonFinite;
  return largest <= A(tol) ? RowStatus::kConverged : RowStatus::kMaxIterations;
}

}  // namespace levelset
