// One pass of a bracketing root search of one row: F - c has opposite signs at two places of the
// segment from start to end, and every pass evaluates F at one place between them.
//
// Places are parameters s in [0, 1], kept in double whatever the dtype of the points, and a point
// is computed from the segment's ends each time. That costs no digits, as rounding never
// accumulates, and a pass then writes one point instead of moving two.
//
//   regula falsi      the root of the chord; one end may never move
//   bisection         the middle
//   Illinois          regula falsi, with half the value of an end that stays twice
//   Anderson-Bjorck   the same with the factor 1 - F_new / F_before where that is positive; and
//                     the middle where the bracket has not halved in kSlow evaluations: where F is
//                     flat on one side the factor is next to nothing, and the search would creep
//   Chandrupatla      inverse quadratic interpolation where it is safe, else the middle
//
// In every variant a place whose point cannot be told from that of an end is replaced by the
// middle, so that a search cannot stand still while the dtype has points left.
#pragma once

#include <math.h>

#include "limits.h"
#include "params.h"
#include "portability.h"
#include "status.h"
#include "storage.h"
#include "team.h"

namespace levelset {

// Evaluations in a row that fall within the rounding floor without coming closer, after which F is
// taken to be noise there.
constexpr int kFruitless = 3;

// Evaluations that Anderson-Bjorck may take to halve the bracket.
constexpr int kSlow = 3;

// True for finite numbers and false for NaN.
LEVELSET_HD bool is_finite(double x) { return fabs(x) <= FloatRange<double>::largest; }

LEVELSET_HD bool same_sign(double x, double y) { return (x < 0) == (y < 0); }

// fmin and fmax of numbers that are not NaN: a host compiler calls a library for those.
LEVELSET_HD double smaller(double x, double y) { return x < y ? x : y; }
LEVELSET_HD double larger(double x, double y) { return x > y ? x : y; }

// a where `first`, else b. Which end of a segment is the better one is anyone's guess, so on the
// host it is looked up: a jump would be guessed wrong every other time.
LEVELSET_HD double pick(bool first, double a, double b) {
#if defined(__CUDA_ARCH__)
  return first ? a : b;
#else
  const double both[2] = {b, a};
  return both[first];
#endif
}

// The two ends have opposite residuals, neither of them zero.
class BracketSearch {
 public:
  // Of a row that begins.
  LEVELSET_HD BracketSearch(double level, BracketVariant variant)
      : level_(level), variant_(variant) {}

  // Of one that goes on.
  LEVELSET_HD BracketSearch(const BracketRow& row, double level, BracketVariant variant)
      : row_(row), level_(level), variant_(variant) {}

  LEVELSET_HD const BracketRow& row() const { return row_; }

  // Begins with F at s = 0 and at s = 1. Unless kRunning comes back, row().at is the answer.
  LEVELSET_HD RowStatus begin(double at_start, double at_end, double tol, double rounding) {
    const double start = at_start - level_, end = at_end - level_;
    const bool end_is_best = is_finite(start) && (!is_finite(end) || fabs(end) < fabs(start));
    row_.contra = {pick(end_is_best, 0, 1), pick(end_is_best, at_start, at_end)};
    row_.newest = {pick(end_is_best, 1, 0), pick(end_is_best, at_end, at_start)};
    row_.previous = row_.contra;
    row_.scale = row_.width = 1.0;
    row_.fruitless = row_.slow = 0;
    row_.at = row_.newest.at;
    row_.floor = rounding * larger(fabs(level_), smaller(fabs(at_start), fabs(at_end)));
    if (!is_finite(start) || !is_finite(end)) return RowStatus::kNonFinite;
    if (residual(row_.newest) <= tol) return RowStatus::kConverged;
    if (same_sign(start, end)) return RowStatus::kNotBracketed;
    choose();
    return RowStatus::kRunning;
  }

  // Takes F at row().at.
  LEVELSET_HD RowStatus advance(double value, double tol) {
    const BracketPlace found{row_.at, value};
    const double r = value - level_;
    if (!is_finite(r)) return finish(found, RowStatus::kNonFinite);
    if (fabs(r) <= tol) return finish(found, RowStatus::kConverged);
    const double best = residual(nearer());
    if (fabs(r) < best) {
      row_.fruitless = 0;
    } else if (fabs(r) <= row_.floor) {
      row_.fruitless += 1;
    }
    const double before = row_.newest.value - level_;
    if (same_sign(r, before)) {
      const double factor = 1 - r / before;
      if (variant_ == BracketVariant::kIllinois) row_.scale *= 0.5;
      if (variant_ == BracketVariant::kAndersonBjorck) row_.scale *= factor > 0 ? factor : 0.5;
      row_.previous = row_.newest;
    } else {
      row_.previous = row_.contra;
      row_.contra = row_.newest;
      row_.scale = 1;
    }
    row_.newest = found;
    if (row_.fruitless >= kFruitless) return stop(RowStatus::kStalled);
    choose();
    return RowStatus::kRunning;
  }

  // Ends the search at the better one of the two ends.
  LEVELSET_HD RowStatus stop(RowStatus status) { return finish(nearer(), status); }

  LEVELSET_HD double middle() const {
    return row_.newest.at + 0.5 * (row_.contra.at - row_.newest.at);
  }

  LEVELSET_HD void go_to(double at) { row_.at = at; }

 private:
  LEVELSET_HD double residual(const BracketPlace& place) const {
    return fabs(place.value - level_);
  }

  LEVELSET_HD BracketPlace nearer() const {
    return residual(row_.contra) < residual(row_.newest) ? row_.contra : row_.newest;
  }

  LEVELSET_HD RowStatus finish(const BracketPlace& place, RowStatus status) {
    row_.newest = place;
    row_.at = place.at;
    return status;
  }

  // The next place, strictly between the two ends where double can tell. Written so that an
  // overflow gives a NaN or an end, which the middle then replaces.
  LEVELSET_HD void choose() {
    const double f1 = row_.newest.value - level_, f2 = row_.contra.value - level_;
    const double width = fabs(row_.contra.at - row_.newest.at);
    const bool halved = width <= 0.5 * row_.width;
    if (halved) row_.width = width;
    row_.slow = halved ? 0 : row_.slow + 1;
    const bool creeps = variant_ == BracketVariant::kAndersonBjorck && row_.slow > kSlow;
    double t = 0.5;
    if (variant_ == BracketVariant::kChandrupatla) {
      t = interpolate(f1, f2, row_.previous.value - level_);
    } else if (variant_ != BracketVariant::kBisection && !creeps) {
      t = f1 / (f1 - row_.scale * f2);
    }
    row_.at = row_.newest.at + t * (row_.contra.at - row_.newest.at);
    const double low = smaller(row_.newest.at, row_.contra.at);
    const double high = larger(row_.newest.at, row_.contra.at);
    if (!(row_.at > low && row_.at < high)) row_.at = middle();
  }

  // Chandrupatla's criterion: the inverse quadratic through three places is used where it is
  // monotone between the two ends.
  LEVELSET_HD double interpolate(double f1, double f2, double f3) const {
    const double x1 = row_.newest.at, x2 = row_.contra.at, x3 = row_.previous.at;
    if (x3 == x2) return 0.5;  // only two places are known yet
    const double xi = (x1 - x2) / (x3 - x2), phi = (f1 - f2) / (f3 - f2);
    if (!(phi * phi < xi && (1 - phi) * (1 - phi) < 1 - xi)) return 0.5;
    return f1 / (f2 - f1) * (f3 / (f2 - f3)) +
           (x3 - x1) / (x2 - x1) * (f1 / (f3 - f1)) * (f2 / (f3 - f2));
  }

  BracketRow row_;
  double level_;
  BracketVariant variant_;
};

// The point at s, exactly the end at s = 0 and s = 1, and never outside of the two.
template <typename S>
struct SegmentPoint {
  double weight;
  bool from_end;

  LEVELSET_HD explicit SegmentPoint(double s) : weight(s <= 0.5 ? s : 1 - s), from_end(s > 0.5) {}

  LEVELSET_HD S operator()(S start, S end) const {
    const S near = from_end ? end : start;
    if (weight == 0) return near;
    const double x = double(load(near)), y = double(load(from_end ? start : end));
    return store<S>(typename Storage<S>::Arithmetic(x + weight * (y - x)));
  }
};

// What row `row` knows after it took the values in place i, and its status; row().at is where its
// point should be.
template <typename S>
LEVELSET_HD BracketSearch bracket_learn(const BracketParams<S>& p, std::int64_t i, std::int64_t row,
                                        RowStatus& status) {
  const double level = double(load(p.level[row * p.level_stride]));
  BracketSearch search =
      p.begins ? BracketSearch(level, p.variant) : BracketSearch(p.bracket[row], level, p.variant);
  if (p.begins) {
    status = search.begin(double(load(p.values[2 * i])), double(load(p.values[2 * i + 1])), p.tol,
                          p.rounding);
  } else {
    status = search.advance(double(load(p.values[i])), p.tol);
  }
  if (p.last && status == RowStatus::kRunning) status = search.stop(RowStatus::kMaxIterations);
  return search;
}

// Moves the point of `row` there. A place that cannot be told from an end is replaced by the middle
// of the bracket, and where that is none either the search ends.
template <typename S, typename A, typename Team, typename Columns>
LEVELSET_HD RowStatus bracket_move(const Team& team, const BracketParams<S>& p, std::int64_t row,
                                   BracketSearch& search, RowStatus status, Columns d) {
  const S* start = p.start + row * d;
  const S* end = p.end + row * d;
  S* point = p.points + row * d;
  for (bool halved = false;; halved = true) {
    const SegmentPoint<S> next(search.row().at);
    const SegmentPoint<S> newest(search.row().newest.at), contra(search.row().contra.at);
    // For each end 1 where a column of the next point differs from it; NaN where it is not finite.
    const auto visit = [&](std::int64_t j) {
      const S a = start[j], b = end[j];
      const S x = next(a, b);
      point[j] = x;
      const A to = load(x);
      const A zero_or_nan = to - to;
      return Partial<A, 2>{{to != load(newest(a, b)) ? A(1) + zero_or_nan : zero_or_nan,
                            to != load(contra(a, b)) ? A(1) + zero_or_nan : zero_or_nan}};
    };
    const Partial<A, 2> differs = team.template reduce<MaxKeepingNan, 2, A>(d, visit);
    if (differs.value[0] != differs.value[0] || differs.value[1] != differs.value[1]) {
      return RowStatus::kNonFinite;
    }
    if (status != RowStatus::kRunning) return status;
    if (differs.value[0] > A(0) && differs.value[1] > A(0)) return status;
    // The interval may still be wide: then the middle is a new point.
    const double middle = search.middle();
    if (!halved && search.row().at != middle) {
      search.go_to(middle);
    } else {
      status = search.stop(RowStatus::kStalled);
    }
  }
}

// Which row takes the values in place i, or -1 if none does. As in the Newton update the CPU glue
// refuses a bad index, a GPU leaves it out.
template <typename S>
LEVELSET_HD std::int64_t bracket_row_of(const BracketParams<S>& p, std::int64_t i) {
  const std::int64_t row = p.index != nullptr ? p.index[i] : i;
  if (row < 0 || row >= p.point_rows) return -1;
  return p.status[row] == std::int8_t(RowStatus::kRunning) ? row : -1;
}

// The whole update of row i: who it is, whether it takes part, what it learns, where it goes.
template <typename S, typename A, typename Team, typename Columns>
LEVELSET_HD void bracket_update_row(const Team& team, const BracketParams<S>& p, std::int64_t i,
                                    Columns d) {
  const std::int64_t row = bracket_row_of(p, i);
  if (row < 0) return;
  RowStatus status;
  BracketSearch search = bracket_learn(p, i, row, status);
  status = bracket_move<S, A>(team, p, row, search, status, d);
  if (team.leads()) {
    p.bracket[row] = search.row();
    p.status[row] = std::int8_t(status);
  }
}

}  // namespace levelset
