// The row kernels, run on the CPU by the emulator: every op, team and dtype against long double,
// with the threads in several orders. A missing barrier or a shuffle gone wrong gives other numbers
// in at least one of them; a write outside of a tensor ends the process under AddressSanitizer.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "launchers.h"

namespace {

using launchers::RowTeam;
using levelset::RowStatus;
using problems::code;
using problems::kUntouched;
using problems::Newton;
using problems::Pinv;
using reference::Real;

// For l > 2 every team is the warp.
std::vector<RowTeam> teams(int l) {
  if (l > 2) return {RowTeam::kAuto};
  return {RowTeam::kThread, RowTeam::kWarp, RowTeam::kBlock};
}

struct Shape {
  std::int64_t n, d;
};

// Rows and columns around the sizes of a warp and a block (256), and none at all; fewer where many
// threads work on each row.
std::vector<Shape> shapes(RowTeam team, int l) {
  if (l == 8) return {{1, 8}, {2, 33}};
  if (team == RowTeam::kThread) return {{0, 3}, {1, l}, {256, l}, {300, 3}, {3, 33}};
  return {{0, 3}, {1, l}, {9, 33}, {2, 257}};
}

template <typename S>
bool same_bits(const std::vector<S>& a, const std::vector<S>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0);
}

// Runs a copy of the problem in every order, and expects the same bits from all.
template <typename Problem>
Problem run_in_all_orders(const Problem& problem, RowTeam team) {
  Problem first = problem;
  emulation::set_order(emulation::Order::forward);
  launchers::run(first, team);
  for (const emulation::Order order :
       {emulation::Order::reverse, emulation::Order::warps, emulation::Order::random}) {
    emulation::set_order(order, 3);
    Problem again = problem;
    launchers::run(again, team);
    EXPECT_EQ(first.status, again.status) << "order " << emulation::order_name();
    if constexpr (requires { again.output; }) {
      EXPECT_TRUE(same_bits(first.output, again.output)) << "order " << emulation::order_name();
    } else {
      EXPECT_TRUE(same_bits(first.next, again.next)) << "order " << emulation::order_name();
      EXPECT_TRUE(same_bits(first.points, again.points)) << "order " << emulation::order_name();
    }
  }
  emulation::set_order(emulation::Order::forward);
  return first;
}

template <typename S>
class EmulatedRows : public testing::Test {};
using Dtypes = testing::Types<float, double, __half, __nv_bfloat16>;
TYPED_TEST_SUITE(EmulatedRows, Dtypes);

template <typename S>
void check_pinv(bool adjoint) {
  for (const int l : {1, 2, 3, 8}) {
    for (const RowTeam team : teams(l)) {
      for (const Shape& shape : shapes(team, l)) {
        if (shape.d < l && shape.n > 0) continue;
        SCOPED_TRACE(testing::Message() << "l " << l << ", team " << launchers::name(team) << ", n "
                                        << shape.n << ", d " << shape.d);
        const auto p =
            run_in_all_orders(Pinv<S>(adjoint, shape.n, l, shape.d, unsigned(l + shape.d)), team);
        for (std::int64_t i = 0; i < p.n; ++i) {
          const Real part = p.factor(i).smallest_part / Real(l);
          if (part < 1e-3L) continue;  // a nearly singular square matrix
          ASSERT_EQ(RowStatus(p.status[std::size_t(i)]), RowStatus::kConverged);
          ASSERT_LE(p.error(i), launchers::arithmetic_epsilon<S>() * 100 / part +
                                    launchers::storage_epsilon<S>());
        }
      }
    }
  }
}

TYPED_TEST(EmulatedRows, ApplyEqualsReference) { check_pinv<TypeParam>(false); }
TYPED_TEST(EmulatedRows, AdjointEqualsReference) { check_pinv<TypeParam>(true); }

TYPED_TEST(EmulatedRows, NewtonEqualsReference) {
  using S = TypeParam;
  for (const int l : {1, 2, 3, 8}) {
    for (const RowTeam team : teams(l)) {
      for (const Shape& shape : shapes(team, l)) {
        if (shape.d < l && shape.n > 0) continue;
        SCOPED_TRACE(testing::Message() << "l " << l << ", team " << launchers::name(team) << ", n "
                                        << shape.n << ", d " << shape.d);
        Newton<S> problem(shape.n, l, shape.d, unsigned(l + shape.d));
        problem.max_step = 0.5;
        problem.lower.assign(std::size_t(shape.d), S(-1.0f));
        problem.upper.assign(std::size_t(shape.d), S(1.0f));
        const auto p = run_in_all_orders(problem, team);
        for (std::int64_t i = 0; i < p.n; ++i) {
          const auto factor = reference::Factor(p.jacobian.data() + i * l * p.d, l, p.d);
          const Real part = factor.smallest_part / Real(l);
          if (part < 1e-3L) continue;
          const auto step = p.step(i), next = p.result(i);
          const Real shrink = std::min(Real(1), Real(0.5) / reference::norm(step));
          for (std::int64_t j = 0; j < p.d; ++j) {
            Real want = Real(p.points[std::size_t(i * p.d + j)]) - shrink * step[std::size_t(j)];
            want = std::min(Real(1), std::max(Real(-1), want));
            ASSERT_NEAR(
                next[std::size_t(j)], want,
                launchers::arithmetic_epsilon<S>() * 100 / part + launchers::storage_epsilon<S>());
          }
        }
      }
    }
  }
}

// Statuses, mask, index and bad rows, in place, in one problem for every team.
TYPED_TEST(EmulatedRows, NewtonInPlaceWithMaskIndexAndBadRows) {
  using S = TypeParam;
  const S nan = S(std::numeric_limits<float>::quiet_NaN());
  for (const int l : {1, 2, 3}) {
    for (const RowTeam team : teams(l)) {
      for (const std::int64_t d : {std::int64_t(5), std::int64_t(40)}) {
        SCOPED_TRACE(testing::Message()
                     << "l " << l << ", team " << launchers::name(team) << ", d " << d);
        Newton<S> p(8, l, d, 77);
        p.n = 10;
        p.points = reference::Random(5).numbers<S>(p.n * d);
        p.level_stride = 0;
        p.level.assign(std::size_t(l), S(0.0f));
        p.tol = 0.25;
        p.in_place = true;
        p.status.assign(10, code(RowStatus::kRunning));
        p.status[4] = code(RowStatus::kStalled);
        //         moves  zero  NaN F  masked  outside  outside  NaN J  within tol
        p.index = {9, 7, 0, 4, -1, 10, 2, 5};
        std::fill(p.values.begin(), p.values.end(), S(1.0f));
        std::fill_n(p.jacobian.begin() + 1 * l * d, d, S(0.0f));
        p.values[std::size_t(3 * l - 1)] = nan;
        p.jacobian[std::size_t(7 * l * d - 1)] = nan;
        std::fill_n(p.values.begin() + 7 * l, l, S(0.25f));
        const auto after = run_in_all_orders(p, team);
        std::vector<std::int8_t> status(10, code(RowStatus::kRunning));
        status[4] = code(RowStatus::kStalled);
        status[7] = code(RowStatus::kRankDeficient);
        status[0] = status[2] = code(RowStatus::kNonFinite);
        status[5] = code(RowStatus::kConverged);
        EXPECT_EQ(after.status, status);
        for (std::size_t i = 0; i < 10; ++i) {
          const std::size_t at = i * std::size_t(d), bytes = std::size_t(d) * sizeof(S);
          const bool same = std::memcmp(after.points.data() + at, p.points.data() + at, bytes) == 0;
          EXPECT_EQ(same, i != 9) << "row " << i;
        }
      }
    }
  }
}

TYPED_TEST(EmulatedRows, BadRowsGiveZerosAndAStatus) {
  using S = TypeParam;
  const S nan = S(std::numeric_limits<float>::quiet_NaN());
  for (const bool adjoint : {false, true}) {
    for (const int l : {1, 2, 3}) {
      for (const RowTeam team : teams(l)) {
        for (const std::int64_t d : {std::int64_t(40)}) {
          Pinv<S> good(adjoint, 5, l, d, 3), bad = good;
          bad.row(1, l - 1)[d - 1] = nan;
          std::fill_n(bad.row(3, 0), d, S(0.0f));
          good = run_in_all_orders(good, team);
          bad = run_in_all_orders(bad, team);
          const RowStatus expected[] = {RowStatus::kConverged, RowStatus::kNonFinite,
                                        RowStatus::kConverged, RowStatus::kRankDeficient,
                                        RowStatus::kConverged};
          for (std::int64_t i = 0; i < 5; ++i) {
            const bool usable = expected[i] == RowStatus::kConverged;
            EXPECT_EQ(RowStatus(bad.status[std::size_t(i)]), expected[i]);
            const auto result = bad.result(i), other = good.result(i);
            for (std::size_t j = 0; j < result.size(); ++j) {
              EXPECT_EQ(result[j], usable ? other[j] : Real(0));
            }
          }
        }
      }
    }
  }
}

// Rows so long or short that their squares leave the range take another path through the
// reductions.
TYPED_TEST(EmulatedRows, ExtremeScales) {
  using S = TypeParam;
  const float small = std::is_same_v<S, __half> ? 0x1p-14f : 1e-30f;
  const float large = std::is_same_v<S, __half> ? 0x1p+12f : 1e30f;
  for (const int l : {1, 2, 3}) {
    for (const RowTeam team : teams(l)) {
      for (const std::int64_t d : {std::int64_t(5), std::int64_t(70)}) {
        for (const float scale : {small, large}) {
          Pinv<S> p(false, 3, l, d, 3);
          for (S& x : p.jacobian) x = S(float(x) * scale);
          for (S& x : p.input) x = S(float(x) * scale);
          p = run_in_all_orders(p, team);
          for (std::int64_t i = 0; i < p.n; ++i) {
            ASSERT_EQ(RowStatus(p.status[std::size_t(i)]), RowStatus::kConverged);
            const Real part = p.factor(i).smallest_part / Real(l);
            ASSERT_LE(p.error(i), launchers::arithmetic_epsilon<S>() * 100 / part +
                                      2 * launchers::storage_epsilon<S>());
          }
        }
      }
    }
  }
}

// A pivot that cancels is measured again: more reductions, on all members of the team.
TYPED_TEST(EmulatedRows, NearlyParallelRows) {
  using S = TypeParam;
  for (const int l : {2, 3, 8}) {
    for (const RowTeam team : teams(l)) {
      for (const std::int64_t d : {std::int64_t(33)}) {
        Pinv<S> p(true, 3, l, d, 3);
        for (std::int64_t i = 0; i < p.n; ++i) {
          for (std::int64_t j = 0; j < d; ++j) {
            p.row(i, l - 1)[j] = S(float(p.row(i, 0)[j]) + 0.03f * float(p.row(i, l - 1)[j]));
          }
        }
        p = run_in_all_orders(p, team);
        for (std::int64_t i = 0; i < p.n; ++i) {
          ASSERT_EQ(RowStatus(p.status[std::size_t(i)]), RowStatus::kConverged);
          const Real part = p.factor(i).smallest_part / Real(l);
          ASSERT_LE(p.error(i), launchers::arithmetic_epsilon<S>() * 100 / part +
                                    launchers::storage_epsilon<S>());
        }
      }
    }
  }
}

}  // namespace
