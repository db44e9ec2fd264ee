// Which networks the fused kernel takes, and what it needs for them: the one place where its tiles,
// its shared memory and its packed parameters are laid out. For host and device; no CUDA runtime.
//
// A block of 256 threads holds a tile of W columns (the units of a layer, padded) and 16384 / W
// rows (points). Every thread sums 8 x 8 numbers of the tile in registers, 64 accumulators of the
// 128 registers that let two blocks share a multiprocessor. A layer's result takes the place of its
// input, as by then all sums are complete; so shared memory holds one tile (64 KiB), two panels of
// weights (8 or 16 KiB) and the rows' points, F, D_xF and levels.
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

// Rows of a weight matrix in a panel. While one is multiplied the next is on its way, in at most
// eight registers of every thread.
LEVELSET_HD constexpr int mlp_panel_rows(int width) { return width > 128 ? 2048 / width : 16; }

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

LEVELSET_HD constexpr MlpRoom mlp_room(int width, int dimension, int outputs) {
  const int rows = mlp_tile_rows(width), number = int(sizeof(float));
  MlpRoom room{};
  room.tile = 0;
  room.params = kMlpParamsAt;
  room.panels = room.params + kMlpParamBytes;
  room.row = room.panels + 2 * mlp_panel_rows(width) * width * number;
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
  int shared_bytes;     // of a block
  std::int64_t packed;  // float32 numbers of packed parameters
};

// Places the packed parts of every layer: the bias (W,), U^T and under it W^T (inputs + hidden, W),
// and W (outputs, W) as the backward pass reads it. Rows and columns are padded with zeros.
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
    std::int64_t at = 0;
    for (int k = 0; k < count; ++k) {
      MlpLayer& layer = layers[k];
      layer.bias_at = at;
      layer.forward_at = layer.bias_at + width;
      layer.backward_at = layer.forward_at + (layer.inputs + mlp_padded(layer.hidden)) * width;
      at = layer.backward_at + (layer.hidden > 0 ? mlp_padded(layer.outputs) * width : 0);
    }
    return {width, mlp_room(width, int(dimension), int(outputs)).bytes, at};
  }
  return {};
}

}  // namespace levelset::cuda
