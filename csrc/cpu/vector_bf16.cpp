// Coarse products for x86 processors that multiply pairs of bfloat16 numbers (AVX512-BF16).
#include "vector_kernels.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#if defined(__clang__)
#define LEVELSET_TARGET "avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma"
#else
#define LEVELSET_TARGET "avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,fma,prefer-vector-width=512"
#endif
#include "x86_begin.inc"

#include "coarse_kernels.inc"

namespace levelset::cpu {
namespace {

struct PairProduct {
  static constexpr std::int64_t kBlockRows = LEVELSET_BLOCK_ROWS;
  CoarseFactors of;

  template <int V>
  void rows(int m, std::int64_t i, std::int64_t j, float* c, std::int64_t c_stride) const {
    block_of_rows<int(kBlockRows), V>(m, *this, i, j, c, c_stride);
  }

  template <int M, int V>
  void block(std::int64_t i, std::int64_t j, float* c, std::int64_t c_stride) const {
    constexpr int kLanes = Lanes<float>::kCount;
    Floats sum[M][V];
    of.start<M, V>(i, j, sum);
    const std::int64_t stride = of.pair_stride, columns = of.pair_columns;
    const std::uint32_t* a = of.pairs + i * stride;
    const std::uint32_t* panel = of.panel(j);
    for (std::int64_t k = 0; k < columns; ++k) {
      __m512bh b[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) b[v] = (__m512bh)_mm512_loadu_si512(panel + v * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(int(a[m * stride + k]));
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

void coarse_forward(const MlpNet<float>& net, const MlpTile<float>& tile, std::int64_t rows) {
  run_forward(net, tile, rows, CoarseProducts<PairProduct>{net, tile});
}

void coarse_backward(const MlpNet<float>& net, const MlpTile<float>& tile, std::int64_t rows,
                     int output) {
  run_backward(net, tile, rows, output, CoarseProducts<PairProduct>{net, tile});
}

const CoarseKernels kCoarse = {"avx512bf16", &coarse_forward, &coarse_backward};

}  // namespace
}  // namespace levelset::cpu

#include "x86_end.inc"

namespace levelset::cpu {

const CoarseKernels* coarse_kernels_bf16() {
  return __builtin_cpu_supports("avx512bf16") ? &kCoarse : nullptr;
}

}  // namespace levelset::cpu

#else

namespace levelset::cpu {

const CoarseKernels* coarse_kernels_bf16() { return nullptr; }

}  // namespace levelset::cpu

#endif
