// CUDA side of the ops: guard the device, check, allocate, launch on the current stream, check the
// launch. Compiles and links without a GPU and against a CPU build of torch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include "../cuda/launch.h"
#include "bracket.h"
#include "cuda.h"
#include "rows.h"

// The one symbol that a CPU build of torch lacks. Weak, it lets the module load there.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) __attribute__((weak));

namespace levelset::glue {
namespace {

// Weak, it is also no reason for a linker to keep the library that defines it among those that this
// module needs, and then a CUDA build of torch leaves it null. There the library is loaded already.
decltype(&aoti_torch_get_current_cuda_stream) find_current_stream() {
  if (aoti_torch_get_current_cuda_stream != nullptr) return aoti_torch_get_current_cuda_stream;
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<decltype(&aoti_torch_get_current_cuda_stream)>(
      dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

cudaStream_t current_stream(const Tensor& t) {
  static const auto current = find_current_stream();
  require(current != nullptr, "levelset_ext: this torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* op) {
  require(error == cudaSuccess, op, ": CUDA launch failed: ", cudaGetErrorString(error));
}

namespace {

void expect_team(std::int64_t team) {
  require(team >= 0 && team <= 3,
          "team: expected 0 (automatic), 1 (thread), 2 (warp) or 3 (block per row), got ", team);
}

template <typename Run>
void with_dtype(ScalarType dtype, Run run) {
  switch (dtype) {
    case ScalarType::Half: return run(__half{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    default: return with_wide_dtype(dtype, run);
  }
}

PinvTensors run_apply(const Tensor& jacobian, const Tensor& residual,
                      const std::optional<Tensor>& out, std::int64_t team) {
  const DeviceGuard guard(jacobian.get_device_index());
  expect_team(team);
  PinvTensors t = prepare_apply(jacobian, residual, out);
  with_dtype(jacobian.scalar_type(), [&](auto zero) {
    check_launch(
        cuda::pinv_apply(t.params<decltype(zero)>(), cuda::RowTeam(team), current_stream(jacobian)),
        "pinv_apply");
  });
  return t;
}

std::tuple<Tensor, Tensor> pinv_apply(const Tensor& jacobian, const Tensor& residual,
                                      std::int64_t team) {
  const PinvTensors t = run_apply(jacobian, residual, std::nullopt, team);
  return {t.output, t.status};
}

Tensor pinv_apply_out(const Tensor& jacobian, const Tensor& residual, const Tensor& out,
                      std::int64_t team) {
  return run_apply(jacobian, residual, out, team).status;
}

std::tuple<Tensor, Tensor> pinv_adjoint(const Tensor& jacobian, const Tensor& gradient,
                                        std::int64_t team) {
  const DeviceGuard guard(jacobian.get_device_index());
  expect_team(team);
  const PinvTensors t = prepare_adjoint(jacobian, gradient);
  with_dtype(jacobian.scalar_type(), [&](auto zero) {
    check_launch(cuda::pinv_adjoint(t.params<decltype(zero)>(), cuda::RowTeam(team),
                                    current_stream(jacobian)),
                 "pinv_adjoint");
  });
  return {t.output, t.status};
}

void run_newton(const NewtonTensors& t, std::int64_t team) {
  expect_team(team);
  with_dtype(t.points.scalar_type(), [&](auto zero) {
    check_launch(cuda::newton_update(t.params<decltype(zero)>(), cuda::RowTeam(team),
                                     current_stream(t.points)),
                 "newton_update");
  });
}

std::tuple<Tensor, Tensor> newton_update(const Tensor& points, const Tensor& values,
                                         const Tensor& jacobian, const Tensor& level,
                                         const std::optional<Tensor>& status,
                                         const std::optional<Tensor>& lower,
                                         const std::optional<Tensor>& upper, double tol,
                                         double max_step, std::int64_t team) {
  const DeviceGuard guard(points.get_device_index());
  const NewtonTensors t = prepare_newton(points, values, jacobian, level, status, lower, upper, tol,
                                         max_step, std::nullopt);
  run_newton(t, team);
  return {t.next, t.status};
}

Tensor newton_update_out(const Tensor& points, const Tensor& values, const Tensor& jacobian,
                         const Tensor& level, const std::optional<Tensor>& status,
                         const std::optional<Tensor>& lower, const std::optional<Tensor>& upper,
                         double tol, double max_step, const Tensor& out, std::int64_t team) {
  const DeviceGuard guard(points.get_device_index());
  const NewtonTensors t =
      prepare_newton(points, values, jacobian, level, status, lower, upper, tol, max_step, out);
  run_newton(t, team);
  return t.status;
}

void newton_update_(const Tensor& points, const Tensor& status, const Tensor& values,
                    const Tensor& jacobian, const Tensor& level, const std::optional<Tensor>& index,
                    const std::optional<Tensor>& lower, const std::optional<Tensor>& upper,
                    double tol, double max_step, std::int64_t team) {
  const DeviceGuard guard(points.get_device_index());
  const NewtonTensors t = prepare_newton_inplace(points, status, values, jacobian, level, index,
                                                 lower, upper, tol, max_step);
  run_newton(t, team);
}

void bracket_update_(const Tensor& points, const Tensor& status, const Tensor& bracket,
                     const Tensor& start, const Tensor& end, const Tensor& values,
                     const Tensor& level, const std::optional<Tensor>& index, double tol,
                     std::int64_t variant, bool last, std::int64_t team) {
  const DeviceGuard guard(points.get_device_index());
  expect_team(team);
  const BracketTensors t = prepare_bracket(points, status, bracket, start, end, values, level,
                                           index, tol, variant, last);
  with_dtype(points.scalar_type(), [&](auto zero) {
    check_launch(cuda::bracket_update(t.params<decltype(zero)>(), cuda::RowTeam(team),
                                      current_stream(points)),
                 "bracket_update_");
  });
}

std::tuple<Tensor, Tensor> nearest(const Tensor& query, const Tensor& cloud) {
  const DeviceGuard guard(query.get_device_index());
  expect_dim(query, "query", "(n, d)", 2);
  expect_dim(cloud, "cloud", "(m, d)", 2);
  expect_floating(query, "query");
  expect_same_kind(cloud, "cloud", query, "query");
  const std::int64_t n = query.size(0), m = cloud.size(0), d = query.size(1);
  require(m >= 1, "cloud: expected at least one point, got ", format(shape_of(cloud)));
  expect_shape(cloud, "cloud", "(m, d)", {m, d});

  // Distances are computed in float32 or float64.
  const ScalarType stored = query.scalar_type();
  const ScalarType wide = stored == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto widen = [&](const Tensor& t) {
    return torch::stable::contiguous(stored == wide ? t : torch::stable::to(t, wide));
  };
  const Tensor x = widen(query), points = widen(cloud);
  const std::int64_t splits = cuda::nearest_splits(n, m);
  const Tensor partial_distance = torch::stable::new_empty(x, Shape{splits, n});
  const Tensor partial_index = torch::stable::new_empty(x, Shape{splits, n}, ScalarType::Long);
  const Tensor distance = torch::stable::new_empty(x, Shape{n});
  const Tensor index = torch::stable::new_empty(x, Shape{n}, ScalarType::Long);
  with_wide_dtype(wide, [&](auto zero) {
    using S = decltype(zero);
    const NearestParams<S> p{n,
                             m,
                             d,
                             static_cast<const S*>(x.const_data_ptr()),
                             static_cast<const S*>(points.const_data_ptr()),
                             splits,
                             static_cast<S*>(partial_distance.mutable_data_ptr()),
                             static_cast<std::int64_t*>(partial_index.mutable_data_ptr()),
                             static_cast<S*>(distance.mutable_data_ptr()),
                             static_cast<std::int64_t*>(index.mutable_data_ptr())};
    check_launch(cuda::nearest(p, current_stream(x)), "nearest");
  });
  return {stored == wide ? distance : torch::stable::to(distance, stored), index};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(levelset_ext, CUDA, library) {
  library.impl("pinv_apply", TORCH_BOX(&pinv_apply));
  library.impl("pinv_apply_out", TORCH_BOX(&pinv_apply_out));
  library.impl("pinv_adjoint", TORCH_BOX(&pinv_adjoint));
  library.impl("newton_update", TORCH_BOX(&newton_update));
  library.impl("newton_update_out", TORCH_BOX(&newton_update_out));
  library.impl("newton_update_", TORCH_BOX(&newton_update_));
  library.impl("bracket_update_", TORCH_BOX(&bracket_update_));
  library.impl("nearest", TORCH_BOX(&nearest));
}

}  // namespace levelset::glue
