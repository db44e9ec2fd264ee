// A multilayer perceptron F: R^d -> R^l as the compiled fields see it:
//
//   h_k = a_k(W_k h_{k-1} + U_k x + b_k),   F = W h + U x + b in the last layer,
//
// where h_0 is empty and either of W_k, U_k may be missing.
#pragma once

#include <cstdint>

namespace levelset {

enum class Activation : int {
  kNone = 0,
  kRelu = 1,      // max(z, 0)
  kSilu = 2,      // z sigmoid(s z)
  kSoftplus = 3,  // log(1 + exp(s z)) / s, and z where s z > threshold
  kSine = 4,      // sin(s z)
  kTanh = 5,      // tanh(z)
};

struct MlpLayer {
  std::int64_t outputs;  // n_k
  std::int64_t hidden;   // columns of W_k: n_{k-1}, or 0
  std::int64_t inputs;   // columns of U_k: d, or 0
  Activation activation;
  double sharpness;  // s above
  double threshold;  // of softplus
  // Where its parts begin in the packed parameters, in numbers of S; see csrc/cpu/mlp.h.
  std::int64_t bias_at, forward_at, backward_at;
  std::int64_t coarse_forward_at, coarse_backward_at;
};

// Parameters are packed for a vector unit of `lanes` numbers: a matrix of K rows and N columns is
// cut into panels of two vectors (the last one may be one vector wide), each stored row after row
// and padded with zeros.
template <typename S>
struct MlpNet {
  const S* packed;
  const std::uint32_t* coarse;  // W and [W U] in pairs of bfloat16 rows, or null
  const MlpLayer* layers;
  int count;               // layers, the linear one at the end among them
  std::int64_t dimension;  // d
  int outputs;             // l
};

// Room for the rows that one thread evaluates together. Leading dimensions are in numbers of S.
template <typename S>
struct MlpTile {
  std::int64_t capacity;  // most rows
  S* points;              // (capacity, d)
  S* values;              // (capacity, l)
  S* jacobian;            // (capacity, l, d)
  S* scratch;             // (capacity, scratch_stride)
  std::int64_t scratch_stride;
  // For every hidden layer k: h_k; a_k' at its pre-activations, which ReLU reads off h_k; and for
  // every output o, at o * (layers - 1) + k, the gradient of F_o with respect to the
  // pre-activations. Where that is not wanted afterwards, layers share memory by turns.
  S* const* hidden;
  S* const* slopes;
  S* const* deltas;
  const std::int64_t* stride;  // of a row of any of the three
  std::uint32_t* pairs;  // (padded capacity, pair_stride), room for a factor in bfloat16, or null
  std::int64_t pair_stride;
};

// One block of dL/dW = sum_i c_i delta_i h_i^T, the rows [begin, end) of the columns of `inputs`.
template <typename S>
struct WeightGradientParams {
  std::int64_t rows;      // n
  std::int64_t outputs;   // N, columns of deltas
  std::int64_t inputs;    // K, columns of hidden
  const S* deltas;        // (n, N)
  const S* hidden;        // (n, K)
  const S* coefficients;  // c, (n,)
  S* gradient;            // (N, K)
};

}  // namespace levelset
