// The vector kernels of every instruction set that this processor has, against the row math: the
// same numbers but for rounding, the same status, and what they leave to it is marked.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "core/bracket_row.h"
#include "core/dispatch.h"
#include "core/newton_row.h"
#include "cpu/vector_kernels.h"
#include "problems.h"

namespace {

using levelset::RowStatus;
using levelset::SerialTeam;
using levelset::cpu::kIrregularRow;
using levelset::cpu::VectorKernels;
using problems::code;
using problems::Newton;
using problems::Pinv;

template <typename S>
std::vector<const VectorKernels<S>*> all_kernels() {
  std::vector<const VectorKernels<S>*> found;
  for (const auto* kernels :
       {levelset::cpu::vector_kernels_portable<S>(), levelset::cpu::vector_kernels_avx2<S>(),
        levelset::cpu::vector_kernels_avx512<S>()}) {
    if (kernels != nullptr) found.push_back(kernels);
  }
  return found;
}

template <typename S>
class VectorTest : public testing::Test {
 protected:
  static constexpr S kNan = std::numeric_limits<S>::quiet_NaN();
  static constexpr S kInfinity = std::numeric_limits<S>::infinity();
  static constexpr S kEpsilon = std::numeric_limits<S>::epsilon();

  // Rows that a vector kernel has to leave to the row math, at these places among others.
  static constexpr int kOdd[] = {2, 17, 40, 52};

  static void spoil(S* row, int l, std::int64_t d, int which) {
    switch (which) {
      case 2: std::fill_n(row, d, S(0)); break;
      case 17: row[l * d - 1] = kNan; break;
      case 40:
        for (std::int64_t j = 0; j < d; ++j) row[(l - 1) * d + j] *= S(1e-14);
        break;
      default: row[0] = kInfinity; break;
    }
  }
};
using Scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(VectorTest, Scalars);

const std::int64_t kColumns[] = {2, 3, 16, 31, 40, 784};

TYPED_TEST(VectorTest, ApplyAndAdjoint) {
  using S = TypeParam;
  for (const auto* kernels : all_kernels<S>()) {
    for (const bool adjoint : {false, true}) {
      for (const int l : {1, 2}) {
        for (const std::int64_t d : kColumns) {
          ASSERT_TRUE(kernels->covers(l, d));
          Pinv<S> p(adjoint, 61, l, d, unsigned(l + d));
          for (const int i : TestFixture::kOdd) TestFixture::spoil(p.row(i, 0), l, d, i);
          auto wanted = p;
          levelset::with_outputs(l, [&](auto outputs) {
            for (std::int64_t i = 0; i < p.n; ++i) {
              if (adjoint) {
                levelset::pinv_adjoint_row<S, S, outputs()>(SerialTeam{}, wanted.params(), i, d);
              } else {
                levelset::pinv_apply_row<S, S, outputs()>(SerialTeam{}, wanted.params(), i, d);
              }
            }
          });
          const auto run = adjoint ? kernels->pinv_adjoint : kernels->pinv_apply;
          EXPECT_TRUE(run(p.params(), 0, p.n));
          for (std::int64_t i = 0; i < p.n; ++i) {
            const bool odd =
                std::count(std::begin(TestFixture::kOdd), std::end(TestFixture::kOdd), int(i)) > 0;
            ASSERT_EQ(p.status[std::size_t(i)], odd ? kIrregularRow : code(RowStatus::kConverged))
                << "l " << l << ", d " << d << ", row " << i;
            if (odd) continue;
            const auto got = p.result(i), expected = wanted.result(i);
            const reference::Real part = p.factor(i).smallest_part;
            const reference::Real allowed = 40 * TestFixture::kEpsilon / (part * part);
            if (adjoint) {
              EXPECT_LE(p.error(i), allowed) << "l " << l << ", d " << d << ", row " << i;
            } else {
              EXPECT_LE(reference::relative_error(got, expected), allowed)
                  << "l " << l << ", d " << d << ", row " << i;
            }
          }
          // Any split into ranges gives the same bits.
          auto parts = p;
          std::fill(parts.output.begin(), parts.output.end(), S(0));
          for (const auto& [begin, end] : {std::pair{0, 7}, std::pair{7, 40}, std::pair{40, 61}}) {
            run(parts.params(), begin, end);
          }
          EXPECT_EQ(parts.status, p.status);
          for (std::int64_t i = 0; i < p.n; ++i) {
            if (p.status[std::size_t(i)] == kIrregularRow) continue;
            const std::int64_t width = p.output_width();
            EXPECT_EQ(std::memcmp(p.output.data() + i * width, parts.output.data() + i * width,
                                  std::size_t(width) * sizeof(S)),
                      0);
          }
        }
      }
    }
  }
}

// Every kind of row at once: running, at rest, within the tolerance, held by the box, shortened.
TYPED_TEST(VectorTest, NewtonUpdate) {
  using S = TypeParam;
  for (const auto* kernels : all_kernels<S>()) {
    for (const bool in_place : {false, true}) {
      for (const int l : {1, 2}) {
        for (const std::int64_t d : kColumns) {
          Newton<S> p(61, l, d, unsigned(l + d));
          p.tol = 0.05;
          p.max_step = 0.5;
          p.lower.assign(std::size_t(d), S(-1.5));
          p.upper.assign(std::size_t(d), S(1.25));
          p.running.assign(std::size_t(p.n), code(RowStatus::kRunning));
          for (const std::size_t i : {3, 30, 60}) p.running[i] = code(RowStatus::kStalled);
          for (const std::size_t i : {4, 31, 59}) {
            std::copy_n(p.level.begin() + long(i) * l, l, p.values.begin() + long(i) * l);
          }
          for (const int i : TestFixture::kOdd) {
            TestFixture::spoil(p.jacobian.data() + i * l * d, l, d, i);
          }
          p.points[std::size_t(10 * d + 1)] = TestFixture::kNan;
          p.in_place = in_place;
          if (in_place) p.status = p.running;
          auto wanted = p;
          levelset::with_outputs(l, [&](auto outputs) {
            for (std::int64_t i = 0; i < p.n; ++i) {
              levelset::newton_update_row<S, S, outputs()>(SerialTeam{}, wanted.params(), i, d);
            }
          });
          const auto before = p.points;
          EXPECT_TRUE(kernels->newton_update(p.params(), 0, p.n));
          for (std::int64_t i = 0; i < p.n; ++i) {
            const auto status = p.status[std::size_t(i)];
            if (status == kIrregularRow) {
              EXPECT_GT(
                  std::count(std::begin(TestFixture::kOdd), std::end(TestFixture::kOdd), int(i)),
                  0);
              if (in_place) {
                EXPECT_EQ(std::memcmp(p.points.data() + i * d, before.data() + i * d,
                                      std::size_t(d) * sizeof(S)),
                          0);
              }
              continue;
            }
            EXPECT_EQ(status, wanted.status[std::size_t(i)])
                << "l " << l << ", d " << d << ", row " << i;
            if (i == 10) continue;
            const auto got = p.result(i), expected = wanted.result(i);
            const reference::Real part =
                reference::Factor(p.jacobian.data() + i * l * d, l, d).smallest_part;
            for (std::int64_t j = 0; j < d; ++j) {
              EXPECT_NEAR(got[std::size_t(j)], expected[std::size_t(j)],
                          40 * TestFixture::kEpsilon / (part * part))
                  << "l " << l << ", d " << d << ", row " << i;
            }
          }
        }
      }
    }
  }
}

TYPED_TEST(VectorTest, PointsOfSegmentsToTheBit) {
  using S = TypeParam;
  reference::Random random(5);
  for (const auto* kernels : all_kernels<S>()) {
    for (const std::int64_t d : {1, 2, 15, 16, 33, 784}) {
      const auto start = random.numbers<S>(d), end = random.numbers<S>(d);
      for (const double s : {0.0, 1e-9, 0.1, 0.3, 0.5, 0.7123456789, 1 - 1e-12, 1.0}) {
        std::vector<S> point(static_cast<std::size_t>(d));
        const levelset::SegmentPoint<S> here(s), first(0.25);
        unsigned expected = levelset::cpu::kFinite;
        const unsigned found =
            kernels->move_on_segment({d, start.data(), end.data(), s, {0.25, s}, point.data()});
        for (std::size_t j = 0; j < std::size_t(d); ++j) {
          const S wanted = here(start[j], end[j]);
          EXPECT_EQ(std::memcmp(&wanted, &point[j], sizeof(S)), 0) << "d " << d << ", s " << s;
          if (wanted != first(start[j], end[j])) expected |= levelset::cpu::kLeavesFirst;
        }
        EXPECT_EQ(found, expected) << "d " << d << ", s " << s;
      }
    }
  }
}

// A column that alone differs, or is not finite, is noticed wherever it stands.
TYPED_TEST(VectorTest, OneColumnOfASegment) {
  using S = TypeParam;
  const std::int64_t d = 77;
  for (const auto* kernels : all_kernels<S>()) {
    for (std::int64_t j = 0; j < d; ++j) {
      std::vector<S> start(std::size_t(d), S(2)), end = start, point = start;
      const auto run = [&] {
        return kernels->move_on_segment(
            {d, start.data(), end.data(), 0.25, {0.0, 1.0}, point.data()});
      };
      EXPECT_EQ(run(), levelset::cpu::kFinite);
      end[std::size_t(j)] = S(3);
      EXPECT_EQ(run(), levelset::cpu::kFinite | levelset::cpu::kLeavesBoth);
      EXPECT_EQ(point[std::size_t(j)], S(2.25));
      end[std::size_t(j)] = TestFixture::kInfinity;
      EXPECT_EQ(run() & levelset::cpu::kFinite, 0u);
    }
  }
}

}  // namespace
