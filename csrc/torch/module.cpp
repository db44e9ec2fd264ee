// The Python module levelset_ext._C: op schemas for torch, and what Python must not copy by hand.
// The pybind11 that torch brings is not part of its stable ABI, and before 2.13 refuses to be
// included where that is asked for.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma pop_macro("TORCH_TARGET_VERSION")
#include <torch/csrc/stable/library.h>

#include <cstddef>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../core/limits.h"
#include "../core/params.h"
#include "../core/status.h"
#include "../cpu/mlp.h"
#include "../cuda/mlp_plan.h"
#if defined(LEVELSET_WITH_CUDA)
#include "../cuda/launch.h"
#endif

// `team` chooses who works on a row on CUDA: 0 automatic, 1 thread, 2 warp, 3 block. The CPU
// ignores it.
STABLE_TORCH_LIBRARY(levelset_ext, library) {
  library.def("pinv_apply(Tensor jacobian, Tensor residual, int team=0) -> (Tensor, Tensor)");
  library.def(
      "pinv_apply_out(Tensor jacobian, Tensor residual, Tensor(a!) out, int team=0) -> Tensor");
  library.def("pinv_adjoint(Tensor jacobian, Tensor gradient, int team=0) -> (Tensor, Tensor)");
  library.def(
      "newton_update(Tensor points, Tensor values, Tensor jacobian, Tensor level, Tensor? status, "
      "Tensor? lower, Tensor? upper, float tol, float max_step, int team=0) -> (Tensor, Tensor)");
  library.def(
      "newton_update_out(Tensor points, Tensor values, Tensor jacobian, Tensor level, Tensor? "
      "status, Tensor? lower, Tensor? upper, float tol, float max_step, Tensor(a!) out, int "
      "team=0) "
      "-> Tensor");
  library.def(
      "newton_update_(Tensor(a!) points, Tensor(b!) status, Tensor values, Tensor jacobian, "
      "Tensor level, Tensor? index, Tensor? lower, Tensor? upper, float tol, float max_step, "
      "int team=0) -> ()");
  library.def(
      "bracket_update_(Tensor(a!) points, Tensor(b!) status, Tensor(c!) bracket, Tensor start, "
      "Tensor end, Tensor values, Tensor level, Tensor? index, float tol, int variant, bool last, "
      "int team=0) -> ()");
  library.def("nearest(Tensor query, Tensor cloud) -> (Tensor, Tensor)");
  // A compiled field: `product` chooses how matrices are multiplied on CUDA: 0 automatic, 1
  // float32, 2 tensor cores; layout (layers, 7) is outputs, hidden, inputs, activation and the
  // three places of mlp_place; scales (layers, 2) is sharpness and threshold.
  library.def(
      "mlp_pack_(Tensor(a!) packed, Tensor(b!) coarse, Tensor layout, Tensor scales, int index, "
      "Tensor? hidden, "
      "Tensor? inputs, Tensor? bias) -> ()");
  library.def(
      "mlp_project(Tensor packed, Tensor coarse, Tensor layout, Tensor scales, Tensor points, "
      "Tensor level, "
      "Tensor? lower, Tensor? upper, int max_iters, float tol, float max_step, bool keep, "
      "int threads, int product=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "mlp_values(Tensor packed, Tensor coarse, Tensor layout, Tensor scales, Tensor points, int "
      "threads, int product=0) -> Tensor");
  library.def("mlp_weight_gradient(Tensor deltas, Tensor hidden, Tensor coefficients) -> Tensor");
}

namespace {

// Numbers that a layer with so many outputs and columns takes among the packed parameters, and
// among the coarse ones.
std::tuple<std::int64_t, std::int64_t> mlp_packed_size(std::int64_t outputs, std::int64_t hidden,
                                                       std::int64_t inputs, bool double_precision) {
  levelset::MlpLayer layer{};
  layer.outputs = outputs;
  layer.hidden = hidden;
  layer.inputs = inputs;
  const std::int64_t size = double_precision ? levelset::cpu::mlp_place<double>(layer, 0)
                                             : levelset::cpu::mlp_place<float>(layer, 0);
  return {size, levelset::cpu::mlp_place_coarse(layer, 0)};
}

// What the fused CUDA kernel needs for a network, given (outputs, hidden, inputs) of every layer:
// (numbers of packed parameters, bytes of shared memory a block, pairs of coarse parameters), or
// None where it takes no such network or is not in this build.
std::optional<std::tuple<std::int64_t, int, std::int64_t>> mlp_cuda_plan(
    const std::vector<std::tuple<std::int64_t, std::int64_t, std::int64_t>>& shapes) {
#if defined(LEVELSET_WITH_CUDA)
  std::vector<levelset::MlpLayer> layers;
  for (const auto& [outputs, hidden, inputs] : shapes) {
    levelset::MlpLayer layer{};
    layer.outputs = outputs;
    layer.hidden = hidden;
    layer.inputs = inputs;
    layers.push_back(layer);
  }
  if (layers.empty()) return std::nullopt;
  const levelset::cuda::MlpPlan plan =
      levelset::cuda::mlp_plan(layers.data(), int(layers.size()), layers.front().inputs);
  if (plan.width > 0) return std::tuple(plan.packed, plan.shared_bytes, plan.coarse);
#endif
  return std::nullopt;
}

// Bytes of shared memory that a block of the fused CUDA kernel may ask for on a device. torch's own
// device properties have had this number under one name or none.
int mlp_cuda_room(int device) {
#if defined(LEVELSET_WITH_CUDA)
  int bytes = 0;
  const cudaError_t error = levelset::cuda::mlp_shared_memory(device, &bytes);
  if (error != cudaSuccess) {
    throw std::runtime_error("mlp_cuda_room: device " + std::to_string(device) + ": " +
                             cudaGetErrorString(error));
  }
  return bytes;
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using levelset::RowStatus;
  module.doc() = "Compiled ops of levelset_ext; importing it registers torch.ops.levelset_ext.*";
  module.attr("__version__") = LEVELSET_VERSION;
  module.attr("max_outputs") = levelset::kMaxOutputs;
  module.attr("rank_tolerance_float32") = double(levelset::RankTolerance<float>::value);
  module.attr("rank_tolerance_float64") = levelset::RankTolerance<double>::value;

  pybind11::dict status;
  status["CONVERGED"] = int(RowStatus::kConverged);
  status["RUNNING"] = int(RowStatus::kRunning);
  status["MAX_ITERATIONS"] = int(RowStatus::kMaxIterations);
  status["RANK_DEFICIENT"] = int(RowStatus::kRankDeficient);
  status["NON_FINITE"] = int(RowStatus::kNonFinite);
  status["NOT_BRACKETED"] = int(RowStatus::kNotBracketed);
  status["STALLED"] = int(RowStatus::kStalled);
  module.attr("status_codes") = status;

  using levelset::BracketVariant;
  pybind11::dict variants;
  variants["regula_falsi"] = int(BracketVariant::kRegulaFalsi);
  variants["bisection"] = int(BracketVariant::kBisection);
  variants["illinois"] = int(BracketVariant::kIllinois);
  variants["chandrupatla"] = int(BracketVariant::kChandrupatla);
  variants["anderson_bjorck"] = int(BracketVariant::kAndersonBjorck);
  module.attr("bracket_variants") = variants;
  module.attr("bracket_columns") = levelset::kBracketColumns;
  module.attr("bracket_at") = offsetof(levelset::BracketRow, at) / sizeof(double);
  module.attr("bracket_value") = offsetof(levelset::BracketRow, newest.value) / sizeof(double);

  pybind11::dict activations;
  activations["none"] = int(levelset::Activation::kNone);
  activations["relu"] = int(levelset::Activation::kRelu);
  activations["silu"] = int(levelset::Activation::kSilu);
  activations["softplus"] = int(levelset::Activation::kSoftplus);
  activations["sine"] = int(levelset::Activation::kSine);
  activations["tanh"] = int(levelset::Activation::kTanh);
  module.attr("mlp_activations") = activations;
  module.def("mlp_packed_size", &mlp_packed_size, pybind11::arg("outputs"), pybind11::arg("hidden"),
             pybind11::arg("inputs"), pybind11::arg("double_precision"));
  module.def("mlp_cuda_plan", &mlp_cuda_plan, pybind11::arg("shapes"));
  module.def("mlp_cuda_room", &mlp_cuda_room, pybind11::arg("device"));
  const levelset::cpu::CoarseKernels* const coarse = levelset::cpu::coarse_kernels();
  module.attr("mlp_mixed") = coarse != nullptr ? pybind11::object(pybind11::str(coarse->name))
                                               : pybind11::object(pybind11::none());
  module.attr("mlp_vector_bytes") =
      int(levelset::cpu::vector_kernels<float>().lanes * sizeof(float));

  pybind11::dict build;
  build["compiler"] = LEVELSET_COMPILER;
  build["torch_headers"] = LEVELSET_TORCH_VERSION;
#if defined(LEVELSET_WITH_CUDA)
  build["cuda"] = true;
  build["cuda_toolkit"] = LEVELSET_CUDA_VERSION;
  build["cuda_architectures"] = LEVELSET_CUDA_ARCHITECTURES;
#else
  build["cuda"] = false;
  build["cuda_toolkit"] = pybind11::none();
  build["cuda_architectures"] = "";
#endif
  module.attr("build") = build;
}
