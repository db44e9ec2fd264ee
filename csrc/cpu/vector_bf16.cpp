// Coarse products for x86 processors that multiply pairs of bfloat16 numbers (AVX512-BF16).
#include "vector_kernels.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
// The compiler's own header reads a variable that it means to leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                     \
    __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma,prefer-vector-width=512")
#endif

#define LEVELSET_VECTOR_BYTES 64
#define LEVELSET_BLOCK_ROWS 14
#define LEVELSET_SQUARE_ROOT_FLOAT(x) _mm512_sqrt_ps(x)
#define LEVELSET_SQUARE_ROOT_DOUBLE(x) _mm512_sqrt_pd(x)
#include "lanes.inc"
#include "mlp_kernels.inc"

namespace levelset::cpu {
namespace {

// [A1 A2] B + bias with A1 in float32 and A2 in pairs of bfloat16, summed in float32. The panels of
// A1's part of B are those of the exact product, of which they are the first rows.
struct CoarseProduct {
  Factor<float> first;
  const float* packed;  // B in float32
  std::int64_t depth;   // its rows
  const float* bias;    // or null
  const std::uint32_t* pairs;
  std::int64_t pair_stride, pair_columns;
  const std::uint32_t* coarse;  // the other part of B, in pairs of rows

  template <int M, int V>
  void block(std::int64_t i, std::int64_t j, float* c, std::int64_t c_stride) const {
    constexpr int kLanes = Lanes<float>::kCount;
    Floats sum[M][V];
    for (int v = 0; v < V; ++v) {
      const Floats start = bias != nullptr ? load(bias + j + v * kLanes) : Floats{};
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sum[m][v] = start;
    }
    Product<float>::add<M, V>(first, i, packed + depth * j, sum);
    const std::uint32_t* a = pairs + i * pair_stride;
    const std::uint32_t* panel = coarse + pair_columns * j;
    for (std::int64_t k = 0; k < pair_columns; ++k) {
      __m512bh b[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) b[v] = (__m512bh)_mm512_loadu_si512(panel + v * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[m * pair_stride + k]));
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], x, b[v]);
      }
      panel += V * kLanes;
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(c + m * c_stride + v * kLanes, sum[m][v]);
    }
  }
};

// Rows of float32 as pairs of bfloat16; the columns past the last are zero.
inline void to_pairs(Factor<float> from, std::int64_t rows, std::uint32_t* to,
                     std::int64_t stride) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const float* row = from.rows + i * from.stride;
    for (std::int64_t c = 0; c < from.columns; c += 32) {
      const std::int64_t left = from.columns - c;
      const __mmask16 low = left >= 16 ? 0xffff : __mmask16((1u << left) - 1);
      const __mmask16 high = left >= 32  ? 0xffff
                             : left > 16 ? __mmask16((1u << (left - 16)) - 1)
                                         : 0;
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, row + c + 16),
                                                _mm512_maskz_loadu_ps(low, row + c));
      _mm512_storeu_si512(to + i * stride + c / 2, (__m512i)both);
    }
  }
}

struct CoarseProducts {
  const MlpNet<float>& net;
  const MlpTile<float>& tile;
  std::uint32_t* pairs;

  CoarseProduct forward(const MlpLayer& layer, Factor<float> x, Factor<float> h,
                        std::int64_t rows) const {
    if (layer.hidden > 0) to_pairs(h, rows, pairs, tile.pair_stride);
    return {x,
            net.packed + layer.forward_at,
            x.columns + h.columns,
            net.packed + layer.bias_at,
            pairs,
            tile.pair_stride,
            (h.columns + 1) / 2,
            net.coarse + layer.coarse_forward_at};
  }
  CoarseProduct backward(const MlpLayer& layer, Factor<float> delta, std::int64_t rows) const {
    to_pairs(delta, rows, pairs, tile.pair_stride);
    return {{delta.rows, 0, 0},
            net.packed + layer.backward_at,
            layer.outputs,
            nullptr,
            pairs,
            tile.pair_stride,
            (layer.outputs + 1) / 2,
            net.coarse + layer.coarse_backward_at};
  }
};

void coarse_forward(const MlpNet<float>& net, const MlpTile<float>& tile, std::int64_t rows) {
  run_forward(net, tile, rows, CoarseProducts{net, tile, tile.pairs});
}

void coarse_backward(const MlpNet<float>& net, const MlpTile<float>& tile, std::int64_t rows,
                     int output) {
  run_backward(net, tile, rows, output, CoarseProducts{net, tile, tile.pairs});
}

const CoarseKernels kCoarse = {Lanes<float>::kCount, &coarse_forward, &coarse_backward};

}  // namespace
}  // namespace levelset::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace levelset::cpu {

const CoarseKernels* coarse_kernels() {
  static const bool here = vector_kernels_avx512<float>() != nullptr &&
                           vector_kernels<float>().lanes == kCoarse.lanes &&
                           __builtin_cpu_supports("avx512bf16");
  return here ? &kCoarse : nullptr;
}

}  // namespace levelset::cpu

#else

namespace levelset::cpu {

const CoarseKernels* coarse_kernels() { return nullptr; }

}  // namespace levelset::cpu

#endif
