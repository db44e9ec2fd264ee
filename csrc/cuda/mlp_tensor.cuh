// Products of the fused kernel on tensor cores. A warp sums 32 rows and 64 columns of the tile, as
// 2 by 8 pieces of 16 x 8, 64 numbers a thread.
//
// kTensor: a number is the sum of two in TF32, a = a' + a" and b = b' + b" to 2^-22, and a b is
// taken as a' b' + a' b" + a" b'. Tensor cores cut off what does not fit into a sum, always towards
// zero, and over a few hundred terms that would show; so they only ever sum eight terms, and what
// they found is added up in float32, as it should be. kCoarse: factors in bfloat16, summed where
// they are.
//
// Every number is summed in the same order whatever row of the tile it is in. Infinity has no such
// parts: what it is multiplied with becomes NaN.
#pragma once

#include "mlp_plan.h"
#include "mma.cuh"

namespace levelset::cuda {

// The tile is stored by columns, (W, rows), and a panel by rows, (panel rows, W). In both, four
// neighbouring lines begin 8 numbers apart, so that the 8 x 4 numbers that a warp reads at a time
// are in 32 banks.
LEVELSET_HD constexpr int mlp_turned(int line, int at) { return at ^ (line % 4 * 8); }

template <int W, MlpProduct P>
struct TensorThread {
  static constexpr MlpProduct kProduct = P;
  static constexpr bool kCoarse = P == MlpProduct::kCoarse;
  static constexpr int kRows = mlp_tile_rows(W), kPanel = mlp_panel_rows(W, kProduct);
  static constexpr int kDown = 2, kAcross = 8;  // pieces of a warp
  static constexpr int kWarpsDown = kRows / (16 * kDown);

  struct Sums {
    MmaSums at[kDown][kAcross];

    // Four numbers, `part` of 16.
    __device__ __forceinline__ float* four(int part) {
      return at[part / kAcross][part % kAcross].at;
    }
  };

  MmaLane lane;
  int row, column;  // of the warp's first piece

  __device__ __forceinline__ TensorThread() : TensorThread(int(threadIdx.x)) {}

  __device__ __forceinline__ explicit TensorThread(int thread) : lane(thread) {
    const int warp = thread / 32;
    row = 16 * kDown * (warp % kWarpsDown);
    column = 8 * kAcross * (warp / kWarpsDown);
  }

  // Where number i of four of a part is in the tile: a part is one piece.
  __device__ __forceinline__ float& number(float* tile, int part, int i) const {
    const int c = column_of(part % kAcross, i);
    return tile[c * kRows + mlp_turned(c, row_of(part / kAcross, i))];
  }

  // The whole tile is written. Of its padding the next product multiplies some numbers by zeros;
  // they are finite where the row's own numbers are.
  static __device__ __forceinline__ void store(Sums& sums, float* tile) {
    const TensorThread own(thread_anew());
#pragma unroll
    for (int part = 0; part < kDown * kAcross; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) own.number(tile, part, i) = sums.four(part)[i];
    }
  }

  // Every row becomes the numbers of `columns` (W,), in global memory.
  __device__ __forceinline__ void fill(Sums& sums, const float* columns) const {
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
      const float2 x = pair(columns, n);
#pragma unroll
      for (int m = 0; m < kDown; ++m) sums.at[m][n] = {{x.x, x.y, x.x, x.y}};
    }
  }
  __device__ __forceinline__ void clear(Sums& sums) const { sums = {}; }

  // sums += X B for the few columns of the points X (rows, d) and B (d, W) in global memory, in
  // float32.
  __device__ __forceinline__ void multiply_points(const float* points, const float* matrix,
                                                  int dimension, Sums& sums) const {
    for (int k = 0; k < dimension; ++k) {
      float x[kDown][2];
#pragma unroll
      for (int m = 0; m < kDown; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) x[m][i] = points[row_of(m, 2 * i) * dimension + k];
      }
#pragma unroll
      for (int n = 0; n < kAcross; ++n) {
        const float2 b = pair(matrix + k * W, n);
#pragma unroll
        for (int m = 0; m < kDown; ++m) {
          float* const to = sums.at[m][n].at;
          to[0] += x[m][0] * b.x;
          to[1] += x[m][0] * b.y;
          to[2] += x[m][1] * b.x;
          to[3] += x[m][1] * b.y;
        }
      }
    }
  }

  // sums += A B for A (count, rows), stored by columns, in the block's tile and B in global memory:
  // (count, W) numbers, or half as many pairs, padded to whole panels. Begins and ends with the
  // block in step: the tile may be written before and after.
  template <typename Number>
  __device__ __forceinline__ void multiply_tile(const float* tile, float* panels,
                                                const Number* matrix, int count, Sums& sums) const {
    static_assert(sizeof(Number) == 4);
    constexpr int kVectors = kPanel * W / 4, kLoads = kVectors / kMlpThreads;
    static_assert(kLoads * kMlpThreads == kVectors && kMlpPadding % kPanel == 0);
    // Lines of a panel, and of a step: a line of pairs stands for two of the tile's.
    constexpr int kPair = kCoarse ? 2 : 1, kLines = kPair * kPanel, kStep = kPair * 8;
    Number* const to = reinterpret_cast<Number*>(panels);
    const auto panel_of = [&](int line) { return to + line / kPair % (2 * kPanel) * W; };
    const auto fetch = [&](int line) {
      const int thread = thread_anew();
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int at = 4 * (thread + i * kMlpThreads);
        copy_16_bytes(panel_of(line) + at / W * W + mlp_turned(at / W, at % W),
                      matrix + line / kPair * W + at);
      }
    };
    fetch(0);
#pragma unroll 1
    for (int line = 0; line < count; line += kStep) {
      if (line % kLines == 0) {
        wait_for_copies();
        __syncthreads();  // the panel is there for all, and the one before is not read any more
        if (line + kLines < count) fetch(line + kLines);
      }
      // Where a step is all there is between two panels, nothing of it stays in registers
      // meanwhile.
      const TensorThread own = kLines == kStep ? TensorThread(thread_anew()) : *this;
      own.step(line, tile, panel_of(line), sums);
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ int row_of(int m, int i) const {
    return row + 16 * m + lane.sum_row(i);
  }
  __device__ __forceinline__ int column_of(int n, int i) const {
    return column + 8 * n + lane.sum_column(i);
  }
  __device__ __forceinline__ float2 pair(const float* columns, int n) const {
    return __ldg(reinterpret_cast<const float2*>(columns + column_of(n, 0)));
  }

  // Eight lines of the tile with eight of a panel, both from a multiple of four on.
  __device__ __forceinline__ void step(int line, const float* tile, const float* panel,
                                       Sums& sums) const {
    tile += line * kRows;
    MmaRows high[kDown], low[kDown];
#pragma unroll
    for (int m = 0; m < kDown; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = lane.row_k(i);
        const float x = tile[k * kRows + mlp_turned(lane.place, row + 16 * m + lane.row(i))];
        split_tf32(x, high[m].at[i], low[m].at[i]);
      }
    }
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
      MmaColumns b_high, b_low;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = lane.column_k(i);
        const float x = panel[k * W + mlp_turned(lane.place, column + 8 * n + lane.column())];
        split_tf32(x, b_high.at[i], b_low.at[i]);
      }
#pragma unroll
      for (int m = 0; m < kDown; ++m) {
        MmaSums found{};  // the small terms first
        mma_tf32(found, low[m], b_high);
        mma_tf32(found, high[m], b_low);
        mma_tf32(found, high[m], b_high);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.at[m][n].at[i] += found.at[i];
      }
    }
  }

  // Sixteen lines of the tile with eight of pairs.
  __device__ __forceinline__ void step(int line, const float* tile, const std::uint32_t* panel,
                                       Sums& sums) const {
    tile += line * kRows;
    MmaRows a[kDown];
#pragma unroll
    for (int m = 0; m < kDown; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = lane.row_pair(i), r = row + 16 * m + lane.row(i);
        a[m].at[i] = to_bfloat16(tile[k * kRows + mlp_turned(k, r)],
                                 tile[(k + 1) * kRows + mlp_turned(k + 1, r)]);
      }
    }
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
      MmaColumns b;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = lane.column_pair(i) / 2;
        b.at[i] = panel[k * W + mlp_turned(lane.place, column + 8 * n + lane.column())];
      }
#pragma unroll
      for (int m = 0; m < kDown; ++m) mma_bfloat16(sums.at[m][n], a[m], b);
    }
  }
};

}  // namespace levelset::cuda
