// The pseudo-inverse of one row's Jacobian J (l x d), the only place where (J J^T)^-1 is written.
//
//   apply   y = J^T (J J^T)^-1 r      adjoint   s = (J J^T)^-1 J g
//
// Every row of J is first divided by its length, u_k = j_k / |j_k|, so that differently scaled
// outputs cost no digits and squares cannot overflow. Then
//   l = 1   the closed form of Eq. 5;
//   l = 2   w = u_2 - (u_1 . u_2) u_1: the two rows are orthogonalised. The Gram determinant
//           1 - (u_1 . u_2)^2 would cancel in float32;
//   l > 2   Cholesky of the Gram matrix of the u_k, accumulated in double, where products of
//           float32 numbers are exact. A pivot that cancels is measured on the rows themselves.
#pragma once

#include <math.h>

#include "limits.h"
#include "params.h"
#include "portability.h"
#include "status.h"
#include "storage.h"
#include "team.h"

namespace levelset {

// 1 / |j| of one row, or why there is none. `at(j)` returns column j in arithmetic type A.
template <typename A, typename Team, typename Columns, typename At>
LEVELSET_HD RowStatus inverse_norm(const Team& team, Columns d, At at, A& inverse) {
  const A squares = team.template reduce<Sum, 1, A>(d,
                                                    [&](std::int64_t j) {
                                                      const A x = at(j);
                                                      return Partial<A, 1>{{x * x}};
                                                    })
                        .value[0];
  if (squares > FloatRange<A>::squares_low && squares < FloatRange<A>::squares_high) {
    inverse = A(1) / sqrt(squares);
    return RowStatus::kConverged;
  }
  const A largest = team.template reduce<MaxKeepingNan, 1, A>(
                            d, [&](std::int64_t j) { return Partial<A, 1>{{A(fabs(at(j)))}}; })
                        .value[0];
  inverse = A(0);
  if (!(largest <= FloatRange<A>::largest)) return RowStatus::kNonFinite;
  if (largest == A(0)) return RowStatus::kRankDeficient;
  const A scaled = team.template reduce<Sum, 1, A>(d,
                                                   [&](std::int64_t j) {
                                                     const A x = at(j) / largest;
                                                     return Partial<A, 1>{{x * x}};
                                                   })
                       .value[0];
  const A norm = largest * sqrt(scaled);
  if (!(norm <= FloatRange<A>::largest)) return RowStatus::kNonFinite;
  if (norm < FloatRange<A>::smallest_normal) return RowStatus::kRankDeficient;
  inverse = A(1) / norm;
  return RowStatus::kConverged;
}

// Factorisation of one row, ready for apply and adjoint. L is 1, 2 or kAnyOutputs and `outputs` is
// l; Columns is std::int64_t or FixedColumns.
template <typename S, typename A, int L, typename Team, typename Columns>
class PinvRow {
 public:
  static constexpr int kSize = L == kAnyOutputs ? kMaxOutputs : L;

  LEVELSET_HD PinvRow(const Team& team, const S* jacobian, int outputs, Columns d)
      : team_(team), jacobian_(jacobian), d_(d), outputs_(outputs) {}

  LEVELSET_HD int outputs() const { return L == kAnyOutputs ? outputs_ : L; }

  LEVELSET_HD RowStatus factorise() {
    for (int k = 0; k < outputs(); ++k) {
      const RowStatus status = inverse_norm<A>(
          team_, d_, [&](std::int64_t j) { return load(jacobian_[k * d_ + j]); }, inverse_[k]);
      if (status != RowStatus::kConverged) return status;
    }
    if constexpr (L == 1) return RowStatus::kConverged;
    if constexpr (L == 2) return orthogonalise();
    if constexpr (L == kAnyOutputs) return cholesky();
  }

  // Finds the weights of y = sum_k weight_k basis_k for apply(j), and returns |y|.
  LEVELSET_HD A prepare_apply(const A (&r)[kSize]) {
    if constexpr (L == 1) {
      weight_[0] = r[0] * inverse_[0];
      return A(fabs(weight_[0]));
    } else if constexpr (L == 2) {
      weight_[0] = r[0] * inverse_[0];
      weight_[1] = (r[1] * inverse_[1] - cosine_ * weight_[0]) * inverse_residue_;
      // |basis_1| = 1 and |basis_2|^2 = |w|^2 = 1 / inverse_residue_. The square of a long step may
      // overflow where the step itself does not.
      return A(hypot(weight_[0], weight_[1] / A(sqrt(inverse_residue_))));
    } else {
      double rhs[kSize], solution[kSize], largest = 0;
      for (int k = 0; k < outputs_; ++k) {
        rhs[k] = double(r[k]) * double(inverse_[k]);
        if (fabs(rhs[k]) > largest) largest = fabs(rhs[k]);
      }
      solve(rhs, solution);
      // In units of the largest: the square of a long step may overflow where the step does not.
      const double unit = largest > 0 && largest <= FloatRange<double>::largest ? largest : 1.0;
      double squares = 0;
      for (int k = 0; k < outputs_; ++k) {
        squares += rhs[k] / unit * (solution[k] / unit);
        weight_[k] = A(solution[k]);
      }
      // Rounding may leave a tiny negative number; a NaN must stay one.
      return A(unit * sqrt(squares < 0 ? 0.0 : squares));
    }
  }

  // Column j of y, after prepare_apply.
  LEVELSET_HD A apply(std::int64_t j) const {
    if constexpr (L == 1) {
      return weight_[0] * unit(0, j);
    } else if constexpr (L == 2) {
      const A first = unit(0, j);
      return weight_[0] * first + weight_[1] * (unit(1, j) - cosine_ * first);
    } else {
      A y = A(0);
      for (int k = 0; k < outputs_; ++k) y += weight_[k] * unit(k, j);
      return y;
    }
  }

  // s = (J J^T)^-1 J g, the same on every member of the team. `at(j)` returns column j of g.
  template <typename At>
  LEVELSET_HD void adjoint(At at, A (&s)[kSize]) const {
    if constexpr (L == 1) {
      s[0] = team_
                 .template reduce<Sum, 1, A>(
                     d_, [&](std::int64_t j) { return Partial<A, 1>{{unit(0, j) * at(j)}}; })
                 .value[0];
    } else if constexpr (L == 2) {
      const Partial<A, 2> dot = team_.template reduce<Sum, 2, A>(d_, [&](std::int64_t j) {
        const A first = unit(0, j), g = at(j);
        return Partial<A, 2>{{first * g, (unit(1, j) - cosine_ * first) * g}};
      });
      s[1] = dot.value[1] * inverse_residue_;
      s[0] = dot.value[0] - cosine_ * s[1];
    } else {
      const auto dot = dots([&](std::int64_t j) { return double(at(j)); }, outputs_);
      double solution[kSize];
      solve(dot.value, solution);
      for (int k = 0; k < outputs_; ++k) s[k] = A(solution[k]);
    }
    for (int k = 0; k < outputs(); ++k) s[k] *= inverse_[k];
  }

 private:
  LEVELSET_HD A unit(int k, std::int64_t j) const {
    return load(jacobian_[k * d_ + j]) * inverse_[k];
  }

  // The same without rounding when A is float.
  LEVELSET_HD double wide_unit(int k, std::int64_t j) const {
    return double(load(jacobian_[k * d_ + j])) * double(inverse_[k]);
  }

  LEVELSET_HD RowStatus orthogonalise() {
    cosine_ = team_
                  .template reduce<Sum, 1, A>(
                      d_, [&](std::int64_t j) { return Partial<A, 1>{{unit(0, j) * unit(1, j)}}; })
                  .value[0];
    // A second sweep removes what rounding left of u_1 in w, and measures w.
    const Partial<A, 2> sweep = team_.template reduce<Sum, 2, A>(d_, [&](std::int64_t j) {
      const A first = unit(0, j);
      const A w = unit(1, j) - cosine_ * first;
      return Partial<A, 2>{{first * w, w * w}};
    });
    cosine_ += sweep.value[0];
    const A squares = sweep.value[1] - sweep.value[0] * sweep.value[0];
    const A tolerance = RankTolerance<A>::value;
    if (!(squares > tolerance * tolerance)) return RowStatus::kRankDeficient;
    inverse_residue_ = A(1) / squares;
    return RowStatus::kConverged;
  }

  // u_k . x for the first `count` rows, in one pass and in double.
  template <typename At>
  LEVELSET_HD Partial<double, kSize> dots(At at, int count) const {
    return team_.template reduce<Sum, kSize, double>(d_, [&](std::int64_t j) {
      const double x = at(j);
      Partial<double, kSize> term;
      for (int k = 0; k < kSize; ++k) term.value[k] = k < count ? wide_unit(k, j) * x : 0.0;
      return term;
    });
  }

  LEVELSET_HD RowStatus cholesky() {
    // Pivot a is the squared length of the part of u_a that is orthogonal to the rows before it,
    // which is what the rank rule asks for. The diagonal is summed too: the u_k have length 1 only
    // up to the rounding of inverse_, which in float32 is far more than the smallest pivot.
    const double tolerance = double(RankTolerance<A>::value);
    constexpr double kFarApart = 1.0 / 64;
    bool far_apart = true;
    for (int a = 0; a < outputs_; ++a) {
      const auto gram = dots([&](std::int64_t j) { return wide_unit(a, j); }, a + 1);
      double pivot = gram.value[a];
      for (int b = 0; b < a; ++b) {
        double x = gram.value[b];
        for (int c = 0; c < b; ++c) x -= factor_[a][c] * factor_[b][c];
        x /= factor_[b][b];
        factor_[a][b] = x;
        pivot -= x * x;
      }
      // The difference is right to the last digits but those that the pivots so far have cancelled.
      far_apart = far_apart && pivot > kFarApart;
      if (!far_apart && a > 0) pivot = measure_pivot(a);
      if (!(pivot > tolerance * tolerance)) return RowStatus::kRankDeficient;
      factor_[a][a] = sqrt(pivot);
    }
    return RowStatus::kConverged;
  }

  // Pivot a from the orthogonal part w of u_a itself, as for l = 2: its length is measured, and
  // what rounding left of the earlier rows in it is moved to their entries of the factor.
  LEVELSET_HD double measure_pivot(int a) {
    double along[kSize];
    for (int b = a - 1; b >= 0; --b) {
      double x = factor_[a][b];
      for (int c = b + 1; c < a; ++c) x -= factor_[c][b] * along[c];
      along[b] = x / factor_[b][b];
    }
    const auto sweep = team_.template reduce<Sum, kSize, double>(d_, [&](std::int64_t j) {
      double w = wide_unit(a, j);
      for (int b = 0; b < a; ++b) w -= along[b] * wide_unit(b, j);
      Partial<double, kSize> term;
      for (int k = 0; k < kSize; ++k) term.value[k] = k < a ? wide_unit(k, j) * w : 0.0;
      term.value[a] = w * w;
      return term;
    });
    double squares = sweep.value[a];
    for (int b = 0; b < a; ++b) {
      double x = sweep.value[b];
      for (int c = 0; c < b; ++c) x -= factor_[b][c] * along[c];
      x /= factor_[b][b];
      along[b] = x;
      factor_[a][b] += x;
      squares -= x * x;
    }
    return squares;
  }

  // Solves with the Gram matrix: forward, then backward substitution.
  LEVELSET_HD void solve(const double (&rhs)[kSize], double (&x)[kSize]) const {
    for (int a = 0; a < outputs_; ++a) {
      double y = rhs[a];
      for (int b = 0; b < a; ++b) y -= factor_[a][b] * x[b];
      x[a] = y / factor_[a][a];
    }
    for (int a = outputs_ - 1; a >= 0; --a) {
      double y = x[a];
      for (int b = a + 1; b < outputs_; ++b) y -= factor_[b][a] * x[b];
      x[a] = y / factor_[a][a];
    }
  }

  static constexpr int kFactor = L == kAnyOutputs ? kMaxOutputs : 1;

  const Team& team_;
  const S* jacobian_;
  Columns d_;
  int outputs_;
  A inverse_[kSize] = {};            // 1 / |j_k|
  A weight_[kSize] = {};             // set by prepare_apply
  A cosine_ = A(0);                  // l = 2: u_1 . u_2
  A inverse_residue_ = A(0);         // l = 2: 1 / |w|^2
  double factor_[kFactor][kFactor];  // l > 2: lower Cholesky factor of the Gram matrix
};

template <typename S, typename A, int L, typename Team, typename Columns>
LEVELSET_HD void pinv_apply_row(const Team& team, const PinvParams<S>& p, std::int64_t i,
                                Columns d) {
  using Pinv = PinvRow<S, A, L, Team, Columns>;
  Pinv pinv(team, p.jacobian + i * p.outputs * d, p.outputs, d);
  const RowStatus status = pinv.factorise();
  S* y = p.output + i * d;
  if (status == RowStatus::kConverged) {
    A residual[Pinv::kSize];
    for (int k = 0; k < pinv.outputs(); ++k) residual[k] = load(p.input[i * p.outputs + k]);
    pinv.prepare_apply(residual);
    team.for_each(d, [&](std::int64_t j) { y[j] = store<S>(pinv.apply(j)); });
  } else {
    team.for_each(d, [&](std::int64_t j) { y[j] = store<S>(A(0)); });
  }
  if (team.leads()) p.status[i] = std::int8_t(status);
}

template <typename S, typename A, int L, typename Team, typename Columns>
LEVELSET_HD void pinv_adjoint_row(const Team& team, const PinvParams<S>& p, std::int64_t i,
                                  Columns d) {
  using Pinv = PinvRow<S, A, L, Team, Columns>;
  Pinv pinv(team, p.jacobian + i * p.outputs * d, p.outputs, d);
  const RowStatus status = pinv.factorise();
  const S* g = p.input + i * d;
  A s[Pinv::kSize];
  if (status == RowStatus::kConverged) {
    pinv.adjoint([&](std::int64_t j) { return load(g[j]); }, s);
  } else {
    for (int k = 0; k < pinv.outputs(); ++k) s[k] = A(0);
  }
  if (team.leads()) {
    for (int k = 0; k < pinv.outputs(); ++k) p.output[i * p.outputs + k] = store<S>(s[k]);
    p.status[i] = std::int8_t(status);
  }
}

}  // namespace levelset
