// CUDA ops of the compiled fields, float32: check, allocate, one launch on the current stream. What
// was found keeps no tape here, so `keep` must be false.
#include <torch/csrc/stable/library.h>

#include "../cuda/launch.h"
#include "cuda.h"
#include "mlp_checks.h"

namespace levelset::glue {
namespace {

struct Plan {
  std::vector<MlpLayer> layers;
  cuda::MlpPlan plan;
};

Plan read_plan(const Tensor& packed, const Tensor& layout, const Tensor& scales) {
  Plan p{check_layers(layout, scales), {}};
  p.plan = cuda::mlp_plan(p.layers.data(), int(p.layers.size()), p.layers.front().inputs);
  require(p.plan.width > 0, "layout: expected at most ", cuda::kMlpLayers, " layers of up to ",
          cuda::kMlpWidths[3], " units, d up to ", cuda::kMlpDimension, " and l up to ",
          cuda::kMlpOutputs, " on CUDA");
  expect_dtype(packed, "packed", ScalarType::Float);
  expect_shape(packed, "packed", "(numbers,)", {p.plan.packed});
  expect_contiguous(packed, "packed");
  // The kernel reads four numbers at a time.
  require(reinterpret_cast<std::uintptr_t>(packed.const_data_ptr()) % 16 == 0,
          "packed: expected memory at a multiple of 16 bytes, got a view that begins between two");
  return p;
}

void mlp_pack_(const Tensor& packed, const Tensor& coarse, const Tensor& layout,
               const Tensor& scales, std::int64_t index, const std::optional<Tensor>& hidden,
               const std::optional<Tensor>& inputs, const std::optional<Tensor>& bias) {
  const DeviceGuard guard(packed.get_device_index());
  const Plan p = read_plan(packed, layout, scales);
  require(coarse.size(0) == 0, "coarse: expected no coarse weights on CUDA");
  check_weights(p.layers, index, packed, hidden, inputs, bias);
  const MlpLayer& layer = p.layers[index];
  const auto matrix = [](const std::optional<Tensor>& t) {
    if (!t.has_value()) return cuda::MlpMatrix{nullptr, 0, 0};
    return cuda::MlpMatrix{static_cast<const float*>(t->const_data_ptr()), t->stride(0),
                           t->stride(1)};
  };
  const cuda::MlpPackParams params{
      p.plan.width,
      layer.outputs,
      layer.hidden,
      layer.inputs,
      matrix(hidden),
      matrix(inputs),
      bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
      bias.has_value() ? bias->stride(0) : 0,
      static_cast<float*>(packed.mutable_data_ptr()) + layer.bias_at};
  check_launch(cuda::mlp_pack(params, current_stream(packed)), "mlp_pack_");
}

// Launches the kernel with what `params` names, and scratch memory.
void launch(const Plan& p, const Tensor& packed, const Tensor& start, cuda::MlpParams& params,
            const char* op) {
  std::int64_t blocks = 0;
  check_launch(cuda::mlp_blocks(p.plan, params.rows, &blocks), op);
  const std::int64_t layers = std::int64_t(p.layers.size());
  const std::int64_t slopes =
      params.jacobian != nullptr ? blocks * (layers - 1) * cuda::kMlpTile : 0;
  const Tensor scratch = torch::stable::new_empty(start, Shape{slopes});
  const Tensor next = torch::stable::new_empty(start, Shape{1}, ScalarType::Long);
  for (std::int64_t k = 0; k < layers; ++k) params.layers[k] = p.layers[k];
  params.count = int(layers);
  params.dimension = int(p.layers.front().inputs);
  params.outputs = int(p.layers.back().outputs);
  params.packed = static_cast<const float*>(packed.const_data_ptr());
  params.start = static_cast<const float*>(start.const_data_ptr());
  params.slopes = static_cast<float*>(scratch.mutable_data_ptr());
  params.next = static_cast<unsigned long long*>(next.mutable_data_ptr());
  check_launch(cuda::mlp_newton(params, p.plan, blocks, current_stream(start)), op);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlp_project(
    const Tensor& packed, const Tensor& /*coarse*/, const Tensor& layout, const Tensor& scales,
    const Tensor& points, const Tensor& level, const std::optional<Tensor>& lower,
    const std::optional<Tensor>& upper, std::int64_t max_iters, double tol, double max_step,
    bool keep, std::int64_t /*threads*/) {
  const DeviceGuard guard(packed.get_device_index());
  const Plan p = read_plan(packed, layout, scales);
  check_projection(p.layers, packed, points, level, lower, upper, max_iters, tol, max_step);
  require(!keep, "keep: expected false on CUDA");
  const std::int64_t n = points.size(0), d = points.size(1), l = p.layers.back().outputs;
  const Tensor start = contiguous(points), target = contiguous(level);
  const std::optional<Tensor> low = lower.has_value() ? std::optional(contiguous(*lower)) : lower;
  const std::optional<Tensor> high = upper.has_value() ? std::optional(contiguous(*upper)) : upper;
  const Tensor next_points = torch::stable::new_empty(points, Shape{n, d});
  const Tensor values = torch::stable::new_empty(points, Shape{n, l});
  const Tensor jacobian = torch::stable::new_empty(points, Shape{n, l, d});
  const Tensor status = torch::stable::new_empty(points, Shape{n}, ScalarType::Char);
  const Tensor iterations = torch::stable::new_empty(points, Shape{n}, ScalarType::Int);
  const Tensor nothing = torch::stable::new_empty(points, Shape{0});
  if (n > 0) {
    const auto corner = [](const std::optional<Tensor>& t) {
      return t.has_value() ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
    };
    cuda::MlpParams params{};
    params.rows = n;
    params.level = static_cast<const float*>(target.const_data_ptr());
    params.level_stride = level.size(0) == 1 ? 0 : l;
    params.lower = corner(low);
    params.upper = corner(high);
    params.max_iters = max_iters;
    params.tol = tol;
    params.max_step = max_step;
    params.points = static_cast<float*>(next_points.mutable_data_ptr());
    params.values = static_cast<float*>(values.mutable_data_ptr());
    params.jacobian = static_cast<float*>(jacobian.mutable_data_ptr());
    params.status = static_cast<std::int8_t*>(status.mutable_data_ptr());
    params.iterations = static_cast<std::int32_t*>(iterations.mutable_data_ptr());
    launch(p, packed, start, params, "mlp_project");
  }
  return {next_points, values, jacobian, status, iterations, nothing, nothing};
}

Tensor mlp_values(const Tensor& packed, const Tensor& /*coarse*/, const Tensor& layout,
                  const Tensor& scales, const Tensor& points, std::int64_t /*threads*/) {
  const DeviceGuard guard(packed.get_device_index());
  const Plan p = read_plan(packed, layout, scales);
  expect_dim(points, "points", "(n, d)", 2);
  const std::int64_t n = points.size(0);
  expect_shape(points, "points", "(n, d)", {n, p.layers.front().inputs});
  expect_same_kind(points, "points", packed, "packed");
  const Tensor values = torch::stable::new_empty(points, Shape{n, p.layers.back().outputs});
  if (n == 0) return values;
  const Tensor start = contiguous(points);
  cuda::MlpParams params{};
  params.rows = n;
  params.values = static_cast<float*>(values.mutable_data_ptr());
  launch(p, packed, start, params, "mlp_values");
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(levelset_ext, CUDA, library) {
  library.impl("mlp_pack_", TORCH_BOX(&mlp_pack_));
  library.impl("mlp_project", TORCH_BOX(&mlp_project));
  library.impl("mlp_values", TORCH_BOX(&mlp_values));
}

}  // namespace levelset::glue
