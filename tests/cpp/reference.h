// The pseudo-inverse written a second time, for the tests: modified Gram-Schmidt of the rows, done
// twice, in long double. It shares neither the formulas nor the code of csrc/core.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace reference {

using Real = long double;
using Vector = std::vector<Real>;

inline Real dot(const Real* a, const Real* b, std::int64_t d) {
  Real sum = 0;
  for (std::int64_t j = 0; j < d; ++j) sum += a[j] * b[j];
  return sum;
}

inline Real norm(const Vector& x) {
  return std::sqrt(dot(x.data(), x.data(), std::int64_t(x.size())));
}

// |x - y| / |y|, or |x| where y is zero.
inline Real relative_error(const Vector& x, const Vector& y) {
  Vector difference(x.size());
  for (std::size_t j = 0; j < x.size(); ++j) difference[j] = x[j] - y[j];
  const Real length = norm(y);
  return length > 0 ? norm(difference) / length : norm(difference);
}

// J = R^T Q with orthonormal rows in Q (l x d) and R upper triangular (l x l).
struct Factor {
  int l;
  std::int64_t d;
  Vector q, r;
  // The smallest part of a row that is orthogonal to the rows before it, relative to the row.
  Real smallest_part = 1;

  template <typename S>
  Factor(const S* jacobian, int outputs, std::int64_t columns) : l(outputs), d(columns) {
    q.resize(std::size_t(l * d));
    r.assign(std::size_t(l * l), 0);
    for (std::int64_t i = 0; i < l * d; ++i) q[std::size_t(i)] = Real(jacobian[i]);
    for (int k = 0; k < l; ++k) {
      Real* row = q.data() + k * d;
      const Real length = std::sqrt(dot(row, row, d));
      for (int pass = 0; pass < 2; ++pass) {
        for (int m = 0; m < k; ++m) {
          const Real* other = q.data() + m * d;
          const Real along = dot(other, row, d);
          r[std::size_t(m * l + k)] += along;
          for (std::int64_t j = 0; j < d; ++j) row[j] -= along * other[j];
        }
      }
      const Real rest = std::sqrt(dot(row, row, d));
      r[std::size_t(k * l + k)] = rest;
      if (k > 0) smallest_part = std::min(smallest_part, length > 0 ? rest / length : Real(0));
      for (std::int64_t j = 0; j < d; ++j) row[j] = rest > 0 ? row[j] / rest : 0;
    }
  }

  Real at(int row, int column) const { return r[std::size_t(row * l + column)]; }

  // J^T (J J^T)^-1 x = Q^T R^-T x.
  template <typename S>
  Vector apply(const S* x) const {
    Vector z(static_cast<std::size_t>(l)), y(std::size_t(d), 0);
    for (int k = 0; k < l; ++k) {
      Real sum = Real(x[k]);
      for (int m = 0; m < k; ++m) sum -= at(m, k) * z[std::size_t(m)];
      z[std::size_t(k)] = sum / at(k, k);
      for (std::int64_t j = 0; j < d; ++j)
        y[std::size_t(j)] += z[std::size_t(k)] * q[std::size_t(k * d + j)];
    }
    return y;
  }

  // (J J^T)^-1 J g = R^-1 Q g.
  template <typename S>
  Vector adjoint(const S* g) const {
    Vector s(static_cast<std::size_t>(l));
    for (int k = l - 1; k >= 0; --k) {
      Real sum = 0;
      for (std::int64_t j = 0; j < d; ++j) sum += q[std::size_t(k * d + j)] * Real(g[j]);
      for (int m = k + 1; m < l; ++m) sum -= at(k, m) * s[std::size_t(m)];
      s[std::size_t(k)] = sum / at(k, k);
    }
    return s;
  }
};

template <typename S>
Vector widen(const S* x, std::int64_t count) {
  Vector out(static_cast<std::size_t>(count));
  for (std::int64_t j = 0; j < count; ++j) out[std::size_t(j)] = Real(x[j]);
  return out;
}

// Normally distributed numbers; the same on every run.
class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  double operator()() { return normal_(engine_); }
  template <typename S>
  std::vector<S> numbers(std::int64_t count) {
    std::vector<S> out;
    out.reserve(std::size_t(count));
    for (std::int64_t i = 0; i < count; ++i) out.push_back(S((*this)()));
    return out;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

}  // namespace reference
