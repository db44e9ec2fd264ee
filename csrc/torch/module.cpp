// The Python module levelset_ext._C: op schemas for torch, and what Python must not copy by hand.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <cstddef>

#include "../core/limits.h"
#include "../core/params.h"
#include "../core/status.h"

// `team` chooses who works on a row on CUDA: 0 automatic, 1 thread, 2 warp, 3 block. The CPU
// ignores it.
STABLE_TORCH_LIBRARY(levelset_ext, library) {
  library.def("pinv_apply(Tensor jacobian, Tensor residual, int team=0) -> (Tensor, Tensor)");
  library.def("pinv_adjoint(Tensor jacobian, Tensor gradient, int team=0) -> (Tensor, Tensor)");
  library.def(
      "newton_update(Tensor points, Tensor values, Tensor jacobian, Tensor level, Tensor? status, "
      "Tensor? lower, Tensor? upper, float tol, float max_step, int team=0) -> (Tensor, Tensor)");
  library.def(
      "newton_update_(Tensor(a!) points, Tensor(b!) status, Tensor values, Tensor jacobian, "
      "Tensor level, Tensor? index, Tensor? lower, Tensor? upper, float tol, float max_step, "
      "int team=0) -> ()");
  library.def(
      "bracket_update_(Tensor(a!) points, Tensor(b!) status, Tensor(c!) bracket, Tensor start, "
      "Tensor end, Tensor values, Tensor level, Tensor? index, float tol, int variant, bool last, "
      "int team=0) -> ()");
  library.def("nearest(Tensor query, Tensor cloud) -> (Tensor, Tensor)");
}

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
