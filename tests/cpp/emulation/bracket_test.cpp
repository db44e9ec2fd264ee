// The bracket kernel, run by the emulator: every team and dtype in several orders of the threads.
// float and double give the CPU's own bits, step by step.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "bracket_problem.h"
#include "core/bracket_row.h"
#include "launchers.h"

namespace {

using launchers::RowTeam;
using levelset::RowStatus;
using problems::Bracket;
using problems::code;
using problems::kVariants;

template <typename S>
using Update = std::function<void(const levelset::BracketParams<S>&)>;

template <typename S>
Update<S> on_device(RowTeam team) {
  return [team](const levelset::BracketParams<S>& p) {
    ASSERT_EQ(levelset::cuda::bracket_update(p, team, nullptr), cudaSuccess);
  };
}

template <typename S>
void serial(const levelset::BracketParams<S>& p) {
  for (std::int64_t i = 0; i < p.rows; ++i) {
    using A = typename levelset::Storage<S>::Arithmetic;
    levelset::bracket_update_row<S, A>(levelset::SerialTeam{}, p, i, p.columns);
  }
}

template <typename S>
bool same_bits(const std::vector<S>& a, const std::vector<S>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0;
}

template <typename S>
class EmulatedBracket : public testing::Test {};
using Dtypes = testing::Types<float, double, __half, __nv_bfloat16>;
TYPED_TEST_SUITE(EmulatedBracket, Dtypes);

// Rows that converge, that are masked, that never were bracketed, that jump and that turn NaN, so
// that the teams of one block take different ways through the kernel. Bisection of doubles ends at
// the budget, the others before it.
TYPED_TEST(EmulatedBracket, SearchesEqualTheSerialOnes) {
  using S = TypeParam;
  constexpr int kBudget = 40;
  int searches = 0;
  for (const RowTeam team : {RowTeam::kAuto, RowTeam::kThread, RowTeam::kWarp, RowTeam::kBlock}) {
    for (const std::int64_t d : {1, 3, 33, 300}) {
      for (const auto variant : kVariants) {
        // The variant changes no index: all of them for two widths, two for the others, and for the
        // team that is one of the three one.
        const bool all = team != RowTeam::kAuto && (d == 3 || d == 33);
        const bool second = team != RowTeam::kAuto && variant == kVariants[d % 5];
        if (!all && !second && variant != kVariants[4]) continue;
        const std::int64_t n = team == RowTeam::kThread && d == 1 ? 260 : 8;
        Bracket<S> p(n, d, S(-1.0f), S(2.0f));
        p.variant = variant;
        p.rounding = 4 * launchers::storage_epsilon<S>();
        p.tol = 4 * launchers::storage_epsilon<S>();
        p.level_stride = 1;
        p.level.clear();
        for (std::int64_t i = 0; i < n; ++i) p.level.push_back(S(float(i % 7) / 4));
        p.status[2] = code(RowStatus::kRankDeficient);
        p.start[std::size_t(3 * d)] = S(1.5f);
        p.start[std::size_t(4 * d)] = S(std::numeric_limits<float>::quiet_NaN());
        p.end[std::size_t(5 * d + d - 1)] = S(std::numeric_limits<float>::quiet_NaN());
        const auto f = [](double x) { return x < 0.9 ? x * x * x : x * x * x + 0.01; };
        Bracket<S> expected = p;
        expected.search(f, serial<S>, kBudget);
        // One fixed order for each search, another for the next, and a random one for all.
        const auto fixed =
            ++searches % 2 == 0 ? emulation::Order::forward : emulation::Order::reverse;
        for (const auto order : {fixed, emulation::Order::random}) {
          emulation::set_order(order, 5);
          Bracket<S> got = p;
          got.search(f, on_device<S>(team), kBudget);
          ASSERT_EQ(got.status, expected.status) << launchers::name(team) << ", d " << d;
          ASSERT_TRUE(same_bits(got.points, expected.points)) << launchers::name(team);
          ASSERT_TRUE(same_bits(got.state, expected.state)) << launchers::name(team);
        }
      }
    }
  }
  emulation::set_order(emulation::Order::forward);
}

TYPED_TEST(EmulatedBracket, NoRowsAndIndicesOutside) {
  using S = TypeParam;
  for (const RowTeam team : {RowTeam::kThread, RowTeam::kWarp, RowTeam::kBlock}) {
    Bracket<S> none(0, 3, S(0.0f), S(1.0f));
    on_device<S>(team)(none.params());
    Bracket<S> p(3, 40, S(0.0f), S(1.0f));
    p.variant = problems::BracketVariant::kBisection;
    p.index = {-1, 3, 1, std::numeric_limits<std::int64_t>::max()};
    p.values.assign(8, S(1.0f));
    for (std::size_t i = 0; i < 8; i += 2) p.values[i] = S(-1.0f);
    on_device<S>(team)(p.params());
    EXPECT_EQ(p.found(1), 0.5);
    EXPECT_EQ(p.found(0), problems::kUntouched);
    EXPECT_EQ(p.found(2), problems::kUntouched);
  }
}

}  // namespace
