// What the CPU and the CUDA glue of the compiled fields share: the layers that a layout describes,
// and checked arguments of a projection.
#pragma once

#include <vector>

#include "../core/mlp_net.h"
#include "checks.h"

namespace levelset::glue {

constexpr std::int64_t kLayoutColumns = 4, kScaleColumns = 2;

// The layers that `layout` (layers, 4) int64 and `scales` (layers, 2) float64, both on the CPU,
// describe; not yet where they are packed.
std::vector<MlpLayer> check_layers(const Tensor& layout, const Tensor& scales);

// W (outputs, hidden), U (outputs, inputs) and the bias (outputs,) of one layer, of the kind of
// `packed`.
void check_weights(const std::vector<MlpLayer>& layers, std::int64_t index, const Tensor& packed,
                   const std::optional<Tensor>& hidden, const std::optional<Tensor>& inputs,
                   const std::optional<Tensor>& bias);

// Points (n, d) of the kind of `packed`.
void check_points(const std::vector<MlpLayer>& layers, const Tensor& packed, const Tensor& points);

// The contiguous arguments of a projection and room for its results.
struct ProjectionTensors {
  Tensor start, level;
  std::optional<Tensor> lower, upper;
  std::int64_t rows, level_stride;
  Tensor points, values, jacobian, status, iterations;

  // Writes them to the members of the same names.
  template <typename S, typename Params>
  void describe(Params& params) const {
    const auto corner = [](const std::optional<Tensor>& t) {
      return t.has_value() ? static_cast<const S*>(t->const_data_ptr()) : nullptr;
    };
    params.rows = rows;
    params.start = static_cast<const S*>(start.const_data_ptr());
    params.level = static_cast<const S*>(level.const_data_ptr());
    params.level_stride = level_stride;
    params.lower = corner(lower);
    params.upper = corner(upper);
    params.points = static_cast<S*>(points.mutable_data_ptr());
    params.values = static_cast<S*>(values.mutable_data_ptr());
    params.jacobian = static_cast<S*>(jacobian.mutable_data_ptr());
    params.status = static_cast<std::int8_t*>(status.mutable_data_ptr());
    params.iterations = static_cast<std::int32_t*>(iterations.mutable_data_ptr());
  }
};

ProjectionTensors prepare_projection(const std::vector<MlpLayer>& layers, const Tensor& packed,
                                     const Tensor& points, const Tensor& level,
                                     const std::optional<Tensor>& lower,
                                     const std::optional<Tensor>& upper, std::int64_t max_iters,
                                     double tol, double max_step);

}  // namespace levelset::glue
