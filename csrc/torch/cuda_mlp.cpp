// CUDA ops of the compiled fields, float32: check, allocate, one launch on the current stream, or
// two where the first evaluation is coarse. What was found keeps no tape here, so `keep` must be
// false.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../cuda/launch.h"
#include "cuda.h"
#include "mlp_checks.h"

namespace levelset::glue {
namespace {

// The kernels read four numbers at a time.
void expect_aligned(const Tensor& t, const char* name) {
  require(reinterpret_cast<std::uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
          ": expected memory at a multiple of 16 bytes, got a view that begins between two");
}

struct Plan {
  std::vector<MlpLayer> layers;
  cuda::MlpPlan plan;
};

Plan read_plan(const Tensor& packed, const Tensor& coarse, const Tensor& layout,
               const Tensor& scales) {
  Plan p{check_layers(layout, scales), {}};
  p.plan = cuda::mlp_plan(p.layers.data(), int(p.layers.size()), p.layers.front().inputs);
  require(p.plan.width > 0, "layout: expected at most ", cuda::kMlpLayers, " layers of up to ",
          cuda::kMlpWidths[3], " units, d up to ", cuda::kMlpDimension, " and l up to ",
          cuda::kMlpOutputs, " on CUDA");
  require(packed.is_cuda(), "packed: expected a CUDA tensor");
  expect_dtype(packed, "packed", ScalarType::Float);
  expect_shape(packed, "packed", "(numbers,)", {p.plan.packed});
  expect_contiguous(packed, "packed");
  expect_aligned(packed, "packed");
  expect_dtype(coarse, "coarse", ScalarType::Int);
  expect_dim(coarse, "coarse", "(pairs,)", 1);
  expect_same_device(coarse, "coarse", packed, "packed");
  if (coarse.size(0) > 0) {
    expect_shape(coarse, "coarse", "(pairs,)", {p.plan.coarse});
    expect_contiguous(coarse, "coarse");
    expect_aligned(coarse, "coarse");
  }
  return p;
}

void mlp_pack_(const Tensor& packed, const Tensor& coarse, const Tensor& layout,
               const Tensor& scales, std::int64_t index, const std::optional<Tensor>& hidden,
               const std::optional<Tensor>& inputs, const std::optional<Tensor>& bias) {
  const DeviceGuard guard(packed.get_device_index());
  const Plan p = read_plan(packed, coarse, layout, scales);
  check_weights(p.layers, index, packed, hidden, inputs, bias);
  const MlpLayer& layer = p.layers[index];
  const auto matrix = [](const std::optional<Tensor>& t) {
    if (!t.has_value()) return cuda::MlpMatrix{nullptr, 0, 0};
    return cuda::MlpMatrix{static_cast<const float*>(t->const_data_ptr()), t->stride(0),
                           t->stride(1)};
  };
  const bool pairs =
      coarse.size(0) > 0 && cuda::mlp_multiplies(p.layers.data(), int(p.layers.size()), int(index));
  const cuda::MlpPackParams params{
      p.plan.width,
      layer.outputs,
      layer.hidden,
      layer.inputs,
      matrix(hidden),
      matrix(inputs),
      bias.has_value() ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
      bias.has_value() ? bias->stride(0) : 0,
      static_cast<float*>(packed.mutable_data_ptr()) + layer.bias_at,
      pairs ? static_cast<std::uint32_t*>(coarse.mutable_data_ptr()) + layer.coarse_forward_at
            : nullptr};
  check_launch(cuda::mlp_pack(params, current_stream(packed)), "mlp_pack_");
}

// Launches the kernel on the rows that `params` names, with the rest of the parameters and scratch
// memory; where there are coarse weights and updates to be made, an early coarse evaluation first.
void launch(const Plan& p, const Tensor& packed, const Tensor& coarse, const Tensor& like,
            cuda::MlpParams& params, std::int64_t product, const char* op) {
  const std::int64_t layers = std::int64_t(p.layers.size());
  for (std::int64_t k = 0; k < layers; ++k) params.layers[k] = p.layers[k];
  params.count = int(layers);
  params.dimension = int(p.layers.front().inputs);
  params.outputs = int(p.layers.back().outputs);
  params.packed = static_cast<const float*>(packed.const_data_ptr());

  bool has_tensor = false;
  check_launch(cuda::mlp_tensor(params, p.plan, &has_tensor), op);
  require(product >= 0 && product <= 2,
          "product: expected 0 (automatic), 1 (float32) or 2 (tensor cores), got ", product);
  require(product != 2 || has_tensor, "product: expected tensor cores on this device for 2");
  const cuda::MlpProduct exact = product > 0
                                     ? cuda::MlpProduct(product)
                                     : cuda::mlp_product(p.layers.data(), int(layers), has_tensor);
  const bool early =
      coarse.size(0) > 0 && has_tensor && params.jacobian != nullptr && params.max_iters > 0;

  std::int64_t blocks = 0, early_blocks = 0;
  check_launch(cuda::mlp_blocks(params, p.plan, exact, &blocks), op);
  if (early) {
    check_launch(cuda::mlp_blocks(params, p.plan, cuda::MlpProduct::kCoarse, &early_blocks), op);
  }
  const std::int64_t slopes = params.jacobian != nullptr ? (layers - 1) * cuda::kMlpTile : 0;
  const Tensor scratch =
      torch::stable::new_empty(like, Shape{std::max(blocks, early_blocks) * slopes});
  const Tensor next = torch::stable::new_empty(like, Shape{1}, ScalarType::Long);
  params.slopes = static_cast<float*>(scratch.mutable_data_ptr());
  params.next = static_cast<unsigned long long*>(next.mutable_data_ptr());
  const cudaStream_t stream = current_stream(like);
  if (early) {
    params.coarse = static_cast<const std::uint32_t*>(coarse.const_data_ptr());
    check_launch(cuda::mlp_newton(params, p.plan, cuda::MlpProduct::kCoarse, early_blocks, stream),
                 op);
    params.start = params.points;
    params.begun = params.iterations;
  }
  check_launch(cuda::mlp_newton(params, p.plan, exact, blocks, stream), op);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlp_project(
    const Tensor& packed, const Tensor& coarse, const Tensor& layout, const Tensor& scales,
    const Tensor& points, const Tensor& level, const std::optional<Tensor>& lower,
    const std::optional<Tensor>& upper, std::int64_t max_iters, double tol, double max_step,
    bool keep, std::int64_t /*threads*/, std::int64_t product) {
  const DeviceGuard guard(packed.get_device_index());
  const Plan p = read_plan(packed, coarse, layout, scales);
  const ProjectionTensors t =
      prepare_projection(p.layers, packed, points, level, lower, upper, max_iters, tol, max_step);
  require(!keep, "keep: expected false on CUDA");
  const Tensor nothing = torch::stable::new_empty(points, Shape{0});
  if (t.rows > 0) {
    cuda::MlpParams params{};
    t.describe<float>(params);
    params.max_iters = max_iters;
    params.tol = tol;
    params.max_step = max_step;
    launch(p, packed, coarse, points, params, product, "mlp_project");
  }
  return {t.points, t.values, t.jacobian, t.status, t.iterations, nothing, nothing};
}

Tensor mlp_values(const Tensor& packed, const Tensor& coarse, const Tensor& layout,
                  const Tensor& scales, const Tensor& points, std::int64_t /*threads*/,
                  std::int64_t product) {
  const DeviceGuard guard(packed.get_device_index());
  const Plan p = read_plan(packed, coarse, layout, scales);
  check_points(p.layers, packed, points);
  const std::int64_t n = points.size(0);
  const Tensor values = torch::stable::new_empty(points, Shape{n, p.layers.back().outputs});
  if (n == 0) return values;
  const Tensor start = contiguous(points);
  cuda::MlpParams params{};
  params.rows = n;
  params.start = static_cast<const float*>(start.const_data_ptr());
  params.values = static_cast<float*>(values.mutable_data_ptr());
  launch(p, packed, coarse, points, params, product, "mlp_values");
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(levelset_ext, CUDA, library) {
  library.impl("mlp_pack_", TORCH_BOX(&mlp_pack_));
  library.impl("mlp_project", TORCH_BOX(&mlp_project));
  library.impl("mlp_values", TORCH_BOX(&mlp_values));
}

}  // namespace levelset::glue
