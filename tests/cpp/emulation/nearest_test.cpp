// The nearest-neighbour kernels, run on the CPU by the emulator, against a search written plainly.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "cuda/launch.h"
#include "reference.h"

namespace {

template <typename S>
struct Search {
  std::int64_t n, m, d, splits;
  std::vector<S> query, cloud, partial_distance, distance;
  std::vector<std::int64_t> partial_index, index;

  Search(std::int64_t queries, std::int64_t cloud_size, std::int64_t dimension, std::int64_t parts)
      : n(queries), m(cloud_size), d(dimension), splits(parts) {
    // Whole numbers in a small box: distances are exact and many are equal.
    reference::Random random(unsigned(n + m));
    for (std::int64_t i = 0; i < n * d; ++i) query.push_back(S(std::lround(2 * random())));
    for (std::int64_t i = 0; i < m * d; ++i) cloud.push_back(S(std::lround(2 * random())));
    partial_distance.assign(std::size_t(splits * n), S(-5));
    partial_index.assign(std::size_t(splits * n), -5);
    distance.assign(std::size_t(n), S(-5));
    index.assign(std::size_t(n), -5);
  }

  void run() {
    const levelset::NearestParams<S> p{n,
                                       m,
                                       d,
                                       query.data(),
                                       cloud.data(),
                                       splits,
                                       partial_distance.data(),
                                       partial_index.data(),
                                       distance.data(),
                                       index.data()};
    ASSERT_EQ(levelset::cuda::nearest(p, nullptr), cudaSuccess);
  }

  S squared(std::int64_t i, std::int64_t k) const {
    S sum = 0;
    for (std::int64_t j = 0; j < d; ++j) {
      const S difference = query[std::size_t(i * d + j)] - cloud[std::size_t(k * d + j)];
      sum += difference * difference;
    }
    return sum;
  }

  // The first of the nearest points; 0 where nothing compares.
  std::int64_t nearest(std::int64_t i) const {
    std::int64_t best = 0;
    S least = std::numeric_limits<S>::infinity();
    for (std::int64_t k = 0; k < m; ++k) {
      if (squared(i, k) < least) {
        least = squared(i, k);
        best = k;
      }
    }
    return best;
  }

  void check() {
    emulation::for_each_order(
        [&] {
          std::fill(index.begin(), index.end(), -5);
          run();
          for (std::int64_t i = 0; i < n; ++i) {
            const std::int64_t expected = nearest(i);
            ASSERT_EQ(index[std::size_t(i)], expected)
                << "query " << i << ", order " << emulation::order_name();
            const S length = std::sqrt(squared(i, expected));
            if (std::isnan(length)) {
              ASSERT_TRUE(std::isnan(distance[std::size_t(i)]));
            } else {
              ASSERT_EQ(distance[std::size_t(i)], length);
            }
          }
        },
        1);
  }
};

template <typename S>
class EmulatedNearest : public testing::Test {};
using Scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(EmulatedNearest, Scalars);

// Around the tile of 512 points and the 256 queries of a block; fewer points than parts.
TYPED_TEST(EmulatedNearest, EqualsPlainSearchWithTiesToTheSmallestIndex) {
  for (const std::int64_t d : {1, 2, 3, 5}) {
    for (const std::int64_t m : {1, 5, 512, 513, 1100}) {
      for (const std::int64_t n : {0, 1, 129, 300}) {
        for (const std::int64_t splits : {1, 3, 7}) {
          if (m > 513 && n > 129) continue;
          SCOPED_TRACE(testing::Message()
                       << "d " << d << ", m " << m << ", n " << n << ", splits " << splits);
          Search<TypeParam>(n, m, d, splits).check();
        }
      }
    }
  }
}

TYPED_TEST(EmulatedNearest, NotFiniteNumbers) {
  using S = TypeParam;
  const S nan = std::numeric_limits<S>::quiet_NaN(), inf = std::numeric_limits<S>::infinity();
  for (const std::int64_t d : {2, 3, 5}) {
    for (const std::int64_t splits : {1, 4}) {
      Search<S> p(10, 30, d, splits);
      p.query[std::size_t(2 * d)] = nan;
      p.query[std::size_t(5 * d + 1)] = inf;
      p.cloud[0] = nan;
      p.cloud[std::size_t(7 * d + 1)] = inf;
      p.check();
    }
  }
}

TYPED_TEST(EmulatedNearest, PointsCloseToTheCloudKeepTheirDigits) {
  using S = TypeParam;
  Search<S> p(1, 3, 3, 1);
  p.query = {S(1000), S(1000), S(1000)};
  p.cloud = {S(0), S(0), S(0), std::nextafter(S(1000), S(2000)), S(1000), S(1000),
             S(9), S(9), S(9)};
  p.run();
  EXPECT_EQ(p.index[0], 1);
  EXPECT_EQ(p.distance[0], std::nextafter(S(1000), S(2000)) - S(1000));
}

TEST(NearestSplits, FillTheDeviceWithinTheLimits) {
  for (const std::int64_t n : {0, 1, 255, 257, 10000, 100000000}) {
    for (const std::int64_t m : {1, 2048, 2049, 170000, 100000000}) {
      const std::int64_t splits = levelset::cuda::nearest_splits(n, m);
      EXPECT_GE(splits, 1);
      EXPECT_LE(splits, 4096);
      EXPECT_LE(splits, (m + 2047) / 2048);
    }
  }
  EXPECT_GT(levelset::cuda::nearest_splits(1, 1000000), 100);
  EXPECT_EQ(levelset::cuda::nearest_splits(100000000, 1000000), 1);
}

}  // namespace
