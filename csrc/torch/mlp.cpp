// CPU ops of the compiled fields: check, allocate, let torch's threads share the rows.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "../cpu/mlp.h"
#include "checks.h"
#include "mlp_checks.h"
#include "rows.h"

namespace levelset::glue {
namespace {

// The layers, and where they are in `packed`, and in `coarse` if it is not empty.
std::vector<MlpLayer> read_layers(const Tensor& packed, const Tensor& coarse, const Tensor& layout,
                                  const Tensor& scales) {
  std::vector<MlpLayer> layers = check_layers(layout, scales);
  expect_dim(packed, "packed", "(numbers,)", 1);
  expect_contiguous(packed, "packed");
  expect_floating(packed, "packed");
  expect_dim(coarse, "coarse", "(numbers,)", 1);
  expect_contiguous(coarse, "coarse");
  expect_dtype(coarse, "coarse", ScalarType::Int);
  std::int64_t at = 0, coarse_at = 0;
  for (MlpLayer& layer : layers) {
    at = packed.scalar_type() == ScalarType::Double ? cpu::mlp_place<double>(layer, at)
                                                    : cpu::mlp_place<float>(layer, at);
    coarse_at = cpu::mlp_place_coarse(layer, coarse_at);
  }
  expect_shape(packed, "packed", "(numbers,)", {at});
  if (coarse.size(0) > 0) {
    expect_shape(coarse, "coarse", "(numbers,)", {coarse_at});
    require(packed.scalar_type() == ScalarType::Float && cpu::coarse_kernels() != nullptr,
            "coarse: expected no coarse weights for float64, or on this processor");
  }
  return layers;
}

template <typename S>
MlpNet<S> net_of(const Tensor& packed, const Tensor& coarse, const std::vector<MlpLayer>& layers) {
  const void* pairs = coarse.size(0) > 0 ? coarse.const_data_ptr() : nullptr;
  return {static_cast<const S*>(packed.const_data_ptr()),
          static_cast<const std::uint32_t*>(pairs),
          layers.data(),
          int(layers.size()),
          layers.front().inputs,
          int(layers.back().outputs)};
}

template <typename S>
cpu::Matrix<S> matrix_of(const std::optional<Tensor>& t) {
  if (!t.has_value()) return {nullptr, 0, 0, 0, 0};
  return {static_cast<const S*>(t->const_data_ptr()), t->size(0), t->size(1), t->stride(0),
          t->stride(1)};
}

void mlp_pack_(const Tensor& packed, const Tensor& coarse, const Tensor& layout,
               const Tensor& scales, std::int64_t index, const std::optional<Tensor>& hidden,
               const std::optional<Tensor>& inputs, const std::optional<Tensor>& bias) {
  const std::vector<MlpLayer> layers = read_layers(packed, coarse, layout, scales);
  check_weights(layers, index, packed, hidden, inputs, bias);
  const MlpLayer& layer = layers[index];
  with_wide_dtype(packed.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    cpu::mlp_pack<S>(layer, matrix_of<S>(hidden), matrix_of<S>(inputs),
                     bias.has_value() ? static_cast<const S*>(bias->const_data_ptr()) : nullptr,
                     bias.has_value() ? bias->stride(0) : 0,
                     static_cast<S*>(packed.mutable_data_ptr()));
    if constexpr (sizeof(S) == sizeof(float)) {
      if (coarse.size(0) > 0) {
        cpu::mlp_pack_coarse(layer, matrix_of<float>(hidden), matrix_of<float>(inputs),
                             static_cast<std::uint32_t*>(coarse.mutable_data_ptr()));
      }
    }
  });
}

// Runs work(tile) on up to `threads` threads, each with a tile of its own.
template <typename S, typename Work>
void with_tiles(const Tensor& like, const MlpNet<S>& net, std::int64_t rows, std::int64_t threads,
                bool with_deltas, bool keep, Work work) {
  const std::int64_t capacity = cpu::mlp_tile_rows<S>(rows, threads);
  const std::int64_t workers =
      std::clamp<std::int64_t>((rows + capacity - 1) / capacity, 1, threads);
  std::vector<cpu::MlpWorkspace<S>> rooms(workers,
                                          cpu::MlpWorkspace<S>(net, capacity, with_deltas, keep));
  const std::int64_t numbers = rooms.front().numbers();
  const Tensor memory = torch::stable::new_empty(like, Shape{workers * numbers});
  S* const start = static_cast<S*>(memory.mutable_data_ptr());
  torch::stable::parallel_for(0, workers, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t w = begin; w < end; ++w) work(rooms[w].tile(start + w * numbers));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mlp_project(
    const Tensor& packed, const Tensor& coarse, const Tensor& layout, const Tensor& scales,
    const Tensor& points, const Tensor& level, const std::optional<Tensor>& lower,
    const std::optional<Tensor>& upper, std::int64_t max_iters, double tol, double max_step,
    bool keep, std::int64_t threads, std::int64_t /*product*/) {
  const std::vector<MlpLayer> layers = read_layers(packed, coarse, layout, scales);
  const ProjectionTensors t =
      prepare_projection(layers, packed, points, level, lower, upper, max_iters, tol, max_step);
  require(threads >= 1, "threads: expected at least 1, got ", threads);
  const std::int64_t n = t.rows, l = layers.back().outputs;
  std::int64_t widths = 0;
  for (std::size_t k = 0; k + 1 < layers.size(); ++k) widths += layers[k].outputs;
  const Tensor hidden = torch::stable::new_empty(points, Shape{keep ? n * widths : 0});
  const Tensor deltas = torch::stable::new_empty(points, Shape{keep ? n * l * widths : 0});
  if (n > 0) {
    with_wide_dtype(points.scalar_type(), [&](auto zero) {
      using S = decltype(zero);
      cpu::MlpProjectParams<S> params{};
      t.describe<S>(params);
      params.net = net_of<S>(packed, coarse, layers);
      params.max_iters = max_iters;
      params.tol = tol;
      params.max_step = max_step;
      params.hidden = keep ? static_cast<S*>(hidden.mutable_data_ptr()) : nullptr;
      params.deltas = keep ? static_cast<S*>(deltas.mutable_data_ptr()) : nullptr;
      std::atomic<std::int64_t> next{0};
      with_tiles<S>(points, params.net, n, threads, true, keep,
                    [&](const MlpTile<S>& tile) { cpu::mlp_project(params, tile, next); });
    });
  }
  return {t.points, t.values, t.jacobian, t.status, t.iterations, hidden, deltas};
}

Tensor mlp_values(const Tensor& packed, const Tensor& coarse, const Tensor& layout,
                  const Tensor& scales, const Tensor& points, std::int64_t threads,
                  std::int64_t /*product*/) {
  const std::vector<MlpLayer> layers = read_layers(packed, coarse, layout, scales);
  check_points(layers, packed, points);
  const std::int64_t n = points.size(0), l = layers.back().outputs;
  require(threads >= 1, "threads: expected at least 1, got ", threads);
  const Tensor start = contiguous(points);
  const Tensor values = torch::stable::new_empty(points, Shape{n, l});
  if (n == 0) return values;
  with_wide_dtype(points.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    const MlpNet<S> net = net_of<S>(packed, coarse, layers);
    const S* const from = static_cast<const S*>(start.const_data_ptr());
    S* const to = static_cast<S*>(values.mutable_data_ptr());
    std::atomic<std::int64_t> next{0};
    with_tiles<S>(points, net, n, threads, false, false, [&](const MlpTile<S>& tile) {
      std::int64_t first;
      while ((first = next.fetch_add(tile.capacity)) < n) {
        cpu::mlp_values(net, from, to, tile, first, std::min(first + tile.capacity, n));
      }
    });
  });
  return values;
}

// dL/dW = sum_i c_i delta_i h_i^T, (N, K). Every number of it is summed by one thread and in order.
Tensor mlp_weight_gradient(const Tensor& deltas, const Tensor& hidden, const Tensor& coefficients) {
  expect_dim(deltas, "deltas", "(n, N)", 2);
  expect_dim(hidden, "hidden", "(n, K)", 2);
  expect_floating(deltas, "deltas");
  const std::int64_t n = deltas.size(0), outputs = deltas.size(1), inputs = hidden.size(1);
  expect_shape(hidden, "hidden", "(n, K)", {n, inputs});
  expect_shape(coefficients, "coefficients", "(n,)", {n});
  expect_same_kind(hidden, "hidden", deltas, "deltas");
  expect_same_kind(coefficients, "coefficients", deltas, "deltas");
  const Tensor left = contiguous(deltas), right = contiguous(hidden), c = contiguous(coefficients);
  const Tensor gradient = torch::stable::new_empty(deltas, Shape{outputs, inputs});
  if (outputs == 0 || inputs == 0) return gradient;
  with_wide_dtype(deltas.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    const auto& kernels = cpu::vector_kernels<S>();
    const WeightGradientParams<S> params{n,
                                         outputs,
                                         inputs,
                                         static_cast<const S*>(left.const_data_ptr()),
                                         static_cast<const S*>(right.const_data_ptr()),
                                         static_cast<const S*>(c.const_data_ptr()),
                                         static_cast<S*>(gradient.mutable_data_ptr())};
    const std::int64_t panels = (inputs + 2 * kernels.lanes - 1) / (2 * kernels.lanes);
    const std::int64_t room = cpu::gradient_room(outputs, kernels.lanes, kernels.block_rows);
    // Panels for one thread: enough sums to outweigh the cost of waking it.
    const std::int64_t work = std::max<std::int64_t>(1, n * outputs * 2 * kernels.lanes);
    const std::int64_t grain = std::max<std::int64_t>(1, 1'000'000 / work);
    torch::stable::parallel_for(0, panels, grain, [&](std::int64_t begin, std::int64_t end) {
      std::vector<S> memory(room);
      kernels.weight_gradient(params, begin, end, memory.data());
    });
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(levelset_ext, CPU, library) {
  library.impl("mlp_pack_", TORCH_BOX(&mlp_pack_));
  library.impl("mlp_project", TORCH_BOX(&mlp_project));
  library.impl("mlp_values", TORCH_BOX(&mlp_values));
  library.impl("mlp_weight_gradient", TORCH_BOX(&mlp_weight_gradient));
}

}  // namespace levelset::glue
