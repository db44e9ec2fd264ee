// apply and adjoint on the CPU against long double.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "core/limits.h"
#include "cpu/rows.h"
#include "problems.h"

namespace {

using levelset::RankTolerance;
using levelset::RowStatus;
using problems::code;
using problems::Pinv;
using reference::Real;

template <typename S>
void run(Pinv<S>& p, std::int64_t begin, std::int64_t end) {
  if (p.adjoint) {
    levelset::cpu::pinv_adjoint(p.params(), begin, end);
  } else {
    levelset::cpu::pinv_apply(p.params(), begin, end);
  }
}

template <typename S>
void run(Pinv<S>& p) {
  run(p, 0, p.n);
}

template <typename S>
bool same_bits(const std::vector<S>& a, const std::vector<S>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0;
}

// Allowed error of a row whose smallest orthogonal part is `part`.
template <typename S>
Real allowed(Real part, std::int64_t d) {
  return Real(std::numeric_limits<S>::epsilon()) * (64 + std::sqrt(Real(d))) / part;
}

// Replaces row k by cos(angle) row 0 + sin(angle) v, where v is orthogonal to the rows before k.
template <typename S>
void tilt(Pinv<S>& p, std::int64_t i, int k, Real angle) {
  const reference::Factor factor(p.row(i, 0), k + 1, p.d);
  const Real* first = factor.q.data();
  const Real* across = factor.q.data() + k * p.d;
  for (std::int64_t j = 0; j < p.d; ++j) {
    p.row(i, k)[j] = S(std::cos(angle) * first[j] + std::sin(angle) * across[j]);
  }
}

template <typename S>
class PinvTest : public testing::Test {};
using Scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(PinvTest, Scalars);

TYPED_TEST(PinvTest, EqualsReferenceForAllShapes) {
  using S = TypeParam;
  for (int l = 1; l <= levelset::kMaxOutputs; ++l) {
    std::vector<std::int64_t> columns = {784, 100000};
    for (std::int64_t d : {0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100}) columns.push_back(l + d);
    for (const std::int64_t d : columns) {
      for (const bool adjoint : {false, true}) {
        SCOPED_TRACE(testing::Message() << "l " << l << ", d " << d << ", adjoint " << adjoint);
        Pinv<S> p(adjoint, d > 1000 ? 2 : 9, l, d, unsigned(100 * l + d));
        run(p);
        for (std::int64_t i = 0; i < p.n; ++i) {
          ASSERT_EQ(p.status[std::size_t(i)], code(RowStatus::kConverged));
          // The smallest part only bounds the condition number up to a factor that grows with l.
          const Real part = p.factor(i).smallest_part / Real(l);
          ASSERT_LE(p.error(i), allowed<S>(part, d));
        }
      }
    }
  }
}

TYPED_TEST(PinvTest, HandComputedRows) {
  using S = TypeParam;
  Pinv<S> one(false, 1, 1, 2, 0);
  one.jacobian = {S(3), S(4)};
  one.input = {S(5)};
  run(one);
  EXPECT_NEAR(one.output[0], 0.6, 1e-6);
  EXPECT_NEAR(one.output[1], 0.8, 1e-6);

  // Square and invertible: apply solves J y = r.
  Pinv<S> two(false, 1, 2, 2, 0);
  two.jacobian = {S(2), S(1), S(1), S(3)};
  two.input = {S(3), S(5)};
  run(two);
  EXPECT_NEAR(two.output[0], 0.8, 1e-6);
  EXPECT_NEAR(two.output[1], 1.4, 1e-6);

  Pinv<S> three(true, 1, 3, 4, 0);
  three.jacobian = {S(2), S(0), S(0), S(0), S(0), S(0), S(4), S(0), S(0), S(8), S(0), S(0)};
  three.input = {S(1), S(2), S(3), S(4)};
  run(three);
  EXPECT_NEAR(three.output[0], 0.5, 1e-6);
  EXPECT_NEAR(three.output[1], 0.75, 1e-6);
  EXPECT_NEAR(three.output[2], 0.25, 1e-6);
}

TYPED_TEST(PinvTest, ApplyAndAdjointAreTransposed) {
  using S = TypeParam;
  for (int l = 1; l <= levelset::kMaxOutputs; ++l) {
    for (const std::int64_t d : {std::int64_t(l), std::int64_t(l + 3), std::int64_t(784)}) {
      Pinv<S> apply(false, 20, l, d, unsigned(l)), adjoint(true, 20, l, d, unsigned(l) + 50);
      adjoint.jacobian = apply.jacobian;
      run(apply);
      run(adjoint);
      for (std::int64_t i = 0; i < apply.n; ++i) {
        const auto y = apply.result(i), s = adjoint.result(i);
        const auto r = reference::widen(apply.input.data() + i * l, l);
        const auto g = reference::widen(adjoint.input.data() + i * d, d);
        const Real left = reference::dot(y.data(), g.data(), d);
        const Real right = reference::dot(r.data(), s.data(), l);
        const Real scale = reference::norm(y) * reference::norm(g);
        const Real part = apply.factor(i).smallest_part / Real(l);
        EXPECT_LE(std::abs(left - right), allowed<S>(part, d) * scale) << "l " << l << ", d " << d;
      }
    }
  }
}

// Forming 1 - cos^2 of the angle loses all digits in float32 below 3e-4. Here the loss is at most
// that of the input's own rounding, eps / angle, down to the rank tolerance.
TYPED_TEST(PinvTest, NearlyParallelRows) {
  using S = TypeParam;
  const Real tolerance = Real(RankTolerance<S>::value);
  for (const int l : {2, 3, 5, 8}) {
    for (const std::int64_t d : {std::int64_t(l), std::int64_t(9), std::int64_t(784)}) {
      for (const Real angle :
           {1e-1L, 1e-2L, 1e-3L, 1e-4L, 3e-5L, 1e-5L, 1e-6L, 1e-7L, 1e-8L, 1e-9L}) {
        for (const bool adjoint : {false, true}) {
          SCOPED_TRACE(testing::Message() << "l " << l << ", d " << d << ", angle " << angle
                                          << ", adjoint " << adjoint);
          Pinv<S> p(adjoint, 5, l, d, unsigned(l + d));
          for (std::int64_t i = 0; i < p.n; ++i) tilt(p, i, l - 1, angle);
          run(p);
          for (std::int64_t i = 0; i < p.n; ++i) {
            const Real part = p.factor(i).smallest_part;
            const auto status = RowStatus(p.status[std::size_t(i)]);
            if (part > tolerance * 1.1L) {
              ASSERT_EQ(status, RowStatus::kConverged);
              const Real conditioned = std::min(part, Real(0.02L));  // the other rows' share
              EXPECT_LE(p.error(i), allowed<S>(conditioned, d));
            } else if (part < tolerance * 0.9L) {
              ASSERT_EQ(status, RowStatus::kRankDeficient);
              for (const Real x : p.result(i)) ASSERT_EQ(x, 0);
            }
          }
        }
      }
    }
  }
}

// The rank rule at its documented threshold, from both sides, for rows of any length.
TYPED_TEST(PinvTest, RankRuleIsSharpAndScaleFree) {
  using S = TypeParam;
  const S tolerance = S(RankTolerance<S>::value);
  for (const int l : {2, 3, 4, 8}) {
    for (const std::int64_t d : {std::int64_t(l), std::int64_t(l + 30)}) {
      for (const S scale : {S(1), S(1e-30), S(1e30), S(3.3e-3), S(7e5)}) {
        for (const bool full : {false, true}) {
          Pinv<S> p(false, 1, l, d, 3);
          std::fill(p.jacobian.begin(), p.jacobian.end(), S(0));
          for (int k = 0; k + 1 < l; ++k) p.row(0, k)[k] = S(1);
          // The last row is e_1 + t e_l: its orthogonal part is t of it, as t is small.
          p.row(0, l - 1)[0] = scale;
          p.row(0, l - 1)[l - 1] = scale * tolerance * (full ? S(1.001) : S(0.999));
          run(p);
          EXPECT_EQ(RowStatus(p.status[0]),
                    full ? RowStatus::kConverged : RowStatus::kRankDeficient)
              << "l " << l << ", d " << d << ", scale " << scale << ", full " << full;
        }
      }
    }
  }
}

TYPED_TEST(PinvTest, DependentRowsAreNoticed) {
  using S = TypeParam;
  for (int l = 2; l <= levelset::kMaxOutputs; ++l) {
    for (const std::int64_t d : {std::int64_t(1), std::int64_t(l - 1), std::int64_t(50)}) {
      for (const bool adjoint : {false, true}) {
        SCOPED_TRACE(testing::Message() << "l " << l << ", d " << d);
        Pinv<S> p(adjoint, 30, l, d, unsigned(l + d));
        for (std::int64_t i = 0; i < p.n && d >= l; ++i) {
          // A copy, a multiple, or (l > 2) the exact sum of two others.
          for (std::int64_t j = 0; j < d; ++j) {
            S x = p.row(i, 0)[j];
            if (i % 3 == 1) x *= S(-1000);
            if (i % 3 == 2 && l > 2) x += p.row(i, 1)[j];
            p.row(i, l - 1)[j] = x;
          }
        }
        run(p);
        for (std::int64_t i = 0; i < p.n; ++i) {
          ASSERT_EQ(RowStatus(p.status[std::size_t(i)]), RowStatus::kRankDeficient) << "row " << i;
          for (const Real x : p.result(i)) ASSERT_EQ(x, 0);
        }
      }
    }
  }
}

// Two rows at a small angle span the plane as well as any: a third row in it is dependent. The Gram
// matrix alone would show a pivot of eps / angle^2.
TYPED_TEST(PinvTest, DependenceOnNearlyParallelRowsIsNoticed) {
  using S = TypeParam;
  reference::Random random(6);
  for (const S angle : {S(1e-1), S(1e-2), S(1e-3), S(1e-4), S(2e-5)}) {
    for (int repeat = 0; repeat < 50; ++repeat) {
      Pinv<S> p(false, 1, 3, 2, unsigned(repeat));
      const double turn = random();
      for (const int k : {0, 1}) {
        p.row(0, k)[0] = S(std::cos(turn + k * double(angle)));
        p.row(0, k)[1] = S(std::sin(turn + k * double(angle)));
      }
      run(p);
      EXPECT_EQ(RowStatus(p.status[0]), RowStatus::kRankDeficient) << "angle " << angle;
    }
  }
}

// J -> D J and r -> D r with D = diag(scales) is the same problem.
TYPED_TEST(PinvTest, RowScalingDoesNotChangeTheResult) {
  using S = TypeParam;
  const std::vector<S> scales =
      std::is_same_v<S, float> ? std::vector<S>{S(1e-30), S(1e30), S(1e-36), S(1e36), S(1)}
                               : std::vector<S>{S(1e-300), S(1e300), S(1e-200), S(1e200), S(1)};
  for (const int l : {1, 2, 3, 8}) {
    for (const std::int64_t d : {std::int64_t(l), std::int64_t(40)}) {
      for (std::size_t shift = 0; shift < scales.size(); ++shift) {
        for (const bool adjoint : {false, true}) {
          SCOPED_TRACE(testing::Message() << "l " << l << ", d " << d << ", shift " << shift);
          Pinv<S> p(adjoint, 6, l, d, unsigned(l + d));
          for (std::int64_t i = 0; i < p.n; ++i) {
            for (int k = 0; k < l; ++k) {
              const S scale = scales[(std::size_t(k) + shift) % scales.size()];
              for (std::int64_t j = 0; j < d; ++j) p.row(i, k)[j] *= scale;
              if (!adjoint) p.input[std::size_t(i * l + k)] *= scale;
            }
          }
          run(p);
          for (std::int64_t i = 0; i < p.n; ++i) {
            ASSERT_EQ(RowStatus(p.status[std::size_t(i)]), RowStatus::kConverged);
            const Real part = p.factor(i).smallest_part / Real(l);
            const auto result = p.result(i), expected = p.expected(i);
            if (!adjoint) {
              ASSERT_LE(reference::relative_error(result, expected), allowed<S>(part, d));
              continue;
            }
            // Every s_k has a scale of its own; what leaves the range of normal numbers is rounded.
            Real largest = 0;
            for (int k = 0; k < l; ++k) {
              const Real scale = scales[(std::size_t(k) + shift) % scales.size()];
              largest = std::max(largest, std::abs(expected[std::size_t(k)] * scale));
            }
            for (int k = 0; k < l; ++k) {
              const Real scale = scales[(std::size_t(k) + shift) % scales.size()];
              if (std::abs(expected[std::size_t(k)]) > Real(std::numeric_limits<S>::max()) / 2)
                continue;
              ASSERT_NEAR(
                  result[std::size_t(k)] * scale, expected[std::size_t(k)] * scale,
                  allowed<S>(part, d) * largest + scale * Real(std::numeric_limits<S>::min()) * 4);
            }
          }
        }
      }
    }
  }
}

// Scaling by a power of two inside the plain range changes exponents only.
TYPED_TEST(PinvTest, PowerOfTwoScalingKeepsTheBits) {
  using S = TypeParam;
  for (const int l : {1, 2, 3}) {
    Pinv<S> p(false, 50, l, 33, 5), scaled = p;
    for (S& x : scaled.jacobian) x *= S(1024);
    for (S& x : scaled.input) x *= S(1024);
    run(p);
    run(scaled);
    EXPECT_TRUE(same_bits(p.output, scaled.output)) << "l " << l;
  }
}

TYPED_TEST(PinvTest, RowsShorterThanANormalNumberCountAsZero) {
  using S = TypeParam;
  using Limits = std::numeric_limits<S>;
  struct Case {
    S x;
    std::int64_t d;
    RowStatus status;
  };
  const Case cases[] = {
      {S(0), 5, RowStatus::kRankDeficient},
      {S(-0.0), 5, RowStatus::kRankDeficient},
      {Limits::denorm_min(), 5, RowStatus::kRankDeficient},
      {Limits::min() / 4, 5, RowStatus::kRankDeficient},
      // Subnormal numbers, but a row of them that is long enough.
      {Limits::min() / 4, 100, RowStatus::kConverged},
      {Limits::min() * 2, 1, RowStatus::kConverged},
      {Limits::max() / 4, 5, RowStatus::kConverged},
      // Finite numbers, but a length that is not.
      {Limits::max(), 5, RowStatus::kNonFinite},
  };
  for (const int l : {1, 2, 3}) {
    for (const Case& c : cases) {
      if (c.d < l) continue;
      Pinv<S> p(false, 1, l, c.d, 8);
      std::fill_n(p.row(0, l - 1), c.d, c.x);
      p.input.assign(std::size_t(l), S(0));
      run(p);
      EXPECT_EQ(RowStatus(p.status[0]), c.status) << "l " << l << ", x " << c.x << ", d " << c.d;
      for (const Real x : p.result(0)) EXPECT_EQ(x, 0);
    }
  }
}

TYPED_TEST(PinvTest, BadRowsAreMarkedAndLeaveOthersAlone) {
  using S = TypeParam;
  const S nan = std::numeric_limits<S>::quiet_NaN(), inf = std::numeric_limits<S>::infinity();
  for (const int l : {1, 2, 3, 8}) {
    for (const std::int64_t d : {std::int64_t(l), std::int64_t(37)}) {
      for (const bool adjoint : {false, true}) {
        Pinv<S> good(adjoint, 8, l, d, 21), bad = good;
        bad.row(1, 0)[d - 1] = nan;
        bad.row(3, l - 1)[0] = inf;
        bad.row(4, l - 1)[d / 2] = -inf;
        std::fill_n(bad.row(6, l - 1), d, S(0));
        run(good);
        run(bad);
        const RowStatus expected[] = {RowStatus::kConverged,     RowStatus::kNonFinite,
                                      RowStatus::kConverged,     RowStatus::kNonFinite,
                                      RowStatus::kNonFinite,     RowStatus::kConverged,
                                      RowStatus::kRankDeficient, RowStatus::kConverged};
        const std::size_t width = std::size_t(bad.output_width());
        for (std::size_t i = 0; i < 8; ++i) {
          EXPECT_EQ(RowStatus(bad.status[i]), expected[i]) << "l " << l << ", row " << i;
          for (std::size_t j = i * width; j < (i + 1) * width; ++j) {
            if (expected[i] == RowStatus::kConverged) {
              EXPECT_EQ(bad.output[j], good.output[j]);
            } else {
              EXPECT_EQ(bad.output[j], S(0));
            }
          }
        }
      }
    }
  }
}

TYPED_TEST(PinvTest, AnySplitOfTheRowsGivesTheSameBits) {
  using S = TypeParam;
  for (const int l : {1, 2, 3, 8}) {
    for (const std::int64_t d : {std::int64_t(l), std::int64_t(3) + l, std::int64_t(100)}) {
      for (const bool adjoint : {false, true}) {
        Pinv<S> whole(adjoint, 13, l, d, 4), parts = whole;
        run(whole);
        for (const std::int64_t cut : {12, 5, 4, 0}) {
          run(parts, cut, cut == 12 ? 13 : (cut == 5 ? 12 : (cut == 4 ? 5 : 4)));
        }
        EXPECT_TRUE(same_bits(whole.output, parts.output)) << "l " << l << ", d " << d;
        EXPECT_EQ(whole.status, parts.status);
      }
    }
  }
}

TYPED_TEST(PinvTest, RowsOutsideOfTheRangeAreNotWritten) {
  using S = TypeParam;
  Pinv<S> p(false, 5, 2, 3, 4);
  run(p, 2, 4);
  for (const std::size_t i : {0u, 1u, 4u}) {
    EXPECT_EQ(p.status[i], std::int8_t(problems::kUntouched));
    EXPECT_EQ(p.output[i * 3], S(problems::kUntouched));
  }
  EXPECT_EQ(RowStatus(p.status[2]), RowStatus::kConverged);
}

TYPED_TEST(PinvTest, NoRowsAndNoColumns) {
  using S = TypeParam;
  for (const int l : {1, 2, 3}) {
    for (const bool adjoint : {false, true}) {
      Pinv<S> empty(adjoint, 0, l, 3, 0);
      run(empty);
      Pinv<S> narrow(adjoint, 2, l, 0, 0);  // a gradient without columns is zero
      run(narrow);
      EXPECT_EQ(RowStatus(narrow.status[1]), RowStatus::kRankDeficient);
    }
  }
}

}  // namespace
