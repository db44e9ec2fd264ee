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

void check_projection(const std::vector<MlpLayer>& layers, const Tensor& packed,
                      const Tensor& points, const Tensor& level, const std::optional<Tensor>& lower,
                      const std::optional<Tensor>& upper, std::int64_t max_iters, double tol,
                      double max_step);

}  // namespace levelset::glue
