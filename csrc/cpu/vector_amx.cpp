// Coarse products for x86 processors that multiply tiles of bfloat16 numbers (AMX-BF16).
#include "vector_kernels.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#define LEVELSET_TARGET "avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,amx-tile,amx-bf16,fma"
#else
#define LEVELSET_TARGET \
  "avx512f,avx512dq,avx512vl,avx512bw,avx512bf16,amx-tile,amx-bf16,fma,prefer-vector-width=512"
#endif
#include "x86_begin.inc"

#include "coarse_kernels.inc"

namespace levelset::cpu {
namespace {

// A tile has 16 rows of 64 bytes: rows of points by 16 pairs, 16 pairs by columns of the matrix,
// and their sums.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes kShapes;

struct TileProduct {
  static constexpr std::int64_t kBlockRows = 2 * kCoarseRows;
  CoarseFactors of;

  // All of the tiles of the last rows are summed, and the first m rows of them are used: a row's
  // sums are the same whatever is beside it.
  template <int V>
  void rows(int m, std::int64_t i, std::int64_t j, float* c, std::int64_t c_stride) const {
    constexpr int kLanes = Lanes<float>::kCount;
    alignas(64) float sums[2 * kCoarseRows * V * kLanes];
    m > kCoarseRows ? tiles<2, V>(i, j, sums) : tiles<1, V>(i, j, sums);
    int r = 0;
    for (; r + 8 <= m; r += 8) add_up<8, V>(i, j, r, sums, c, c_stride);
    for (; r < m; ++r) add_up<1, V>(i, j, r, sums, c, c_stride);
  }

  // R times 16 rows from row i on, V times 16 columns from column j on. Tiles 0 to 3 are the sums.
  template <int R, int V>
  void tiles(std::int64_t i, std::int64_t j, float* sums) const {
    const std::uint32_t* a = of.pairs + i * of.pair_stride;
    const std::uint32_t* panel = of.panel(j);
    const std::int64_t a_bytes = of.pair_stride * 4, b_bytes = V * 64;
    const std::uint32_t* const second = a + kCoarseRows * of.pair_stride;
    _tile_zero(0);
    if constexpr (V > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && V > 1) _tile_zero(3);
    for (std::int64_t k = 0; k < of.pair_columns; k += kCoarseDepth) {
      _tile_loadd(6, panel, b_bytes);
      if constexpr (V > 1) _tile_loadd(7, panel + 16, b_bytes);
      _tile_loadd(4, a + k, a_bytes);
      if constexpr (R > 1) _tile_loadd(5, second + k, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (V > 1) _tile_dpbf16ps(1, 4, 7);
      if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
      if constexpr (R > 1 && V > 1) _tile_dpbf16ps(3, 5, 7);
      panel += kCoarseDepth * V * 16;
    }
    _tile_stored(0, sums, b_bytes);
    if constexpr (V > 1) _tile_stored(1, sums + 16, b_bytes);
    if constexpr (R > 1) _tile_stored(2, sums + 16 * V * 16, b_bytes);
    if constexpr (R > 1 && V > 1) _tile_stored(3, sums + 16 * V * 16 + 16, b_bytes);
  }

  // Rows r to r + M of the block: what the tiles hold, the bias, and the float32 part.
  template <int M, int V>
  void add_up(std::int64_t i, std::int64_t j, int r, const float* sums, float* c,
              std::int64_t c_stride) const {
    constexpr int kLanes = Lanes<float>::kCount;
    Floats sum[M][V];
    of.start<M, V>(i + r, j, sum);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const int at = v * kLanes;
        store(c + (r + m) * c_stride + at, sum[m][v] + load(sums + (r + m) * V * kLanes + at));
      }
    }
  }
};

void coarse_forward(const MlpNet<float>& net, const MlpTile<float>& tile, std::int64_t rows) {
  _tile_loadconfig(&kShapes);
  run_forward(net, tile, rows, CoarseProducts<TileProduct>{net, tile});
  _tile_release();
}

void coarse_backward(const MlpNet<float>& net, const MlpTile<float>& tile, std::int64_t rows,
                     int output) {
  _tile_loadconfig(&kShapes);
  run_backward(net, tile, rows, output, CoarseProducts<TileProduct>{net, tile});
  _tile_release();
}

const CoarseKernels kCoarse = {"amx", &coarse_forward, &coarse_backward};

}  // namespace
}  // namespace levelset::cpu

#include "x86_end.inc"

namespace levelset::cpu {

const CoarseKernels* coarse_kernels_amx() {
  static const bool here = [] {
    unsigned a, b, c, d;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
    if (!__builtin_cpu_supports("avx512bf16")) return false;  // which rounds what the tiles read
    // The kernel keeps no room for tiles unless a process asks for it: ARCH_REQ_XCOMP_PERM,
    // XTILEDATA.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return here ? &kCoarse : nullptr;
}

}  // namespace levelset::cpu

#else

namespace levelset::cpu {

const CoarseKernels* coarse_kernels_amx() { return nullptr; }

}  // namespace levelset::cpu

#endif
