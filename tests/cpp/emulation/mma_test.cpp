// The tensor-core instructions: what the kernels' header says about fragments against what the
// emulator makes of the PTX ISA, and both against plain products.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cuda/mma.cuh"
#include "reference.h"

namespace {

using namespace levelset::cuda;

struct Matrices {
  std::vector<float> a, b, c;  // (16, k), (k, 8), (16, 8)
  float* d;
};

template <bool kBfloat16>
__global__ void multiply(const float* a, const float* b, const float* c, float* d) {
  constexpr int K = kBfloat16 ? 16 : 8;
  const MmaLane lane(int(threadIdx.x));
  MmaRows rows;
  MmaColumns columns;
  MmaSums sums;
  for (int i = 0; i < 4; ++i) {
    sums.at[i] = c[lane.sum_row(i) * 8 + lane.sum_column(i)];
    const float* const row = a + lane.row(i) * K;
    rows.at[i] = kBfloat16 ? to_bfloat16(row[lane.row_pair(i)], row[lane.row_pair(i) + 1])
                           : to_tf32(row[lane.row_k(i)]);
  }
  for (int i = 0; i < 2; ++i) {
    const float* const column = b + lane.column();
    columns.at[i] = kBfloat16 ? to_bfloat16(column[lane.column_pair(i) * 8],
                                            column[(lane.column_pair(i) + 1) * 8])
                              : to_tf32(column[lane.column_k(i) * 8]);
  }
  kBfloat16 ? mma_bfloat16(sums, rows, columns) : mma_tf32(sums, rows, columns);
  for (int i = 0; i < 4; ++i) d[lane.sum_row(i) * 8 + lane.sum_column(i)] = sums.at[i];
}

// Small whole numbers, all different within a matrix, are exact in either precision.
template <bool kBfloat16>
void check() {
  constexpr int K = kBfloat16 ? 16 : 8;
  std::vector<float> a, b, c, d(128, NAN);
  for (int i = 0; i < 16 * K; ++i) a.push_back(float(i % 127 - 60));
  for (int i = 0; i < K * 8; ++i) b.push_back(float((i * 37) % 128 - 64));
  for (int i = 0; i < 128; ++i) c.push_back(float(1000 * i));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  ASSERT_EQ(
      cudaLaunchKernelEx(&config, multiply<kBfloat16>, a.data(), b.data(), c.data(), d.data()),
      cudaSuccess);
  for (std::size_t i = 0; i < 16; ++i) {
    for (std::size_t j = 0; j < 8; ++j) {
      float sum = c[i * 8 + j];
      for (std::size_t k = 0; k < K; ++k) sum += a[i * K + k] * b[k * 8 + j];
      ASSERT_EQ(d[i * 8 + j], sum) << i << ", " << j;
    }
  }
}

TEST(EmulatedMma, FragmentsOfTf32) {
  emulation::for_each_order([] { check<false>(); });
}

TEST(EmulatedMma, FragmentsOfBfloat16) {
  emulation::for_each_order([] { check<true>(); });
}

// A lane holds each of its numbers once, and the lanes of a warp hold all of them.
TEST(EmulatedMma, EveryNumberHasALane) {
  std::vector<int> a(16 * 8), b(8 * 8), c(16 * 8), pairs(16 * 8), column_pairs(8 * 8);
  for (int thread = 0; thread < 32; ++thread) {
    const MmaLane lane(thread);
    for (int i = 0; i < 4; ++i) {
      ++a[std::size_t(lane.row(i) * 8 + lane.row_k(i))];
      ++pairs[std::size_t(lane.row(i) * 8 + lane.row_pair(i) / 2)];
      ++c[std::size_t(lane.sum_row(i) * 8 + lane.sum_column(i))];
    }
    for (int i = 0; i < 2; ++i) {
      ++b[std::size_t(lane.column_k(i) * 8 + lane.column())];
      ++column_pairs[std::size_t(lane.column_pair(i) / 2 * 8 + lane.column())];
    }
  }
  for (const auto& counts : {a, b, c, pairs, column_pairs}) {
    for (const int count : counts) ASSERT_EQ(count, 1);
  }
}

TEST(EmulatedMma, Conversions) {
  EXPECT_EQ(__uint_as_float(to_tf32(1.0f + 0x1p-11f)), 1.0f + 0x1p-10f);  // a tie, away from zero
  EXPECT_EQ(__uint_as_float(to_tf32(-1.0f - 0x1p-12f)), -1.0f);
  EXPECT_EQ(to_bfloat16(1.0f, -2.0f), 0xc0003f80u);
  EXPECT_EQ(to_bfloat16(1.0f + 0x1p-8f, 1.0f + 0x3p-8f), 0x3f823f80u);  // ties to even
  reference::Random random(2);
  for (int i = 0; i < 1000; ++i) {
    const float x = float(double(random()) * std::pow(10.0, i % 21 - 10));
    unsigned high, low;
    split_tf32(x, high, low);
    EXPECT_EQ(high % 0x2000 + low % 0x2000, 0u);
    const double both = double(__uint_as_float(high)) + double(__uint_as_float(low));
    EXPECT_LE(std::fabs(both - double(x)), std::fabs(double(x)) * 0x1p-22);
  }
}

TEST(EmulatedMma, ACopyIsThereOnceItHasBeenWaitedFor) {
  alignas(16) float from[4] = {1, 2, 3, 4}, to[4] = {};
  static float* source;
  static float* target;
  source = from;
  target = to;
  cudaLaunchConfig_t config = {};
  config.gridDim = config.blockDim = dim3(1);
  struct Run {
    static void copy(int) {
      copy_16_bytes(target, source);
      const float before = target[3];
      wait_for_copies();
      if (before != 0.0f) target[0] = -1.0f;
    }
  };
  ASSERT_EQ(cudaLaunchKernelEx(&config, Run::copy, 0), cudaSuccess);
  EXPECT_TRUE(to[0] == 1 && to[1] == 2 && to[2] == 3 && to[3] == 4);
}

}  // namespace
