// Several threads in the CPU kernels at once, on rows of one problem and on problems of their own:
// the same bits as one thread. make tsan runs it under the thread sanitizer.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "bracket_problem.h"
#include "core/mlp_net.h"
#include "cpu/bracket.h"
#include "cpu/mlp.h"
#include "cpu/rows.h"
#include "problems.h"

namespace {

using problems::Bracket;
using problems::Newton;
using problems::Pinv;

constexpr int kThreads = 4;

template <typename S>
bool same_bits(const std::vector<S>& a, const std::vector<S>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0;
}

// Calls work(k) for k = 0 ... kThreads - 1, all of them at the same time.
template <typename Work>
void at_once(Work work) {
  std::atomic<int> waiting{kThreads};
  std::vector<std::thread> threads;
  for (int k = 0; k < kThreads; ++k) {
    threads.emplace_back([&, k] {
      waiting.fetch_sub(1);
      while (waiting.load() > 0) std::this_thread::yield();
      work(k);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

template <typename S>
class ThreadsTest : public testing::Test {};
using Scalars = testing::Types<float, double>;
TYPED_TEST_SUITE(ThreadsTest, Scalars);

// First in this file, and every test is a process of its own: which instructions a processor has is
// found out by the first call, which four threads make together here.
TYPED_TEST(ThreadsTest, ShareTheRowsOfOneProblem) {
  using S = TypeParam;
  constexpr std::int64_t n = 67;
  const auto first = [](int k) { return n * k / kThreads; };
  for (const int l : {1, 2, 3}) {
    for (const std::int64_t d : {3, 40}) {
      Newton<S> parts(n, l, d, 5), whole = parts;
      parts.status.assign(std::size_t(n), problems::code(levelset::RowStatus::kRunning));
      whole.status = parts.status;
      at_once([&](int k) { levelset::cpu::newton_update(parts.params(), first(k), first(k + 1)); });
      levelset::cpu::newton_update(whole.params(), 0, n);
      EXPECT_TRUE(same_bits(parts.next, whole.next));
      EXPECT_EQ(parts.status, whole.status);
      for (const bool adjoint : {false, true}) {
        Pinv<S> pieces(adjoint, n, l, d, 7), all = pieces;
        const auto run = [adjoint](Pinv<S>& p, std::int64_t begin, std::int64_t end) {
          adjoint ? levelset::cpu::pinv_adjoint(p.params(), begin, end)
                  : levelset::cpu::pinv_apply(p.params(), begin, end);
        };
        at_once([&](int k) { run(pieces, first(k), first(k + 1)); });
        run(all, 0, n);
        EXPECT_TRUE(same_bits(pieces.output, all.output));
        EXPECT_EQ(pieces.status, all.status);
      }
    }
  }
}

TYPED_TEST(ThreadsTest, SearchOnProblemsOfTheirOwn) {
  using S = TypeParam;
  const auto search = [](Bracket<S>& p) {
    p.rounding = 4 * double(std::numeric_limits<S>::epsilon());
    p.search([](double x) { return x * x * x - 0.2; },
             [](const auto& q) { levelset::cpu::bracket_update(q, 0, q.rows); });
  };
  std::vector<Bracket<S>> found(kThreads, Bracket<S>(9, 5, S(-1), S(2)));
  for (int k = 0; k < kThreads; ++k) found[std::size_t(k)].variant = problems::kVariants[k];
  std::vector<Bracket<S>> expected = found;
  at_once([&](int k) { search(found[std::size_t(k)]); });
  for (std::size_t k = 0; k < kThreads; ++k) {
    search(expected[k]);
    EXPECT_TRUE(same_bits(found[k].points, expected[k].points));
    EXPECT_EQ(found[k].status, expected[k].status);
  }
}

// Threads take rows of the fused projection from one counter; the weights are shared.
TYPED_TEST(ThreadsTest, TakeTheRowsOfAPerceptronFromOneCounter) {
  using S = TypeParam;
  constexpr std::int64_t n = 203, d = 3, width = 24;
  reference::Random random(11);
  const std::vector<S> w1 = random.numbers<S>(width * d), b1 = random.numbers<S>(width);
  const std::vector<S> w2 = random.numbers<S>(width), start = random.numbers<S>(n * d);
  levelset::MlpLayer layers[2] = {};
  layers[0] = {width, 0, d, levelset::Activation::kSoftplus, 3.0, 20.0, 0, 0, 0, 0, 0};
  layers[1] = {1, width, 0, levelset::Activation::kNone, 1.0, 0.0, 0, 0, 0, 0, 0};
  std::int64_t size = 0;
  for (auto& layer : layers) size = levelset::cpu::mlp_place<S>(layer, size);
  std::vector<S> packed(std::size_t(size) + 16);
  auto* aligned = reinterpret_cast<S*>((reinterpret_cast<std::uintptr_t>(packed.data()) + 63) &
                                       ~std::uintptr_t(63));
  const levelset::cpu::Matrix<S> none{nullptr, 0, 0, 0, 0};
  levelset::cpu::mlp_pack<S>(layers[0], none, {w1.data(), width, d, d, 1}, b1.data(), 1, aligned);
  levelset::cpu::mlp_pack<S>(layers[1], {w2.data(), 1, width, width, 1}, none, nullptr, 0, aligned);
  const levelset::MlpNet<S> net{aligned, nullptr, layers, 2, d, 1};
  const S level = S(0.5);

  struct Found {
    std::vector<S> points, values, jacobian;
    std::vector<std::int8_t> status;
    std::vector<std::int32_t> iterations;
    Found() : points(n * d), values(n), jacobian(n * d), status(n), iterations(n) {}
  };
  const auto params = [&](Found& f) {
    return levelset::cpu::MlpProjectParams<S>{net,
                                              n,
                                              start.data(),
                                              &level,
                                              0,
                                              nullptr,
                                              nullptr,
                                              12,
                                              1e-4,
                                              std::numeric_limits<double>::infinity(),
                                              f.points.data(),
                                              f.values.data(),
                                              f.jacobian.data(),
                                              f.status.data(),
                                              f.iterations.data(),
                                              nullptr,
                                              nullptr};
  };
  const auto work = [&](Found& f, std::atomic<std::int64_t>& next) {
    levelset::cpu::MlpWorkspace<S> space(net, 16, true, false);
    std::vector<S> memory(std::size_t(space.numbers()) + 16);
    auto* at = reinterpret_cast<S*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) &
                                    ~std::uintptr_t(63));
    const levelset::MlpTile<S> tile = space.tile(at);
    levelset::cpu::mlp_project(params(f), tile, next);
  };
  Found shared, alone;
  std::atomic<std::int64_t> next{0}, other{0};
  at_once([&](int) { work(shared, next); });
  work(alone, other);
  EXPECT_TRUE(same_bits(shared.points, alone.points));
  EXPECT_TRUE(same_bits(shared.jacobian, alone.jacobian));
  EXPECT_EQ(shared.status, alone.status);
  EXPECT_EQ(shared.iterations, alone.iterations);
  const auto done = std::count(alone.status.begin(), alone.status.end(),
                               problems::code(levelset::RowStatus::kConverged));
  EXPECT_GT(done, n / 2);
}

// A fault for the thread sanitizer to find: every thread writes all rows. make tsan asks for it.
TEST(PlantedRace, DISABLED_ThreadsThatWriteTheSameRows) {
  Pinv<float> problem(false, 67, 1, 3, 7);
  at_once([&](int) { levelset::cpu::pinv_apply(problem.params(), 0, 67); });
}

}  // namespace
