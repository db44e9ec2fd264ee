// What the CPU and the CUDA glue of the row ops share: checked, contiguous tensors and their sizes.
#pragma once

#include "../core/params.h"
#include "checks.h"

namespace levelset::glue {

struct PinvTensors {
  Tensor jacobian, input, output, status;
  std::int64_t rows, columns;
  int outputs;

  template <typename S>
  PinvParams<S> params() const {
    return {rows,
            columns,
            outputs,
            static_cast<const S*>(jacobian.const_data_ptr()),
            static_cast<const S*>(input.const_data_ptr()),
            static_cast<S*>(output.mutable_data_ptr()),
            static_cast<std::int8_t*>(status.mutable_data_ptr())};
  }
};

// The result is written to `out` where one is given, contiguous memory of its own.
PinvTensors prepare_apply(const Tensor& jacobian, const Tensor& residual,
                          const std::optional<Tensor>& out);
PinvTensors prepare_adjoint(const Tensor& jacobian, const Tensor& gradient);

struct NewtonTensors {
  Tensor points, values, jacobian, level, next, status;
  std::optional<Tensor> index, running, lower, upper;
  std::int64_t rows, point_rows, columns, level_stride;
  int outputs;
  double tol, max_step;

  template <typename S>
  NewtonParams<S> params() const {
    const auto optional = [](const std::optional<Tensor>& t) -> const void* {
      return t.has_value() ? t->const_data_ptr() : nullptr;
    };
    return {rows,
            point_rows,
            columns,
            outputs,
            static_cast<const S*>(points.const_data_ptr()),
            static_cast<const S*>(values.const_data_ptr()),
            static_cast<const S*>(jacobian.const_data_ptr()),
            static_cast<const S*>(level.const_data_ptr()),
            level_stride,
            static_cast<const std::int64_t*>(optional(index)),
            static_cast<const std::int8_t*>(optional(running)),
            static_cast<const S*>(optional(lower)),
            static_cast<const S*>(optional(upper)),
            tol,
            max_step,
            static_cast<S*>(next.mutable_data_ptr()),
            static_cast<std::int8_t*>(status.mutable_data_ptr())};
  }
};

NewtonTensors prepare_newton(const Tensor& points, const Tensor& values, const Tensor& jacobian,
                             const Tensor& level, const std::optional<Tensor>& status,
                             const std::optional<Tensor>& lower, const std::optional<Tensor>& upper,
                             double tol, double max_step, const std::optional<Tensor>& out);

NewtonTensors prepare_newton_inplace(const Tensor& points, const Tensor& status,
                                     const Tensor& values, const Tensor& jacobian,
                                     const Tensor& level, const std::optional<Tensor>& index,
                                     const std::optional<Tensor>& lower,
                                     const std::optional<Tensor>& upper, double tol,
                                     double max_step);

// Calls run(S{}) with the storage type of `dtype`, one of float and double.
template <typename Run>
void with_wide_dtype(ScalarType dtype, Run run) {
  if (dtype == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
}

}  // namespace levelset::glue
