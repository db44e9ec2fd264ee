// The bracketing root search on the CPU: known roots, functions that defeat plain false position,
// and what every status promises.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "bracket_problem.h"
#include "cpu/bracket.h"

namespace {

using levelset::BracketRow;
using levelset::BracketVariant;
using levelset::RowStatus;
using problems::Bracket;
using problems::code;
using problems::kUntouched;
using problems::kVariants;

const auto update = [](const auto& p) { levelset::cpu::bracket_update(p, 0, p.rows); };

template <typename S>
bool same_bits(const std::vector<S>& a, const std::vector<S>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0;
}

template <typename S>
class BracketTest : public testing::Test {
 protected:
  static constexpr double kEpsilon = std::numeric_limits<S>::epsilon();

  static Bracket<S> problem(double a, double b, BracketVariant variant, std::int64_t rows = 1,
                            std::int64_t columns = 1) {
    Bracket<S> p(rows, columns, S(a), S(b));
    p.variant = variant;
    p.rounding = 4 * kEpsilon;
    return p;
  }
};
using Scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(BracketTest, Scalars);

TYPED_TEST(BracketTest, SmoothRoots) {
  const auto cubic = [](double x) { return x * x * x - 2 * x - 5; };
  const auto fixed_point = [](double x) { return std::cos(x) - x; };
  for (const BracketVariant variant : kVariants) {
    for (const std::int64_t d : {1, 2, 3, 40}) {
      auto p = this->problem(2, 3, variant, 3, d);
      p.tol = 20 * this->kEpsilon;
      p.search(cubic, update);
      EXPECT_EQ(p.result(2), RowStatus::kConverged);
      EXPECT_NEAR(p.found(2), 2.0945514815423265, 4 * this->kEpsilon);
      auto q = this->problem(1, 0, variant, 1, d);
      q.tol = 4 * this->kEpsilon;
      q.search(fixed_point, update);
      EXPECT_EQ(q.result(0), RowStatus::kConverged);
      EXPECT_NEAR(q.found(0), 0.7390851332151607, 4 * this->kEpsilon);
    }
  }
}

TYPED_TEST(BracketTest, AffineIsSolvedByTheFirstChord) {
  for (const BracketVariant variant :
       {BracketVariant::kRegulaFalsi, BracketVariant::kIllinois, BracketVariant::kAndersonBjorck}) {
    auto p = this->problem(-1, 3, variant, 5, 7);
    p.tol = 8 * this->kEpsilon;
    EXPECT_EQ(p.search([](double x) { return 2 * x - 1; }, update), 5);
    EXPECT_EQ(p.result(4), RowStatus::kConverged);
  }
}

// One side flat, the other steep: plain false position needs thousands of evaluations.
TYPED_TEST(BracketTest, FlatOnOneSide) {
  struct Case {
    double (*f)(double);
    double a, b;
  };
  const Case cases[] = {{[](double x) { return std::pow(x, 9); }, -1, 1.5},
                        {[](double x) { return std::pow(x, 9); }, -0.5, 10},
                        {[](double x) { return std::exp(x) - 1; }, -20, 15},
                        {[](double x) { return std::pow(x, 20) - 1; }, 0, 1.5},
                        {[](double x) { return std::atan(x); }, -1e3, 1e5}};
  for (const Case& c : cases) {
    for (const BracketVariant variant : kVariants) {
      if (variant == BracketVariant::kRegulaFalsi) continue;
      auto p = this->problem(c.a, c.b, variant);
      p.tol = 1e-4;
      EXPECT_LE(p.search(c.f, update), 45) << "variant " << int(variant);
      EXPECT_EQ(p.result(0), RowStatus::kConverged) << "variant " << int(variant);
    }
  }
}

TYPED_TEST(BracketTest, EndsThatAreAnswers) {
  using S = TypeParam;
  const S nan = std::numeric_limits<S>::quiet_NaN(), inf = std::numeric_limits<S>::infinity();
  struct Case {
    S start, end;
    RowStatus status;
    double point;
  };
  const Case cases[] = {
      {S(0), S(1), RowStatus::kConverged, 2},         {S(1), S(0), RowStatus::kConverged, 5},
      {S(0), S(0), RowStatus::kConverged, 2},         {S(-0.25), S(3), RowStatus::kConverged, 2},
      {S(0.25), S(-0.125), RowStatus::kConverged, 5}, {S(1), S(2), RowStatus::kNotBracketed, 2},
      {S(-2), S(-1), RowStatus::kNotBracketed, 5},    {S(1), S(1), RowStatus::kNotBracketed, 2},
      {nan, S(1), RowStatus::kNonFinite, 2},          {S(1), nan, RowStatus::kNonFinite, 5},
      {inf, S(-1), RowStatus::kNonFinite, 2},         {S(1), -inf, RowStatus::kNonFinite, 5},
  };
  for (const BracketVariant variant : kVariants) {
    for (const Case& c : cases) {
      auto p = this->problem(2, 5, variant, 1, 3);
      p.tol = 0.25;
      p.values = {c.start, c.end};
      update(p.params());
      EXPECT_EQ(p.result(0), c.status) << double(c.start) << ", " << double(c.end);
      EXPECT_EQ(p.found(0), c.point) << double(c.start) << ", " << double(c.end);
    }
  }
}

TYPED_TEST(BracketTest, ZeroLengthSegments) {
  for (const BracketVariant variant : kVariants) {
    auto off = this->problem(2, 2, variant);
    off.search([](double) { return 1.0; }, update);
    EXPECT_EQ(off.result(0), RowStatus::kNotBracketed);
    auto on = this->problem(2, 2, variant);
    on.search([](double) { return 0.0; }, update);
    EXPECT_EQ(on.result(0), RowStatus::kConverged);
    // Values that contradict each other, as rounding of a network may make them.
    auto noise = this->problem(2, 2, variant);
    noise.values = {TypeParam(-1), TypeParam(1)};
    update(noise.params());
    EXPECT_EQ(noise.result(0), RowStatus::kStalled);
    EXPECT_EQ(noise.found(0), 2);
  }
}

TYPED_TEST(BracketTest, AJumpStallsAtAdjacentPoints) {
  using S = TypeParam;
  for (const BracketVariant variant : kVariants) {
    auto p = this->problem(0, 1, variant);
    p.search([](double x) { return x < 0.3 ? -1.0 : 2.0; }, update, 5000);
    EXPECT_EQ(p.result(0), RowStatus::kStalled) << "variant " << int(variant);
    EXPECT_LT(p.found(0), 0.3);  // the side with the smaller |F|
    EXPECT_GE(std::nextafter(S(p.found(0)), S(1)), S(0.3));
  }
}

// F is only known to a few ulp of its largest values, so a tolerance below that is out of reach.
TYPED_TEST(BracketTest, NoiseStallsBeforeTheBudget) {
  for (const BracketVariant variant : {BracketVariant::kChandrupatla, BracketVariant::kIllinois,
                                       BracketVariant::kAndersonBjorck}) {
    auto p = this->problem(-1, 2, variant, 1, 8);
    const double noise = 1000 * this->kEpsilon;
    const auto f = [&](double x) {
      const double exact = 1000 * (x + 0.1 * x * x - 0.3);
      return exact + (std::fmod(std::fabs(x) * 1e9, 2.0) < 1 ? noise : -noise);
    };
    const int evaluations = p.search(f, update);
    EXPECT_EQ(p.result(0), RowStatus::kStalled);
    EXPECT_LE(evaluations, 40);
    EXPECT_LE(std::fabs(f(p.found(0))), 8 * noise);
  }
}

// In float32 a root at 0 inside of [-1, 2] is found to far fewer than the 6e-8 that separate places
// near the ends.
TYPED_TEST(BracketTest, RootNextToZeroKeepsItsDigits) {
  for (const BracketVariant variant : kVariants) {
    auto p = this->problem(-1, 2, variant);
    p.tol = 1e-5;
    p.search([](double x) { return 1e6 * (std::exp(x) - 1); }, update, 2000);
    EXPECT_EQ(p.result(0), RowStatus::kConverged);
    EXPECT_LE(std::fabs(p.found(0)), 1.1e-11);
  }
}

TYPED_TEST(BracketTest, BudgetEndsAtTheBetterEnd) {
  for (const BracketVariant variant : kVariants) {
    auto none = this->problem(-1, 3, variant);
    none.search([](double x) { return x * x * x - 0.1; }, update, 0);
    EXPECT_EQ(none.result(0), RowStatus::kMaxIterations);
    EXPECT_EQ(none.found(0), -1);
    auto two = this->problem(-1, 3, variant);
    const auto f = [](double x) { return std::exp(x) - 2; };
    two.search(f, update, 2);
    EXPECT_EQ(two.result(0), RowStatus::kMaxIterations);
    const BracketRow& row = two.state[0];
    EXPECT_EQ(row.at, row.newest.at);
    EXPECT_EQ(TypeParam(row.newest.value), TypeParam(f(two.found(0))));
    EXPECT_LE(std::fabs(row.newest.value), std::fabs(row.contra.value));
  }
}

TYPED_TEST(BracketTest, NonFiniteInside) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const BracketVariant variant : kVariants) {
    auto p = this->problem(-1, 1, variant, 2, 2);
    p.search([&](double x) { return std::fabs(x) < 0.5 ? nan : x; }, update);
    EXPECT_EQ(p.result(0), RowStatus::kNonFinite);
    EXPECT_LT(std::fabs(p.found(0)), 0.5);
    EXPECT_TRUE(std::isnan(p.state[0].newest.value));
    auto q = this->problem(-1, 1, variant, 1, 3);
    q.end[2] = TypeParam(nan);  // F does not depend on that column
    q.search([](double x) { return x - 0.3; }, update);
    EXPECT_EQ(q.result(0), RowStatus::kNonFinite);
  }
}

TYPED_TEST(BracketTest, ValuesAtTheLimitsOfTheRange) {
  using S = TypeParam;
  const double large = double(std::numeric_limits<S>::max()) / 2,
               tiny = std::numeric_limits<S>::min();
  for (const BracketVariant variant : kVariants) {
    for (const double scale : {large, large / 1e6, tiny * 1e3, tiny}) {
      auto p = this->problem(-1, 1, variant);
      p.tol = scale * 1e-3;
      p.search([&](double x) { return scale * (x > 0.37 ? 0.5 : -1.0) * std::fabs(x - 0.37); },
               update);
      EXPECT_EQ(p.result(0), RowStatus::kConverged) << scale << ", variant " << int(variant);
      EXPECT_NEAR(p.found(0), 0.37, 3e-3);
    }
  }
}

TYPED_TEST(BracketTest, RowsAreIndependentAndMasksAreKept) {
  using S = TypeParam;
  auto all = this->problem(0, 1, BracketVariant::kAndersonBjorck, 9, 5);
  all.level_stride = 1;
  all.level.clear();
  for (int i = 0; i < 9; ++i) all.level.push_back(S(0.1 * i + 0.05));
  auto some = all;
  const auto f = [](double x) { return x * x; };
  all.tol = some.tol = 1e-5;
  all.search(f, update);
  // Rows 0, 4 and 8 do not take part; the rest go through in the reverse order, one at a time.
  for (const std::size_t i : {0, 4, 8}) some.status[i] = code(RowStatus::kStalled);
  some.search(f, [](auto p) {
    for (std::int64_t i = p.rows - 1; i >= 0; --i) levelset::cpu::bracket_update(p, i, i + 1);
  });
  for (std::size_t i = 0; i < 9; ++i) {
    EXPECT_EQ(RowStatus(all.status[i]), RowStatus::kConverged);
    if (i % 4 == 0) {
      EXPECT_EQ(RowStatus(some.status[i]), RowStatus::kStalled);
      EXPECT_EQ(some.points[5 * i], S(kUntouched));
    } else {
      EXPECT_EQ(std::memcmp(&all.points[5 * i], &some.points[5 * i], 5 * sizeof(S)), 0);
      EXPECT_NEAR(double(all.points[5 * i]), std::sqrt(0.1 * double(i) + 0.05), 1e-4);
    }
  }
}

TYPED_TEST(BracketTest, IndexOutsideIsLeftOut) {
  auto p = this->problem(0, 1, BracketVariant::kBisection, 3, 2);
  p.index = {-1, 3, 1, std::numeric_limits<std::int64_t>::max()};
  p.values = {-1, 1, -1, 1, -1, 1, -1, 1};
  update(p.params());
  EXPECT_EQ(p.found(1), 0.5);
  EXPECT_EQ(p.found(0), kUntouched);
  EXPECT_EQ(p.found(2), kUntouched);
}

TYPED_TEST(BracketTest, NoRowsAndNoColumns) {
  auto none = this->problem(0, 1, BracketVariant::kBisection, 0, 4);
  update(none.params());
  auto flat = this->problem(0, 1, BracketVariant::kBisection, 1, 0);
  flat.values = {-1, 1};
  update(flat.params());
  EXPECT_EQ(flat.result(0), RowStatus::kStalled);
}

TYPED_TEST(BracketTest, PointsLieOnTheSegment) {
  using S = TypeParam;
  Bracket<S> p(50, 6, S(0), S(0));
  reference::Random random(3);
  p.start = random.numbers<S>(300);
  p.end = random.numbers<S>(300);
  for (std::size_t i = 0; i < 300; i += 6) {
    p.start[i] = -std::fabs(p.start[i]);
    p.end[i] = std::fabs(p.end[i]);
    p.end[i + 3] = p.start[i + 3];  // a coordinate that does not vary must not move at all
  }
  p.rounding = 4 * this->kEpsilon;
  p.tol = 1e-3;
  p.search([](double x) { return x + x * x * x; }, update);
  for (std::size_t i = 0; i < 300; ++i) {
    EXPECT_GE(p.points[i], std::min(p.start[i], p.end[i]));
    EXPECT_LE(p.points[i], std::max(p.start[i], p.end[i]));
  }
  EXPECT_TRUE(std::all_of(p.status.begin(), p.status.end(),
                          [](std::int8_t s) { return s == code(RowStatus::kConverged); }));
}

}  // namespace
