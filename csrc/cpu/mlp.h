// Newton's iteration on a multilayer perceptron with everything fused: a thread holds a tile of
// rows, evaluates F and D_xF of all of them layer by layer, updates them, and gives the place of a
// row that is done to the next one that waits.
#pragma once

#include <atomic>
#include <vector>

#include "../core/mlp_net.h"
#include "vector_kernels.h"

namespace levelset::cpu {

template <typename S>
struct Matrix {
  const S* at;
  std::int64_t rows, columns, row_stride, column_stride;
};

// Sets where the bias, [U W]^T and [W U] of a layer are packed, from `at` on; returns where the
// next layer begins.
template <typename S>
std::int64_t mlp_place(MlpLayer& layer, std::int64_t at);

// Packs one layer: W (n_k, hidden), U (n_k, inputs), bias (n_k,) or null.
template <typename S>
void mlp_pack(const MlpLayer& layer, Matrix<S> hidden, Matrix<S> inputs, const S* bias,
              std::int64_t bias_stride, S* packed);

// The same for the coarse products: places, in numbers of 32 bits, and what is packed there.
std::int64_t mlp_place_coarse(MlpLayer& layer, std::int64_t at);
void mlp_pack_coarse(const MlpLayer& layer, Matrix<float> hidden, Matrix<float> inputs,
                     std::uint32_t* coarse);

template <typename S>
struct MlpProjectParams {
  MlpNet<S> net;
  std::int64_t rows;          // n
  const S* start;             // (n, d)
  const S* level;             // c, (n, l), or (1, l) with level_stride 0
  std::int64_t level_stride;  // l or 0
  const S* lower;             // (d,) or null
  const S* upper;             // (d,) or null
  std::int64_t max_iters;
  double tol;
  double max_step;
  S* points;                 // (n, d)
  S* values;                 // (n, l)
  S* jacobian;               // (n, l, d)
  std::int8_t* status;       // (n,)
  std::int32_t* iterations;  // (n,)
  // What a training step wants of the last evaluation, or null: for every hidden layer one after
  // the other, h_k (n, n_k) and the gradients of F with respect to the pre-activations (l, n, n_k).
  S* hidden;
  S* deltas;
};

// Room for a tile. One allocation of numbers() S for `memory`.
template <typename S>
class MlpWorkspace {
 public:
  MlpWorkspace(const MlpNet<S>& net, std::int64_t capacity, bool with_deltas, bool keep_deltas);
  std::int64_t numbers() const { return numbers_; }
  MlpTile<S> tile(S* memory);  // the tile lives as long as this and the memory

 private:
  std::int64_t capacity_, scratch_stride_, numbers_ = 0;
  std::vector<std::int64_t> stride_, hidden_at_, slopes_at_, deltas_at_;
  std::int64_t points_at_, values_at_, jacobian_at_, scratch_at_, pairs_at_ = -1, pair_stride_ = 0;
  std::vector<S*> hidden_, slopes_, deltas_;
};

// Rows of a tile when `rows` are shared by `threads`.
template <typename S>
std::int64_t mlp_tile_rows(std::int64_t rows, std::int64_t threads);

// Where the net has coarse weights, a row's first evaluation is coarse, and so is D_xF wherever it
// does not end; what is handed over is exact.
//
// Projects rows until `next`, which all threads share and which starts at 0, has passed the last.
template <typename S>
void mlp_project(const MlpProjectParams<S>& params, const MlpTile<S>& tile,
                 std::atomic<std::int64_t>& next);

// F alone, (n, l), of the rows [begin, end).
template <typename S>
void mlp_values(const MlpNet<S>& net, const S* points, S* values, const MlpTile<S>& tile,
                std::int64_t begin, std::int64_t end);

}  // namespace levelset::cpu
