#include "mlp_checks.h"

#include <limits>

namespace levelset::glue {

std::vector<MlpLayer> check_layers(const Tensor& layout, const Tensor& scales) {
  expect_dim(layout, "layout", "(layers, 4)", 2);
  const std::int64_t count = layout.size(0);
  require(count >= 1, "layout: expected at least one layer, got none");
  expect_shape(layout, "layout", "(layers, 4)", {count, kLayoutColumns});
  expect_dtype(layout, "layout", ScalarType::Long);
  expect_contiguous(layout, "layout");
  expect_shape(scales, "scales", "(layers, 2)", {count, kScaleColumns});
  expect_dtype(scales, "scales", ScalarType::Double);
  expect_contiguous(scales, "scales");
  require(layout.is_cpu() && scales.is_cpu(), "layout, scales: expected tensors on the CPU");
  const auto* numbers = static_cast<const std::int64_t*>(layout.const_data_ptr());
  const auto* factors = static_cast<const double*>(scales.const_data_ptr());
  std::vector<MlpLayer> layers;
  std::int64_t before = 0, dimension = 0;
  for (std::int64_t k = 0; k < count; ++k) {
    const std::int64_t* row = numbers + k * kLayoutColumns;
    MlpLayer layer{};
    layer.outputs = row[0];
    layer.hidden = row[1];
    layer.inputs = row[2];
    layer.activation = Activation(row[3]);
    layer.sharpness = factors[k * kScaleColumns];
    layer.threshold = factors[k * kScaleColumns + 1];
    if (k == 0) dimension = layer.inputs;
    require(layer.outputs >= 1 && dimension >= 1 && layer.hidden == before &&
                (layer.inputs == 0 || layer.inputs == dimension) && row[3] >= 0 && row[3] <= 5,
            "layout: layer ", k, " does not fit the ones before it");
    before = layer.outputs;
    layers.push_back(layer);
  }
  require(layers.back().activation == Activation::kNone,
          "layout: expected a last layer without activation");
  return layers;
}

void check_weights(const std::vector<MlpLayer>& layers, std::int64_t index, const Tensor& packed,
                   const std::optional<Tensor>& hidden, const std::optional<Tensor>& inputs,
                   const std::optional<Tensor>& bias) {
  require(index >= 0 && index < std::int64_t(layers.size()), "index: expected a layer, 0 to ",
          layers.size() - 1, ", got ", index);
  const MlpLayer& layer = layers[index];
  const auto check = [&](const std::optional<Tensor>& t, const char* name, std::int64_t columns) {
    require(t.has_value() == (columns > 0), name, ": expected ", columns > 0 ? "a matrix" : "None",
            " for layer ", index);
    if (!t.has_value()) return;
    expect_shape(*t, name, "(outputs, columns)", {layer.outputs, columns});
    expect_same_kind(*t, name, packed, "packed");
  };
  check(hidden, "hidden", layer.hidden);
  check(inputs, "inputs", layer.inputs);
  if (bias.has_value()) {
    expect_shape(*bias, "bias", "(outputs,)", {layer.outputs});
    expect_same_kind(*bias, "bias", packed, "packed");
  }
}

void check_points(const std::vector<MlpLayer>& layers, const Tensor& packed, const Tensor& points) {
  expect_dim(points, "points", "(n, d)", 2);
  expect_shape(points, "points", "(n, d)", {points.size(0), layers.front().inputs});
  expect_same_kind(points, "points", packed, "packed");
}

ProjectionTensors prepare_projection(const std::vector<MlpLayer>& layers, const Tensor& packed,
                                     const Tensor& points, const Tensor& level,
                                     const std::optional<Tensor>& lower,
                                     const std::optional<Tensor>& upper, std::int64_t max_iters,
                                     double tol, double max_step) {
  check_points(layers, packed, points);
  const std::int64_t n = points.size(0), d = layers.front().inputs, l = layers.back().outputs;
  expect_outputs(l);
  expect_dim(level, "level", "(n, l) or (1, l)", 2);
  const bool one_level = level.size(0) == 1;
  expect_shape(level, "level", "(n, l) or (1, l)", {one_level ? 1 : n, l});
  expect_same_kind(level, "level", packed, "packed");
  const auto corner = [&](const std::optional<Tensor>& t, const char* name) {
    if (!t.has_value()) return t;
    expect_shape(*t, name, "(d,)", {d});
    expect_same_kind(*t, name, packed, "packed");
    return std::optional(contiguous(*t));
  };
  const std::optional<Tensor> low = corner(lower, "lower"), high = corner(upper, "upper");
  require(max_iters >= 0 && max_iters <= std::numeric_limits<std::int32_t>::max(),
          "max_iters: expected 0 to 2^31 - 1, got ", max_iters);
  require(tol >= 0, "tol: expected a number >= 0, got ", tol);
  require(max_step > 0, "max_step: expected a length > 0, got ", max_step);
  return {contiguous(points),
          contiguous(level),
          low,
          high,
          n,
          one_level ? 0 : l,
          torch::stable::new_empty(points, Shape{n, d}),
          torch::stable::new_empty(points, Shape{n, l}),
          torch::stable::new_empty(points, Shape{n, l, d}),
          torch::stable::new_empty(points, Shape{n}, ScalarType::Char),
          torch::stable::new_empty(points, Shape{n}, ScalarType::Int)};
}

}  // namespace levelset::glue
