#include "checks.h"

#include "../core/limits.h"

namespace levelset::glue {
namespace {

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Char: return "int8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

std::string device_name(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : std::string("cpu");
}

}  // namespace

std::string format(const Shape& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

void expect_shape(const Tensor& t, const char* name, const char* symbols, const Shape& expected) {
  const Shape shape = shape_of(t);
  require(shape == expected, name, ": expected ", symbols, " = ", format(expected), ", got ",
          format(shape));
}

void expect_dim(const Tensor& t, const char* name, const char* symbols, std::int64_t dim) {
  require(t.dim() == dim, name, ": expected a tensor ", symbols, ", got shape ",
          format(shape_of(t)));
}

void expect_dtype(const Tensor& t, const char* name, ScalarType expected) {
  require(t.scalar_type() == expected, name, ": expected dtype ", dtype_name(expected), ", got ",
          dtype_name(t.scalar_type()));
}

void expect_same_device(const Tensor& t, const char* name, const Tensor& reference,
                        const char* reference_name) {
  require(device_name(t) == device_name(reference), name, ": expected the device of ",
          reference_name, " (", device_name(reference), "), got ", device_name(t));
}

void expect_same_kind(const Tensor& t, const char* name, const Tensor& reference,
                      const char* reference_name) {
  require(t.scalar_type() == reference.scalar_type(), name, ": expected the dtype of ",
          reference_name, " (", dtype_name(reference.scalar_type()), "), got ",
          dtype_name(t.scalar_type()));
  expect_same_device(t, name, reference, reference_name);
}

void expect_floating(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  const bool wide = dtype == ScalarType::Float || dtype == ScalarType::Double;
  const bool narrow = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  require(wide || (narrow && t.is_cuda()), name, ": expected float32 or float64",
          t.is_cuda() ? ", float16 or bfloat16" : " on the CPU", ", got ", dtype_name(dtype));
}

void expect_outputs(std::int64_t l) {
  require(l >= 1 && l <= kMaxOutputs, "jacobian: expected 1 to ", kMaxOutputs,
          " outputs l in (n, l, d), got ", l);
}

void expect_contiguous(const Tensor& t, const char* name) {
  require(t.is_contiguous(), name, ": expected a contiguous tensor, as it is written in place");
}

}  // namespace levelset::glue
