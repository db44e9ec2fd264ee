// Products of the fused kernel in float32: a block's tile of rows with the matrix of a layer.
//
// Every number is summed by one thread over k = 0, 1, 2, ..., whatever row of the tile it is in, so
// that a point's result does not depend on the block and the slot that worked on it.
#pragma once

#include <cuda_runtime.h>

#include "mlp_plan.h"

namespace levelset::cuda {

// Eight numbers as two vectors of four.
struct Eight {
  float at[8];

  // From two places `apart` numbers apart, each at a multiple of four.
  static __device__ __forceinline__ Eight load(const float* from, int apart) {
    const float4 a = *reinterpret_cast<const float4*>(from);
    const float4 b = *reinterpret_cast<const float4*>(from + apart);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  }
};

// The part of a tile of W columns that one thread sums: columns 4g .. 4g + 3 and the same W / 2
// further on, rows likewise. Neighbouring lanes then touch neighbouring 16 bytes of shared memory.
// The tile is stored by columns, (W, rows).
template <int W>
struct FloatThread {
  static constexpr MlpProduct kProduct = MlpProduct::kFloat;
  static constexpr int kRows = mlp_tile_rows(W), kPanel = mlp_panel_rows(W, kProduct);
  static constexpr int kRowGroups = kRows / 8;
  static constexpr int kRowLanes = kRowGroups < 8 ? kRowGroups : 8;

  // at[j][i] is column j and row i.
  struct Sums {
    float at[8][8];

    // Four numbers, `part` of 16.
    __device__ __forceinline__ float* four(int part) { return at[part / 2] + part % 2 * 4; }
  };

  int row, column;  // the first of each

  __device__ __forceinline__ FloatThread() {
    constexpr int kWarpsDown = kRowGroups / kRowLanes, kColumnLanes = 32 / kRowLanes;
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    row = 4 * (warp % kWarpsDown * kRowLanes + lane % kRowLanes);
    column = 4 * (warp / kWarpsDown * kColumnLanes + lane / kRowLanes);
  }

  // Where number i of four of a part is in the tile: a part is one half of the rows of a column.
  __device__ __forceinline__ float& number(float* tile, int part, int i) const {
    return tile[column_of(part / 2) * kRows + row + part % 2 * (kRows / 2) + i];
  }

  // The whole tile is written; what then stands in its padding is never read.
  __device__ __forceinline__ void store(Sums& sums, float* tile) const {
#pragma unroll
    for (int part = 0; part < 16; ++part) {
      const float* const x = sums.four(part);
      reinterpret_cast<float4&>(number(tile, part, 0)) = make_float4(x[0], x[1], x[2], x[3]);
    }
  }

  // Every row becomes the numbers of `columns` (W,), in global memory.
  __device__ __forceinline__ void fill(Sums& sums, const float* columns) const {
    fill(sums, Eight::load(columns + column, W / 2));
  }
  __device__ __forceinline__ void clear(Sums& sums) const { fill(sums, Eight{}); }

  // sums += X B for the few columns of the points X (rows, d) and B (d, W) in global memory.
  __device__ __forceinline__ void multiply_points(const float* points, const float* matrix,
                                                  int dimension, Sums& sums) const {
    for (int k = 0; k < dimension; ++k) {
      Eight x;
#pragma unroll
      for (int i = 0; i < 8; ++i) x.at[i] = points[row_of(i) * dimension + k];
      add(sums, x, Eight::load(matrix + k * W + column, W / 2));
    }
  }

  // sums += A B for A (count, rows), stored by columns, in the block's tile and B (count, W),
  // padded to whole panels, in global memory. Begins and ends with the block in step: the tile may
  // be written before and after.
  __device__ __forceinline__ void multiply_tile(const float* tile, float* panels,
                                                const float* matrix, int count, Sums& sums) const {
    constexpr int kVectors = kPanel * W / 4, kLoads = kVectors / kMlpThreads;
    static_assert(kLoads * kMlpThreads == kVectors && kMlpPadding % kPanel == 0);
    const float4* from = reinterpret_cast<const float4*>(matrix) + threadIdx.x;
    float4* const to = reinterpret_cast<float4*>(panels) + threadIdx.x;
    float4 next[kLoads];
    const auto fetch = [&] {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) next[i] = __ldg(from + i * kMlpThreads);
      from += kVectors;
    };
    const auto put = [&](int buffer) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) to[buffer * kVectors + i * kMlpThreads] = next[i];
    };
    const auto step = [&](const float* a, const float* b) {
      add(sums, Eight::load(a, kRows / 2), Eight::load(b, W / 2));
    };
    fetch();
    put(0);
    __syncthreads();
    const float* a = tile + row;
    int buffer = 0;
    for (int left = count; left > 0; left -= kPanel, buffer ^= 1) {
      if (left > kPanel) fetch();
      const float* b = panels + buffer * kPanel * W + column;
      if (left >= kPanel) {
#pragma unroll
        for (int k = 0; k < kPanel; ++k) step(a + k * kRows, b + k * W);
      } else {
#pragma unroll 1
        for (int k = 0; k < left; ++k) step(a + k * kRows, b + k * W);
      }
      a += kPanel * kRows;
      if (left > kPanel) put(buffer ^ 1);
      __syncthreads();
    }
  }

 private:
  __device__ __forceinline__ int row_of(int i) const {
    return i < 4 ? row + i : kRows / 2 + row + i - 4;
  }
  __device__ __forceinline__ int column_of(int j) const {
    return j < 4 ? column + j : W / 2 + column + j - 4;
  }
  static __device__ __forceinline__ void fill(Sums& sums, const Eight& columns) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums.at[j][i] = columns.at[j];
    }
  }
  static __device__ __forceinline__ void add(Sums& sums, const Eight& a, const Eight& b) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums.at[j][i] += a.at[i] * b.at[j];
    }
  }
};

}  // namespace levelset::cuda
