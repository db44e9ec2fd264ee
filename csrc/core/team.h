// A team is who works on one row: a single thread, a warp, a block. The row math asks it for two
// things only, a reduction over the columns and a visit of every column, so that it is written
// once.
#pragma once

#include "portability.h"

namespace levelset {

// A number of columns the compiler knows. On the CPU, points in the plane and in space are so short
// that the loops over their columns cost more than the arithmetic in them.
template <std::int64_t D>
struct FixedColumns {
  LEVELSET_HD constexpr operator std::int64_t() const { return D; }
};

// K running results of one reduction.
template <typename A, int K>
struct Partial {
  A value[K];
};

template <typename A>
struct Sum {
  static LEVELSET_HD A identity() { return A(0); }
  static LEVELSET_HD A combine(A a, A b) { return a + b; }
};

// Maximum that keeps a NaN instead of dropping it.
template <typename A>
struct MaxKeepingNan {
  static LEVELSET_HD A identity() { return A(0); }
  static LEVELSET_HD A combine(A a, A b) { return (b > a || b != b) ? b : a; }
};

// One thread owns the row. Long rows are reduced in kLanes interleaved partial results: it
// vectorises without relaxed floating point and the rounding error grows with d / kLanes instead of
// d.
struct SerialTeam {
  static constexpr int kLanes = 8;

  template <template <typename> class Op, int K, typename A, typename Columns, typename Visit>
  LEVELSET_HD Partial<A, K> reduce(Columns d, Visit visit) const {
    Partial<A, K> total;
    for (int k = 0; k < K; ++k) total.value[k] = Op<A>::identity();
    std::int64_t j = 0;
#if !defined(__CUDA_ARCH__)
    if (d >= 2 * kLanes) {
      A lanes[K][kLanes];
      for (int k = 0; k < K; ++k) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[k][lane] = Op<A>::identity();
      }
      for (; j + kLanes <= d; j += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const Partial<A, K> term = visit(j + lane);
          for (int k = 0; k < K; ++k) {
            lanes[k][lane] = Op<A>::combine(lanes[k][lane], term.value[k]);
          }
        }
      }
      for (int k = 0; k < K; ++k) {
        for (int lane = 0; lane < kLanes; ++lane) {
          total.value[k] = Op<A>::combine(total.value[k], lanes[k][lane]);
        }
      }
    }
#endif
    for (; j < d; ++j) {
      const Partial<A, K> term = visit(j);
      for (int k = 0; k < K; ++k) total.value[k] = Op<A>::combine(total.value[k], term.value[k]);
    }
    return total;
  }

  template <typename Columns, typename Visit>
  LEVELSET_HD void for_each(Columns d, Visit visit) const {
    for (std::int64_t j = 0; j < d; ++j) visit(j);
  }

  // True on the one member that writes the per-row results.
  LEVELSET_HD bool leads() const { return true; }
};

}  // namespace levelset
