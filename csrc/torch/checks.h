// Argument checks of the ops. Every message names the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace levelset::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<std::int64_t>;

// Throws what becomes a Python RuntimeError. Torch's own check macro would put the place in this
// source before the message; a caller needs the name of the argument.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline Shape shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Shape(sizes.begin(), sizes.end());
}

std::string format(const Shape& shape);

// Throws unless `t` has exactly this shape. `symbols` names the dimensions, as in "(n, l, d)".
void expect_shape(const Tensor& t, const char* name, const char* symbols, const Shape& expected);
void expect_dim(const Tensor& t, const char* name, const char* symbols, std::int64_t dim);
void expect_dtype(const Tensor& t, const char* name, ScalarType expected);
void expect_same_device(const Tensor& t, const char* name, const Tensor& reference,
                        const char* reference_name);
void expect_same_kind(const Tensor& t, const char* name, const Tensor& reference,
                      const char* reference_name);        // dtype and device
void expect_floating(const Tensor& t, const char* name);  // of a dtype its device computes in
void expect_outputs(std::int64_t l);

// What is wrong when an op that writes in place is given memory it cannot write to.
void expect_contiguous(const Tensor& t, const char* name);

}  // namespace levelset::glue
