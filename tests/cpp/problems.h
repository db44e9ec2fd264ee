// Owned inputs and outputs of the row ops, so that a test reads as: fill, run, compare.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "core/params.h"
#include "core/status.h"
#include "reference.h"

namespace problems {

using levelset::RowStatus;

constexpr std::int8_t code(RowStatus status) { return std::int8_t(status); }

// What an output holds before an op writes it. A row that an op forgets keeps it.
constexpr int kUntouched = 77;

template <typename S>
struct Pinv {
  std::int64_t n, d;
  int l;
  bool adjoint;
  std::vector<S> jacobian, input, output;
  std::vector<std::int8_t> status;

  Pinv(bool is_adjoint, std::int64_t rows, int outputs, std::int64_t columns, unsigned seed)
      : n(rows), d(columns), l(outputs), adjoint(is_adjoint) {
    reference::Random random(seed);
    jacobian = random.numbers<S>(n * l * d);
    input = random.numbers<S>(n * (adjoint ? d : l));
    output.assign(std::size_t(n * output_width()), S(float(kUntouched)));
    status.assign(std::size_t(n), std::int8_t(kUntouched));
  }

  std::int64_t output_width() const { return adjoint ? l : d; }
  S* row(std::int64_t i, int k) { return jacobian.data() + (i * l + k) * d; }

  levelset::PinvParams<S> params() {
    return {n, d, l, jacobian.data(), input.data(), output.data(), status.data()};
  }

  reference::Factor factor(std::int64_t i) const { return {jacobian.data() + i * l * d, l, d}; }

  reference::Vector expected(std::int64_t i) const {
    return adjoint ? factor(i).adjoint(input.data() + i * d)
                   : factor(i).apply(input.data() + i * l);
  }

  reference::Vector result(std::int64_t i) const {
    return reference::widen(output.data() + i * output_width(), output_width());
  }

  // |result - expected| relative to the size of the result; for the adjoint, whose sums may cancel,
  // to the size it has without cancellation, if that is larger.
  reference::Real error(std::int64_t i) const {
    using reference::Real;
    const reference::Vector want = expected(i), got = result(i);
    Real scale = reference::norm(want);
    if (adjoint) {
      Real shortest = std::numeric_limits<Real>::max();
      for (int k = 0; k < l; ++k) {
        shortest = std::min(
            shortest, reference::norm(reference::widen(jacobian.data() + (i * l + k) * d, d)));
      }
      scale =
          std::max(scale, reference::norm(reference::widen(input.data() + i * d, d)) / shortest);
    }
    return reference::relative_error(got, want) * reference::norm(want) / scale;
  }
};

template <typename S>
struct Newton {
  std::int64_t m, n, d;  // rows of values, rows of points, columns
  int l;
  std::vector<S> points, values, jacobian, level, lower, upper, next;
  std::vector<std::int64_t> index;
  std::vector<std::int8_t> running, status;
  std::int64_t level_stride;
  double tol = 0, max_step = std::numeric_limits<double>::infinity();
  bool in_place = false;

  Newton(std::int64_t rows, int outputs, std::int64_t columns, unsigned seed)
      : m(rows), n(rows), d(columns), l(outputs), level_stride(outputs) {
    reference::Random random(seed);
    points = random.numbers<S>(n * d);
    values = random.numbers<S>(m * l);
    jacobian = random.numbers<S>(m * l * d);
    level = random.numbers<S>(n * l);
    next.assign(std::size_t(n * d), S(float(kUntouched)));
    status.assign(std::size_t(n), std::int8_t(kUntouched));
  }

  levelset::NewtonParams<S> params() {
    const auto optional = [](auto& x) { return x.empty() ? nullptr : x.data(); };
    return {m,
            n,
            d,
            l,
            points.data(),
            values.data(),
            jacobian.data(),
            level.data(),
            level_stride,
            optional(index),
            in_place ? status.data() : optional(running),
            optional(lower),
            optional(upper),
            tol,
            max_step,
            in_place ? points.data() : next.data(),
            status.data()};
  }

  // Row i of values against the point it belongs to, in long double, without cap and box.
  reference::Vector step(std::int64_t i) const {
    const std::int64_t row = index.empty() ? i : index[std::size_t(i)];
    std::vector<reference::Real> residual;
    for (int k = 0; k < l; ++k) {
      residual.push_back(reference::Real(values[std::size_t(i * l + k)]) -
                         reference::Real(level[std::size_t(row * level_stride + k)]));
    }
    return reference::Factor(jacobian.data() + i * l * d, l, d).apply(residual.data());
  }

  reference::Vector result(std::int64_t i) const {
    return reference::widen((in_place ? points : next).data() + i * d, d);
  }
};

}  // namespace problems
