#include "rows.h"

namespace levelset::glue {
namespace {

// Unqualified calls find torch::stable::contiguous for a tensor.
std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(contiguous(*t)) : std::nullopt;
}

// What an op that writes to memory of the caller asks of it: shape, dtype and device, and that it
// is not the memory of an input, which other rows may still have to be read from.
const Tensor& checked_out(const Tensor& out, const Tensor& reference, const char* reference_name,
                          const Shape& shape, std::initializer_list<const Tensor*> inputs) {
  expect_shape(out, "out", "(n, d)", shape);
  expect_same_kind(out, "out", reference, reference_name);
  expect_contiguous(out, "out");
  const auto range = [](const Tensor& t) {
    const auto begin = reinterpret_cast<std::uintptr_t>(t.const_data_ptr());
    return std::pair{begin, begin + std::uintptr_t(t.numel()) * t.element_size()};
  };
  const auto [begin, end] = range(out);
  for (const Tensor* input : inputs) {
    if (input == nullptr) continue;
    const auto [other, other_end] = range(*input);
    require(end <= other || other_end <= begin || begin == end || other == other_end,
            "out: expected memory of its own, got that of an input");
  }
  return out;
}

PinvTensors prepare(const Tensor& jacobian, const Tensor& input, const char* input_name,
                    bool adjoint, const std::optional<Tensor>& out) {
  expect_dim(jacobian, "jacobian", "(n, l, d)", 3);
  expect_floating(jacobian, "jacobian");
  expect_same_kind(input, input_name, jacobian, "jacobian");
  const std::int64_t n = jacobian.size(0), l = jacobian.size(1), d = jacobian.size(2);
  expect_outputs(l);
  expect_shape(input, input_name, adjoint ? "(n, d)" : "(n, l)", {n, adjoint ? d : l});
  const Tensor j = contiguous(jacobian), x = contiguous(input);
  const Shape shape{n, adjoint ? l : d};
  return {j,
          x,
          out.has_value() ? checked_out(*out, jacobian, "jacobian", shape, {&j, &x})
                          : torch::stable::new_empty(jacobian, shape),
          torch::stable::new_empty(jacobian, Shape{n}, ScalarType::Char),
          n,
          d,
          int(l)};
}

// The part of the Newton arguments that both forms share. m rows of values against n points.
NewtonTensors prepare_common(const Tensor& points, const Tensor& values, const Tensor& jacobian,
                             const Tensor& level, const std::optional<Tensor>& lower,
                             const std::optional<Tensor>& upper, double tol, double max_step,
                             std::int64_t m) {
  expect_dim(points, "points", "(n, d)", 2);
  expect_dim(jacobian, "jacobian", "(n, l, d)", 3);
  expect_floating(points, "points");
  const std::int64_t n = points.size(0), d = points.size(1), l = jacobian.size(1);
  expect_outputs(l);
  expect_shape(jacobian, "jacobian", "(n, l, d)", {m, l, d});
  expect_shape(values, "values", "(n, l)", {m, l});
  expect_dim(level, "level", "(n, l) or (1, l)", 2);
  const bool one_level = level.size(0) == 1;
  expect_shape(level, "level", "(n, l) or (1, l)", {one_level ? 1 : n, l});
  expect_same_kind(values, "values", points, "points");
  expect_same_kind(jacobian, "jacobian", points, "points");
  expect_same_kind(level, "level", points, "points");
  if (lower.has_value()) {
    expect_shape(*lower, "lower", "(d,)", {d});
    expect_same_kind(*lower, "lower", points, "points");
  }
  if (upper.has_value()) {
    expect_shape(*upper, "upper", "(d,)", {d});
    expect_same_kind(*upper, "upper", points, "points");
  }
  require(tol >= 0, "tol: expected a number >= 0, got ", tol);
  require(max_step > 0, "max_step: expected a length > 0, got ", max_step);
  NewtonTensors t{contiguous(points),
                  contiguous(values),
                  contiguous(jacobian),
                  contiguous(level),
                  points,
                  points,
                  {},
                  {},
                  contiguous_or_none(lower),
                  contiguous_or_none(upper),
                  m,
                  n,
                  d,
                  one_level ? 0 : l,
                  int(l),
                  tol,
                  max_step};
  return t;
}

}  // namespace

PinvTensors prepare_apply(const Tensor& jacobian, const Tensor& residual,
                          const std::optional<Tensor>& out) {
  return prepare(jacobian, residual, "residual", false, out);
}

PinvTensors prepare_adjoint(const Tensor& jacobian, const Tensor& gradient) {
  return prepare(jacobian, gradient, "gradient", true, std::nullopt);
}

NewtonTensors prepare_newton(const Tensor& points, const Tensor& values, const Tensor& jacobian,
                             const Tensor& level, const std::optional<Tensor>& status,
                             const std::optional<Tensor>& lower, const std::optional<Tensor>& upper,
                             double tol, double max_step, const std::optional<Tensor>& out) {
  expect_dim(points, "points", "(n, d)", 2);
  const std::int64_t n = points.size(0);
  NewtonTensors t = prepare_common(points, values, jacobian, level, lower, upper, tol, max_step, n);
  if (status.has_value()) {
    expect_shape(*status, "status", "(n,)", {n});
    expect_dtype(*status, "status", ScalarType::Char);
    expect_same_device(*status, "status", points, "points");
    t.running = contiguous_or_none(status);
  }
  t.next = out.has_value()
               ? checked_out(*out, points, "points", shape_of(points),
                             {&t.points, &t.values, &t.jacobian, &t.level,
                              t.lower ? &*t.lower : nullptr, t.upper ? &*t.upper : nullptr})
               : torch::stable::new_empty(points, shape_of(points));
  t.status = torch::stable::new_empty(points, Shape{n}, ScalarType::Char);
  return t;
}

NewtonTensors prepare_newton_inplace(const Tensor& points, const Tensor& status,
                                     const Tensor& values, const Tensor& jacobian,
                                     const Tensor& level, const std::optional<Tensor>& index,
                                     const std::optional<Tensor>& lower,
                                     const std::optional<Tensor>& upper, double tol,
                                     double max_step) {
  expect_dim(points, "points", "(n, d)", 2);
  expect_contiguous(points, "points");
  expect_contiguous(status, "status");
  expect_shape(status, "status", "(n,)", {points.size(0)});
  expect_dtype(status, "status", ScalarType::Char);
  expect_same_device(status, "status", points, "points");
  if (index.has_value()) {
    expect_dim(*index, "index", "(m,)", 1);
    expect_dtype(*index, "index", ScalarType::Long);
    expect_same_device(*index, "index", points, "points");
  }
  const std::int64_t m = index.has_value() ? index->size(0) : points.size(0);
  NewtonTensors t = prepare_common(points, values, jacobian, level, lower, upper, tol, max_step, m);
  t.points = t.next = points;
  t.running = t.status = status;
  t.index = contiguous_or_none(index);
  return t;
}

}  // namespace levelset::glue
