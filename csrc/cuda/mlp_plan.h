// Which networks the fused kernel takes, and what it needs for them: the one place where its tiles,
// its shared memory and its packed parameters are laid out. For host and device; no CUDA runtime.
//
// A block of 256 threads holds a tile of W columns (the units of a layer, padded) and 16384 / W
// rows (points). Every thread sums 8 x 8 numbers of the tile in registers, 64 accumulators of the
// 128 registers that let two blocks share a multiprocessor. A layer's result takes the place of its
// input, as by then all sums are complete; so shared memory holds one tile (64 KiB), two panels of
// weights (8 to 32 KiB) and the rows' points, F, D_xF and levels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/mlp_net.h"
#include "../core/portability.h"

namespace levelset::cuda {

constexpr int kMlpThreads = 256;
constexpr int kMlpTile = 16384;  // numbers in a tile
constexpr int kMlpLayers = 24;   // they travel in the kernel's parameters, of which 4 KiB are safe
constexpr int kMlpOutputs = 2;   // l: a thread updates a row by the closed forms
constexpr int kMlpDimension = 16;  // d: the input's share of a product is not tiled
constexpr int kMlpWidths[] = {64, 128, 256, 512};

LEVELSET_HD constexpr int mlp_tile_rows(int width) { return kMlpTile / width; }

// How the product of a tile and a matrix of weights is computed.
enum class MlpProduct : int {
  kAuto = 0,    // mlp_product decides
  kFloat = 1,   // float32, one fused multiply-add after the other
  kTensor = 2,  // tensor cores, to float32 by three products in TF32
  kCoarse = 3,  // tensor cores in bfloat16, for a row's first evaluation only
};

// Rows of a weight matrix in a panel, and rows of pairs for kCoarse. While one is multiplied the
// next is on its way: in float32 in at most eight registers of every thread.
LEVELSET_HD constexpr int mlp_panel_rows(int width, MlpProduct product) {
  if (width <= 128) return 16;
  return (product == MlpProduct::kFloat ? 2048 : 4096) / width;
}

// Rows of a packed matrix that is read in panels are padded to a multiple of this.
constexpr int kMlpPadding = 16;
LEVELSET_HD constexpr std::int64_t mlp_padded(std::int64_t rows) {
  return (rows + kMlpPadding - 1) / kMlpPadding * kMlpPadding;
}

constexpr int kMlpParamsAt = kMlpTile * int(sizeof(float)), kMlpParamBytes = 2560;

// Room for the shared memory that the kernel has besides, which counts as the block's too.
constexpr int kMlpStaticBytes = 64;

// Where the parts of a block's shared memory begin, in bytes.
struct MlpRoom {
  int tile;        // float (width, rows): h_k, then deltas, by units
  int params;      // the launch's parameters, at the same place whatever the network
  int panels;      // float (2, panel rows, width)
  int row;         // int64 (rows,): which point a slot works on, or -1
  int points;      // float (rows, d)
  int values;      // float (rows, l)
  int jacobian;    // float (rows, l, d)
  int level;       // float (rows, l)
  int iterations;  // int32 (rows,)
  int status;      // int8 (rows,)
  int bytes;
};

LEVELSET_HD constexpr MlpRoom mlp_room(int width, int dimension, int outputs, MlpProduct product) {
  const int rows = mlp_tile_rows(width), number = int(sizeof(float));
  MlpRoom room{};
  room.tile = 0;
  room.params = kMlpParamsAt;
  room.panels = room.params + kMlpParamBytes;
  room.row = room.panels + 2 * mlp_panel_rows(width, product) * width * number;
  room.points = room.row + rows * int(sizeof(std::int64_t));
  room.values = room.points + rows * dimension * number;
  room.jacobian = room.values + rows * outputs * number;
  room.level = room.jacobian + rows * outputs * dimension * number;
  room.iterations = room.level + rows * outputs * number;
  room.status = room.iterations + rows * int(sizeof(std::int32_t));
  room.bytes = room.status + rows;
  return room;
}

struct MlpPlan {
  int width;            // W, or 0 where the kernel does not take the network
  int shared_bytes;     // of a block, for kFloat
  std::int64_t packed;  // float32 numbers of packed parameters
  std::int64_t coarse;  // pairs of bfloat16 numbers, of the matrices that kCoarse multiplies
};

// Whether a tile is multiplied with the matrix of layer k; the last layer's is read row by row.
inline bool mlp_multiplies(const MlpLayer* layers, int count, int k) {
  return layers[k].hidden > 0 && k + 1 < count;
}

// Places the packed parts of every layer: the bias (W,), U^T and under it W^T (inputs + hidden, W),
// and W (outputs, W) as the backward pass reads it. Rows and columns are padded with zeros. For
// kCoarse W^T and W again, two rows below each other in one number of 32 bits.
inline MlpPlan mlp_plan(MlpLayer* layers, int count, std::int64_t dimension) {
  if (count < 1 || count > kMlpLayers || dimension > kMlpDimension) return {};
  const std::int64_t outputs = layers[count - 1].outputs;
  if (outputs > kMlpOutputs) return {};
  std::int64_t widest = 1;
  for (int k = 0; k + 1 < count; ++k) {
    if (layers[k].outputs > widest) widest = layers[k].outputs;
  }
  for (const int width : kMlpWidths) {
    if (width < widest) continue;
    std::int64_t at = 0, coarse_at = 0;
    for (int k = 0; k < count; ++k) {
      MlpLayer& layer = layers[k];
      layer.bias_at = at;
      layer.forward_at = layer.bias_at + width;
      layer.backward_at = layer.forward_at + (layer.inputs + mlp_padded(layer.hidden)) * width;
      at = layer.backward_at + (layer.hidden > 0 ? mlp_padded(layer.outputs) * width : 0);
      if (!mlp_multiplies(layers, count, k)) continue;
      layer.coarse_forward_at = coarse_at;
      layer.coarse_backward_at = coarse_at + mlp_padded((layer.hidden + 1) / 2) * width;
      coarse_at = layer.coarse_backward_at + mlp_padded((layer.outputs + 1) / 2) * width;
    }
    const MlpRoom room = mlp_room(width, int(dimension), int(outputs), MlpProduct::kFloat);
    return {width, room.bytes, at, coarse_at};
  }
  return {};
}

// Tensor cores multiply whole pieces of 8 rows of a matrix; below this many it is not worth it.
constexpr int kMlpTensorUnits = 16;

// Whether a device has what the tensor products need: compute capability 8.0, for TF32, bfloat16
// and asynchronous copies, and the shared memory.
inline bool mlp_has_tensor(const MlpPlan& plan, int dimension, int outputs, int capability,
                           int shared_memory) {
  return capability >= 8 &&
         mlp_room(plan.width, dimension, outputs, MlpProduct::kTensor).bytes <= shared_memory;
}

// The one rule for kAuto: tensor cores where they are and where there is a matrix for them. Until
// somebody has timed the two on a device the reason is arithmetic alone: for 8 rows of a matrix a
// warp issues 512 multiply-adds, or 48 tensor instructions and some 200 others around them.
inline MlpProduct mlp_product(const MlpLayer* layers, int count, bool has_tensor) {
  for (int k = 0; k < count; ++k) {
    if (has_tensor && mlp_multiplies(layers, count, k) && layers[k].hidden >= kMlpTensorUnits) {
      return MlpProduct::kTensor;
    }
  }
  return MlpProduct::kFloat;
}

}  // namespace levelset::cuda
