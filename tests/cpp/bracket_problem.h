// Owned tensors of the bracketing root search, and whole searches with a function of the first
// column.
#pragma once

#include <cstring>
#include <functional>
#include <vector>

#include "core/params.h"
#include "core/status.h"
#include "problems.h"

namespace problems {

using levelset::BracketVariant;

constexpr BracketVariant kVariants[] = {BracketVariant::kRegulaFalsi, BracketVariant::kBisection,
                                        BracketVariant::kIllinois, BracketVariant::kChandrupatla,
                                        BracketVariant::kAndersonBjorck};

template <typename S>
struct Bracket {
  std::int64_t n, d;
  std::vector<S> start, end, points, values, level;
  std::vector<std::int8_t> status;
  std::vector<levelset::BracketRow> state;
  std::vector<std::int64_t> index;
  std::int64_t level_stride = 0;
  double tol = 0, rounding = 4 * 0x1p-52;
  BracketVariant variant = BracketVariant::kAndersonBjorck;
  bool begins = true, last = false;

  // Every column of a segment runs from `a` to `b`.
  Bracket(std::int64_t rows, std::int64_t columns, S a, S b)
      : n(rows), d(columns), level(1, S(0.0f)) {
    start.assign(std::size_t(n * d), a);
    end.assign(std::size_t(n * d), b);
    points.assign(std::size_t(n * d), S(float(kUntouched)));
    status.assign(std::size_t(n), code(RowStatus::kRunning));
    state.resize(std::size_t(n));
  }

  levelset::BracketParams<S> params() {
    const std::int64_t rows = index.empty() ? n : std::int64_t(index.size());
    return {rows,
            n,
            d,
            start.data(),
            end.data(),
            values.data(),
            begins,
            last,
            level.data(),
            level_stride,
            index.empty() ? nullptr : index.data(),
            tol,
            rounding,
            variant,
            points.data(),
            status.data(),
            state.data()};
  }

  // Runs the whole search: f maps a number to a number, update(params) is the launcher. Returns the
  // evaluations between the ends, over all rows.
  template <typename Function, typename Update>
  int search(Function f, Update update, int max_iters = 200) {
    const auto at = [&](const std::vector<S>& x, std::int64_t i) {
      return S(f(double(x[std::size_t(i * d)])));
    };
    values.clear();
    for (std::int64_t i = 0; i < n; ++i) {
      values.push_back(at(start, i));
      values.push_back(at(end, i));
    }
    begins = true;
    last = max_iters == 0;
    update(params());
    begins = false;
    int evaluations = 0;
    for (int k = 1; k <= max_iters; ++k) {
      index.clear();
      values.clear();
      for (std::int64_t i = 0; i < n; ++i) {
        if (status[std::size_t(i)] != code(RowStatus::kRunning)) continue;
        index.push_back(i);
        values.push_back(at(points, i));
      }
      if (index.empty()) break;
      evaluations += int(index.size());
      last = k == max_iters;
      update(params());
    }
    index.clear();
    return evaluations;
  }

  RowStatus result(std::int64_t i) const { return RowStatus(status[std::size_t(i)]); }
  double found(std::int64_t i) const { return double(points[std::size_t(i * d)]); }
};

}  // namespace problems
