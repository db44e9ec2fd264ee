// What the CPU and the CUDA glue of the bracketing root search share.
#pragma once

#include "../core/params.h"
#include "checks.h"

namespace levelset::glue {

struct BracketTensors {
  Tensor points, status, bracket, start, end, values, level;
  std::optional<Tensor> index;
  std::int64_t rows, point_rows, columns, level_stride;
  bool begins, last;
  double tol, rounding;
  BracketVariant variant;

  template <typename S>
  BracketParams<S> params() const {
    return {rows,
            point_rows,
            columns,
            static_cast<const S*>(start.const_data_ptr()),
            static_cast<const S*>(end.const_data_ptr()),
            static_cast<const S*>(values.const_data_ptr()),
            begins,
            last,
            static_cast<const S*>(level.const_data_ptr()),
            level_stride,
            index.has_value() ? static_cast<const std::int64_t*>(index->const_data_ptr()) : nullptr,
            tol,
            rounding,
            variant,
            static_cast<S*>(points.mutable_data_ptr()),
            static_cast<std::int8_t*>(status.mutable_data_ptr()),
            static_cast<BracketRow*>(bracket.mutable_data_ptr())};
  }
};

BracketTensors prepare_bracket(const Tensor& points, const Tensor& status, const Tensor& bracket,
                               const Tensor& start, const Tensor& end, const Tensor& values,
                               const Tensor& level, const std::optional<Tensor>& index, double tol,
                               std::int64_t variant, bool last);

}  // namespace levelset::glue
