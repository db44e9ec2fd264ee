#include "bracket.h"

namespace levelset::glue {
namespace {

// A few units in the last place of 1: what is left of F near a root by rounding alone.
double rounding_of(ScalarType dtype) {
  constexpr double kUlps = 4;
  switch (dtype) {
    case ScalarType::Double: return kUlps * 0x1p-52;
    case ScalarType::Half: return kUlps * 0x1p-10;
    case ScalarType::BFloat16: return kUlps * 0x1p-7;
    default: return kUlps * 0x1p-23;
  }
}

}  // namespace

BracketTensors prepare_bracket(const Tensor& points, const Tensor& status, const Tensor& bracket,
                               const Tensor& start, const Tensor& end, const Tensor& values,
                               const Tensor& level, const std::optional<Tensor>& index, double tol,
                               std::int64_t variant, bool last) {
  expect_dim(points, "points", "(n, d)", 2);
  expect_floating(points, "points");
  const std::int64_t n = points.size(0), d = points.size(1);
  expect_shape(status, "status", "(n,)", {n});
  expect_dtype(status, "status", ScalarType::Char);
  expect_same_device(status, "status", points, "points");
  expect_shape(bracket, "bracket", "(n, bracket_columns)", {n, kBracketColumns});
  expect_dtype(bracket, "bracket", ScalarType::Double);
  expect_same_device(bracket, "bracket", points, "points");
  expect_contiguous(points, "points");
  expect_contiguous(status, "status");
  expect_contiguous(bracket, "bracket");
  expect_shape(start, "start", "(n, d)", {n, d});
  expect_shape(end, "end", "(n, d)", {n, d});
  expect_same_kind(start, "start", points, "points");
  expect_same_kind(end, "end", points, "points");
  if (index.has_value()) {
    expect_dim(*index, "index", "(m,)", 1);
    expect_dtype(*index, "index", ScalarType::Long);
    expect_same_device(*index, "index", points, "points");
  }
  const std::int64_t m = index.has_value() ? index->size(0) : n;
  expect_dim(values, "values", "(m, 1), or (m, 2) at both ends", 2);
  const bool begins = values.size(1) == 2;
  expect_shape(values, "values", "(m, 1), or (m, 2) at both ends", {m, begins ? 2 : 1});
  expect_same_kind(values, "values", points, "points");
  expect_dim(level, "level", "(n, 1) or (1, 1)", 2);
  const bool one_level = level.size(0) == 1;
  expect_shape(level, "level", "(n, 1) or (1, 1)", {one_level ? 1 : n, 1});
  expect_same_kind(level, "level", points, "points");
  require(tol >= 0, "tol: expected a number >= 0, got ", tol);
  require(variant >= 0 && variant < kBracketVariants, "variant: expected 0 to ",
          kBracketVariants - 1, ", got ", variant);
  // Unqualified calls find torch::stable::contiguous for a tensor.
  BracketTensors t{points,
                   status,
                   bracket,
                   contiguous(start),
                   contiguous(end),
                   contiguous(values),
                   contiguous(level),
                   {},
                   m,
                   n,
                   d,
                   one_level ? 0 : 1,
                   begins,
                   last,
                   tol,
                   rounding_of(points.scalar_type()),
                   BracketVariant(variant)};
  if (index.has_value()) t.index = contiguous(*index);
  return t;
}

}  // namespace levelset::glue
