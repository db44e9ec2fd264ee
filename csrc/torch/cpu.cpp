// CPU side of the ops: check, allocate, walk the rows on torch's threads.
#include <torch/csrc/stable/library.h>
#include <algorithm>

#include "../cpu/bracket.h"
#include "../cpu/rows.h"
#include "bracket.h"
#include "rows.h"

namespace levelset::glue {
namespace {

// Rows for one thread: enough numbers to outweigh the cost of waking it.
std::int64_t grain(std::int64_t outputs, std::int64_t columns) {
  constexpr std::int64_t kNumbers = 32768;
  return std::max<std::int64_t>(1, kNumbers / std::max<std::int64_t>(1, outputs * columns));
}

template <typename Rows>
void over_rows(std::int64_t rows, std::int64_t outputs, std::int64_t columns, Rows run) {
  if (rows == 0) return;
  torch::stable::parallel_for(0, rows, grain(outputs, columns), run);
}

void expect_rows(const std::optional<Tensor>& index, std::int64_t point_rows) {
  if (!index.has_value()) return;
  const auto* row = static_cast<const std::int64_t*>(index->const_data_ptr());
  for (std::int64_t i = 0; i < index->size(0); ++i) {
    require(row[i] >= 0 && row[i] < point_rows, "index: expected rows of points, 0 to ",
            point_rows - 1, ", got ", row[i]);
  }
}

void run_apply(const PinvTensors& t) {
  with_wide_dtype(t.jacobian.scalar_type(), [&](auto zero) {
    const auto p = t.params<decltype(zero)>();
    over_rows(t.rows, t.outputs, t.columns,
              [&](std::int64_t begin, std::int64_t end) { cpu::pinv_apply(p, begin, end); });
  });
}

std::tuple<Tensor, Tensor> pinv_apply(const Tensor& jacobian, const Tensor& residual,
                                      std::int64_t) {
  const PinvTensors t = prepare_apply(jacobian, residual, std::nullopt);
  run_apply(t);
  return {t.output, t.status};
}

Tensor pinv_apply_out(const Tensor& jacobian, const Tensor& residual, const Tensor& out,
                      std::int64_t) {
  const PinvTensors t = prepare_apply(jacobian, residual, out);
  run_apply(t);
  return t.status;
}

std::tuple<Tensor, Tensor> pinv_adjoint(const Tensor& jacobian, const Tensor& gradient,
                                        std::int64_t) {
  const PinvTensors t = prepare_adjoint(jacobian, gradient);
  with_wide_dtype(jacobian.scalar_type(), [&](auto zero) {
    const auto p = t.params<decltype(zero)>();
    over_rows(t.rows, t.outputs, t.columns,
              [&](std::int64_t begin, std::int64_t end) { cpu::pinv_adjoint(p, begin, end); });
  });
  return {t.output, t.status};
}

void run_newton(const NewtonTensors& t) {
  with_wide_dtype(t.points.scalar_type(), [&](auto zero) {
    const auto p = t.params<decltype(zero)>();
    over_rows(t.rows, t.outputs, t.columns,
              [&](std::int64_t begin, std::int64_t end) { cpu::newton_update(p, begin, end); });
  });
}

std::tuple<Tensor, Tensor> newton_update(const Tensor& points, const Tensor& values,
                                         const Tensor& jacobian, const Tensor& level,
                                         const std::optional<Tensor>& status,
                                         const std::optional<Tensor>& lower,
                                         const std::optional<Tensor>& upper, double tol,
                                         double max_step, std::int64_t) {
  const NewtonTensors t = prepare_newton(points, values, jacobian, level, status, lower, upper, tol,
                                         max_step, std::nullopt);
  run_newton(t);
  return {t.next, t.status};
}

Tensor newton_update_out(const Tensor& points, const Tensor& values, const Tensor& jacobian,
                         const Tensor& level, const std::optional<Tensor>& status,
                         const std::optional<Tensor>& lower, const std::optional<Tensor>& upper,
                         double tol, double max_step, const Tensor& out, std::int64_t) {
  const NewtonTensors t =
      prepare_newton(points, values, jacobian, level, status, lower, upper, tol, max_step, out);
  run_newton(t);
  return t.status;
}

void newton_update_(const Tensor& points, const Tensor& status, const Tensor& values,
                    const Tensor& jacobian, const Tensor& level, const std::optional<Tensor>& index,
                    const std::optional<Tensor>& lower, const std::optional<Tensor>& upper,
                    double tol, double max_step, std::int64_t) {
  const NewtonTensors t = prepare_newton_inplace(points, status, values, jacobian, level, index,
                                                 lower, upper, tol, max_step);
  expect_rows(t.index, t.point_rows);
  run_newton(t);
}

void bracket_update_(const Tensor& points, const Tensor& status, const Tensor& bracket,
                     const Tensor& start, const Tensor& end, const Tensor& values,
                     const Tensor& level, const std::optional<Tensor>& index, double tol,
                     std::int64_t variant, bool last, std::int64_t) {
  const BracketTensors t = prepare_bracket(points, status, bracket, start, end, values, level,
                                           index, tol, variant, last);
  expect_rows(t.index, t.point_rows);
  with_wide_dtype(points.scalar_type(), [&](auto zero) {
    const auto p = t.params<decltype(zero)>();
    over_rows(t.rows, 3, t.columns,
              [&](std::int64_t begin, std::int64_t end) { cpu::bracket_update(p, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(levelset_ext, CPU, library) {
  library.impl("pinv_apply", TORCH_BOX(&pinv_apply));
  library.impl("pinv_apply_out", TORCH_BOX(&pinv_apply_out));
  library.impl("pinv_adjoint", TORCH_BOX(&pinv_adjoint));
  library.impl("newton_update", TORCH_BOX(&newton_update));
  library.impl("newton_update_out", TORCH_BOX(&newton_update_out));
  library.impl("newton_update_", TORCH_BOX(&newton_update_));
  library.impl("bracket_update_", TORCH_BOX(&bracket_update_));
  // nearest: the k-d tree of SciPy, registered from Python.
}

}  // namespace levelset::glue
