// One Newton step on the CPU: exact problems, long double, and the promises about rows and bits.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "core/limits.h"
#include "cpu/rows.h"
#include "problems.h"

namespace {

using levelset::RowStatus;
using problems::code;
using problems::kUntouched;
using problems::Newton;
using reference::Real;

template <typename S>
void run(Newton<S>& p) {
  levelset::cpu::newton_update(p.params(), 0, p.m);
}

template <typename S>
bool same_bits(const std::vector<S>& a, const std::vector<S>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0;
}

// F(x) = A x + b at the points, with A one matrix for all of them.
template <typename S>
struct Affine {
  std::vector<S> a, b;
  int l;
  std::int64_t d;

  Affine(int outputs, std::int64_t columns) : l(outputs), d(columns) {
    reference::Random random(unsigned(l + d));
    a = random.numbers<S>(l * d);
    b = random.numbers<S>(l);
  }

  void fill(Newton<S>& p) const {
    for (std::int64_t i = 0; i < p.m; ++i) {
      std::copy(a.begin(), a.end(), p.jacobian.begin() + i * l * d);
      for (int k = 0; k < l; ++k)
        p.values[std::size_t(i * l + k)] = S(value(p.points.data() + i * d, k));
    }
  }

  Real value(const S* x, int k) const {
    Real sum = b[std::size_t(k)];
    for (std::int64_t j = 0; j < d; ++j) sum += Real(a[std::size_t(k * d + j)]) * Real(x[j]);
    return sum;
  }
};

template <typename S>
class NewtonTest : public testing::Test {};
using Scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(NewtonTest, Scalars);

TYPED_TEST(NewtonTest, AffineFieldIsSolvedInOneStep) {
  using S = TypeParam;
  for (int l = 1; l <= levelset::kMaxOutputs; ++l) {
    for (const std::int64_t d : {std::int64_t(l), std::int64_t(l + 5), std::int64_t(784)}) {
      Newton<S> p(10, l, d, 3);
      const Affine<S> field(l, d);
      field.fill(p);
      run(p);
      const reference::Factor factor(field.a.data(), l, d);
      const Real allowed =
          Real(std::numeric_limits<S>::epsilon()) * 100 * Real(d) * l / factor.smallest_part;
      for (std::int64_t i = 0; i < p.n; ++i) {
        ASSERT_EQ(RowStatus(p.status[std::size_t(i)]), RowStatus::kRunning);
        for (int k = 0; k < l; ++k) {
          EXPECT_NEAR(field.value(p.next.data() + i * d, k), p.level[std::size_t(i * l + k)],
                      allowed)
              << "l " << l << ", d " << d;
        }
      }
    }
  }
}

TYPED_TEST(NewtonTest, EqualsReferenceStep) {
  using S = TypeParam;
  for (const int l : {1, 2, 3, 8}) {
    for (const std::int64_t d : {std::int64_t(8), std::int64_t(33), std::int64_t(1000)}) {
      Newton<S> p(20, l, d, unsigned(l + d));
      run(p);
      for (std::int64_t i = 0; i < p.n; ++i) {
        const auto step = p.step(i), next = p.result(i);
        const Real part = reference::Factor(p.jacobian.data() + i * l * d, l, d).smallest_part / l;
        for (std::int64_t j = 0; j < d; ++j) {
          const Real point = p.points[std::size_t(i * d + j)];
          EXPECT_NEAR(next[std::size_t(j)], point - step[std::size_t(j)],
                      50 * std::numeric_limits<S>::epsilon() / part * (5 + reference::norm(step)));
        }
      }
    }
  }
}

TYPED_TEST(NewtonTest, ToleranceIncludesItsBoundary) {
  using S = TypeParam;
  const S tol = S(0.125);
  Newton<S> p(4, 2, 3, 1);
  p.tol = tol;
  const S outside = std::nextafter(tol, S(1));
  std::fill(p.level.begin(), p.level.end(), S(0));
  p.values = {tol, S(0), S(0), -outside, -tol, tol, tol, outside};
  run(p);
  const RowStatus expected[] = {RowStatus::kConverged, RowStatus::kRunning, RowStatus::kConverged,
                                RowStatus::kRunning};
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(RowStatus(p.status[i]), expected[i]) << "row " << i;
    const bool stayed = std::equal(p.next.begin() + long(i) * 3, p.next.begin() + long(i + 1) * 3,
                                   p.points.begin() + long(i) * 3);
    EXPECT_EQ(stayed, expected[i] == RowStatus::kConverged);
  }
}

// A converged row says so even where its Jacobian could not be used.
TYPED_TEST(NewtonTest, ConvergedRowsDoNotNeedAJacobian) {
  using S = TypeParam;
  Newton<S> p(2, 1, 3, 1);
  p.values = p.level;
  std::fill_n(p.jacobian.begin(), 3, S(0));
  std::fill_n(p.jacobian.begin() + 3, 3, std::numeric_limits<S>::quiet_NaN());
  run(p);
  EXPECT_EQ(RowStatus(p.status[0]), RowStatus::kConverged);
  EXPECT_EQ(RowStatus(p.status[1]), RowStatus::kConverged);
  EXPECT_TRUE(same_bits(p.next, p.points));
}

TYPED_TEST(NewtonTest, StepCapShortensWithoutTurning) {
  using S = TypeParam;
  for (const int l : {1, 2, 3}) {
    Newton<S> p(40, l, 6, 9);
    std::fill(p.points.begin(), p.points.end(), S(0));
    p.max_step = 0.25;
    run(p);
    int capped = 0;
    for (std::int64_t i = 0; i < p.n; ++i) {
      auto step = p.step(i);
      const Real length = reference::norm(step);
      if (length > 0.25L) {
        ++capped;
        for (Real& x : step) x *= 0.25L / length;
      }
      for (Real& x : step) x = -x;
      EXPECT_LE(reference::relative_error(p.result(i), step),
                500 * std::numeric_limits<S>::epsilon());
      EXPECT_LE(reference::norm(p.result(i)), 0.25L * (1 + 50 * std::numeric_limits<S>::epsilon()));
    }
    EXPECT_GT(capped, 5);
    EXPECT_LT(capped, 40);
  }
}

// The square of this step overflows, the step does not, and the cap brings it back.
TYPED_TEST(NewtonTest, LongStepsAreCappedNotRefused) {
  using S = TypeParam;
  const S small = std::is_same_v<S, float> ? S(1e-25) : S(1e-200);
  for (const int l : {1, 2}) {
    Newton<S> p(1, l, 3, 2);
    std::fill(p.points.begin(), p.points.end(), S(0));
    std::fill(p.level.begin(), p.level.end(), S(0));
    p.jacobian = {small, S(0), S(0), S(0), small, S(0)};
    p.jacobian.resize(std::size_t(3 * l));
    p.values.assign(std::size_t(l), S(1));
    p.max_step = 1;
    run(p);
    EXPECT_EQ(RowStatus(p.status[0]), RowStatus::kRunning) << "l " << l;
    EXPECT_NEAR(reference::norm(p.result(0)), 1, 1e-6);
  }
}

TYPED_TEST(NewtonTest, BoxClampsEveryColumn) {
  using S = TypeParam;
  for (const int l : {1, 2, 3}) {
    for (const int sides : {1, 2, 3}) {
      Newton<S> free(30, l, 5, 17), box = free;
      if (sides & 1) box.lower = {S(-0.5), S(-0.1), S(-1), S(0), S(-0.25)};
      if (sides & 2) box.upper = {S(0.5), S(0.1), S(1), S(0), S(0.75)};
      run(free);
      run(box);
      for (std::size_t i = 0; i < 30; ++i) {
        for (std::size_t j = 0; j < 5; ++j) {
          S expected = free.next[i * 5 + j];
          if (sides & 1) expected = std::max(expected, box.lower[j]);
          if (sides & 2) expected = std::min(expected, box.upper[j]);
          EXPECT_EQ(box.next[i * 5 + j], expected);
        }
      }
    }
  }
}

TYPED_TEST(NewtonTest, StalledWhenThePointCannotMove) {
  using S = TypeParam;
  // The box holds it.
  Newton<S> box(1, 1, 2, 0);
  box.points = {S(0.5), S(0.5)};
  box.jacobian = {S(1), S(1)};
  box.values = {S(-1)};
  box.level = {S(0)};
  box.upper = box.points;
  run(box);
  EXPECT_EQ(RowStatus(box.status[0]), RowStatus::kStalled);
  EXPECT_TRUE(same_bits(box.next, box.points));
  // The dtype has no closer point.
  Newton<S> fine = box;
  fine.upper.clear();
  fine.points = {S(1e10), S(-1e10)};
  fine.values = {std::numeric_limits<S>::epsilon()};
  run(fine);
  EXPECT_EQ(RowStatus(fine.status[0]), RowStatus::kStalled);
  // One column that still moves is enough to go on.
  Newton<S> one = box;
  one.upper = {S(0.5), S(2)};
  run(one);
  EXPECT_EQ(RowStatus(one.status[0]), RowStatus::kRunning);
}

TYPED_TEST(NewtonTest, RowsThatDoNotRunAreUntouched) {
  using S = TypeParam;
  const S nan = std::numeric_limits<S>::quiet_NaN();
  const RowStatus others[] = {RowStatus::kConverged,     RowStatus::kMaxIterations,
                              RowStatus::kRankDeficient, RowStatus::kNonFinite,
                              RowStatus::kNotBracketed,  RowStatus::kStalled};
  for (const bool in_place : {false, true}) {
    for (const int l : {1, 2, 3}) {
      Newton<S> p(13, l, 4, 6), all = p;
      run(all);
      p.in_place = in_place;
      std::vector<std::int8_t> before(13, code(RowStatus::kRunning));
      for (std::size_t k = 0; k < 6; ++k) before[2 * k] = code(others[k]);
      (in_place ? p.status : p.running) = before;
      // Signalling bits of a point that takes no part must come through, and nothing else be read.
      std::fill_n(p.points.begin() + 4 * 4, 4, nan);
      std::fill_n(p.jacobian.begin() + 2 * 4 * l, 4 * l, nan);
      std::fill_n(p.values.begin() + 6 * l, l, nan);
      const std::vector<S> points = p.points;
      run(p);
      const std::vector<S>& next = in_place ? p.points : p.next;
      for (std::size_t i = 0; i < 13; ++i) {
        const bool runs = before[i] == code(RowStatus::kRunning);
        EXPECT_EQ(p.status[i], runs ? all.status[i] : before[i]);
        const S* expected = runs ? all.next.data() : points.data();
        EXPECT_EQ(std::memcmp(next.data() + i * 4, expected + i * 4, 4 * sizeof(S)), 0)
            << "row " << i;
      }
    }
  }
}

TYPED_TEST(NewtonTest, InPlaceGivesTheSameBits) {
  using S = TypeParam;
  for (const int l : {1, 2, 3, 8}) {
    for (const std::int64_t d : {std::int64_t(l), std::int64_t(3), std::int64_t(100)}) {
      Newton<S> apart(25, l, d, 12), in_place = apart;
      in_place.in_place = true;
      in_place.status.assign(25, code(RowStatus::kRunning));
      apart.max_step = in_place.max_step = 0.7;
      run(apart);
      run(in_place);
      EXPECT_TRUE(same_bits(apart.next, in_place.points)) << "l " << l << ", d " << d;
      EXPECT_EQ(apart.status, in_place.status);
    }
  }
}

TYPED_TEST(NewtonTest, IndexPicksThePoints) {
  using S = TypeParam;
  for (const int l : {1, 2, 3}) {
    for (const bool one_level : {false, true}) {
      Newton<S> all(12, l, 5, 2);
      if (one_level) {
        all.level_stride = 0;
        all.level.resize(std::size_t(l));
      }
      Newton<S> some = all;
      run(all);
      // Row i of values now belongs to another point: the same problem, permuted and cut.
      some.index = {7, 0, 11, 3, 8};
      some.m = 5;
      for (std::size_t i = 0; i < 5; ++i) {
        const std::int64_t from = some.index[i];
        std::copy_n(all.values.begin() + from * l, l, some.values.begin() + long(i) * l);
        std::copy_n(all.jacobian.begin() + from * l * 5, l * 5,
                    some.jacobian.begin() + long(i) * l * 5);
      }
      some.in_place = true;
      some.status.assign(12, code(RowStatus::kRunning));
      const std::vector<S> before = some.points;
      run(some);
      for (std::int64_t i = 0; i < 12; ++i) {
        const bool named = std::count(some.index.begin(), some.index.end(), i) > 0;
        const S* expected = named ? all.next.data() : before.data();
        EXPECT_EQ(std::memcmp(some.points.data() + i * 5, expected + i * 5, 5 * sizeof(S)), 0);
        EXPECT_EQ(some.status[std::size_t(i)],
                  named ? all.status[std::size_t(i)] : code(RowStatus::kRunning));
      }
    }
  }
}

TYPED_TEST(NewtonTest, IndexOutsideThePointsIsLeftOut) {
  using S = TypeParam;
  Newton<S> p(4, 1, 3, 2);
  p.in_place = true;
  p.status.assign(4, code(RowStatus::kRunning));
  p.index = {-1, 4, std::numeric_limits<std::int64_t>::max(), 2};
  const std::vector<S> before = p.points;
  run(p);
  for (std::size_t i = 0; i < 4; ++i) {
    const bool same =
        std::memcmp(p.points.data() + i * 3, before.data() + i * 3, 3 * sizeof(S)) == 0;
    EXPECT_EQ(same, i != 2);
  }
}

TYPED_TEST(NewtonTest, OneLevelForAllRows) {
  using S = TypeParam;
  for (const int l : {1, 2, 3}) {
    Newton<S> each(9, l, 4, 1), one = each;
    one.level_stride = 0;
    one.level.resize(std::size_t(l));
    for (std::int64_t i = 0; i < 9; ++i) {
      std::copy(one.level.begin(), one.level.end(), each.level.begin() + i * l);
    }
    run(each);
    run(one);
    EXPECT_TRUE(same_bits(each.next, one.next));
  }
}

TYPED_TEST(NewtonTest, BadRowsAreMarkedAndLeaveOthersAlone) {
  using S = TypeParam;
  const S nan = std::numeric_limits<S>::quiet_NaN(), inf = std::numeric_limits<S>::infinity();
  for (const int l : {1, 2, 3, 8}) {
    for (const std::int64_t d : {std::int64_t(8), std::int64_t(50)}) {
      Newton<S> good(9, l, d, 31), bad = good;
      const auto last = std::size_t(l - 1);
      bad.values[1 * std::size_t(l) + last] = nan;
      bad.values[2 * std::size_t(l)] = inf;
      bad.level[3 * std::size_t(l) + last] = nan;
      bad.jacobian[std::size_t(4 * l * d + d - 1)] = nan;
      bad.points[std::size_t(5 * d)] = nan;
      bad.points[std::size_t(6 * d + d - 1)] = -inf;
      std::fill_n(bad.jacobian.begin() + 7 * l * d, d, S(0));
      run(good);
      run(bad);
      const RowStatus expected[] = {
          RowStatus::kRunning,   RowStatus::kNonFinite,     RowStatus::kNonFinite,
          RowStatus::kNonFinite, RowStatus::kNonFinite,     RowStatus::kNonFinite,
          RowStatus::kNonFinite, RowStatus::kRankDeficient, RowStatus::kRunning};
      for (std::size_t i = 0; i < 9; ++i) {
        EXPECT_EQ(RowStatus(bad.status[i]), expected[i]) << "l " << l << ", row " << i;
        // A bad row stays where it is, unless the point itself is what is bad.
        if (i == 5 || i == 6) continue;
        const S* from = expected[i] == RowStatus::kRunning ? good.next.data() : bad.points.data();
        const std::size_t at = i * std::size_t(d);
        EXPECT_EQ(std::memcmp(bad.next.data() + at, from + at, std::size_t(d) * sizeof(S)), 0);
      }
    }
  }
}

TYPED_TEST(NewtonTest, InfiniteValuesNeverConverge) {
  using S = TypeParam;
  Newton<S> p(1, 1, 2, 0);
  p.values = {std::numeric_limits<S>::infinity()};
  p.tol = std::numeric_limits<double>::infinity();
  run(p);
  EXPECT_EQ(RowStatus(p.status[0]), RowStatus::kNonFinite);
}

TYPED_TEST(NewtonTest, OverflowingStepIsRefused) {
  using S = TypeParam;
  Newton<S> p(1, 1, 2, 0);
  p.jacobian = {std::numeric_limits<S>::min() * 2, S(0)};
  p.values = {S(1e10)};
  p.level = {S(0)};
  run(p);
  EXPECT_EQ(RowStatus(p.status[0]), RowStatus::kRankDeficient);
  EXPECT_TRUE(same_bits(p.next, p.points));
}

TYPED_TEST(NewtonTest, AnySplitOfTheRowsGivesTheSameBits) {
  using S = TypeParam;
  for (const int l : {1, 2, 3}) {
    for (const std::int64_t d : {2, 3, 20}) {
      Newton<S> whole(17, l, d, 13), parts = whole;
      run(whole);
      const std::int64_t cuts[] = {0, 1, 8, 9, 17};
      for (int k = 3; k >= 0; --k) {
        levelset::cpu::newton_update(parts.params(), cuts[k], cuts[k + 1]);
      }
      EXPECT_TRUE(same_bits(whole.next, parts.next));
      EXPECT_EQ(whole.status, parts.status);
    }
  }
}

TYPED_TEST(NewtonTest, NoRows) {
  using S = TypeParam;
  Newton<S> p(0, 2, 3, 0);
  run(p);
  Newton<S> none(3, 2, 3, 0);  // points, but an index that names none of them
  none.m = 0;
  none.index = {0};
  run(none);
  EXPECT_EQ(none.status[0], std::int8_t(kUntouched));
}

}  // namespace
