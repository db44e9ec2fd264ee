// The CPU kernels without torch: no checks, no allocation, one thread. Every benchmark is beside a
// copy that moves as many bytes; numbers that an op reads or writes count once.
#include <benchmark/benchmark.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/params.h"
#include "core/status.h"
#include "cpu/bracket.h"
#include "cpu/rows.h"

namespace {

using levelset::RowStatus;

std::vector<float> normal(std::int64_t count) {
  std::mt19937 engine(1);
  std::normal_distribution<float> draw;
  std::vector<float> numbers;
  numbers.reserve(std::size_t(count));
  for (std::int64_t i = 0; i < count; ++i) numbers.push_back(draw(engine));
  return numbers;
}

void copy(benchmark::State& state, std::int64_t bytes) {
  const std::vector<char> from(std::size_t(bytes / 2), 1);
  std::vector<char> to(from.size());
  for (auto _ : state) {
    std::memcpy(to.data(), from.data(), from.size());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * bytes);
}

struct Rows {
  std::int64_t n, d;
  int l;
  std::vector<float> jacobian, values, points, next, solved, level;
  std::vector<std::int8_t> status;

  Rows(std::int64_t rows, int outputs, std::int64_t columns)
      : n(rows),
        d(columns),
        l(outputs),
        jacobian(normal(n * l * d)),
        values(normal(n * l)),
        points(normal(n * d)),
        next(std::size_t(n * d)),
        solved(std::size_t(n * l)),
        level(std::size_t(l)),
        status(std::size_t(n), std::int8_t(RowStatus::kRunning)) {}

  std::int64_t bytes(bool writes_points) const {
    return 4 * n * (l * d + l + (writes_points ? 2 : 1) * d);
  }

  levelset::NewtonParams<float> newton(bool in_place) {
    levelset::NewtonParams<float> p{};
    p.rows = p.point_rows = n;
    p.columns = d;
    p.outputs = l;
    p.points = points.data();
    p.values = values.data();
    p.jacobian = jacobian.data();
    p.level = level.data();
    p.tol = 1e-6;
    p.max_step = __builtin_inf();
    p.next = in_place ? points.data() : next.data();
    p.status = status.data();
    return p;
  }

  levelset::PinvParams<float> pinv(bool adjoint) {
    return {n,
            d,
            l,
            jacobian.data(),
            (adjoint ? points : values).data(),
            (adjoint ? solved : next).data(),
            status.data()};
  }
};

void newton_update(benchmark::State& state, std::int64_t n, int l, std::int64_t d) {
  Rows rows(n, l, d);
  const auto p = rows.newton(false);
  for (auto _ : state) levelset::cpu::newton_update(p, 0, n);
  state.SetBytesProcessed(state.iterations() * rows.bytes(true));
}

void pinv_apply(benchmark::State& state, std::int64_t n, int l, std::int64_t d) {
  Rows rows(n, l, d);
  const auto p = rows.pinv(false);
  for (auto _ : state) levelset::cpu::pinv_apply(p, 0, n);
  state.SetBytesProcessed(state.iterations() * rows.bytes(false));
}

void pinv_adjoint(benchmark::State& state, std::int64_t n, int l, std::int64_t d) {
  Rows rows(n, l, d);
  const auto p = rows.pinv(true);
  for (auto _ : state) levelset::cpu::pinv_adjoint(p, 0, n);
  state.SetBytesProcessed(state.iterations() * rows.bytes(false));
}

// The first pass of a search, which can be repeated, or a later one, put back before every pass.
// The state counts: it is written, and by a later pass read.
void bracket_update(benchmark::State& state, std::int64_t n, std::int64_t d, bool begins) {
  const auto start = normal(n * d);
  std::vector<float> end = start;
  for (float& x : end) x = 1 - x;
  std::vector<float> values, points(start.size()), level(1);
  std::mt19937 engine(2);
  std::uniform_real_distribution<float> draw(0.5f, 1.5f);
  for (std::int64_t i = 0; i < n; ++i) {
    values.push_back(draw(engine));
    values.push_back(-draw(engine));
  }
  std::vector<std::int8_t> status(std::size_t(n), std::int8_t(RowStatus::kRunning));
  std::vector<levelset::BracketRow> bracket(static_cast<std::size_t>(n));
  levelset::BracketParams<float> p{};
  p.rows = p.point_rows = n;
  p.columns = d;
  p.start = start.data();
  p.end = end.data();
  p.values = values.data();
  p.begins = true;
  p.level = level.data();
  p.tol = 1e-6;
  p.rounding = 4 * 0x1p-23;
  p.variant = levelset::BracketVariant::kAndersonBjorck;
  p.points = points.data();
  p.status = status.data();
  p.bracket = bracket.data();
  levelset::cpu::bracket_update(p, 0, n);
  const auto first = bracket;
  if (!begins) p.begins = false;
  for (auto _ : state) {
    if (!begins) {
      state.PauseTiming();
      bracket = first;
      state.ResumeTiming();
    }
    levelset::cpu::bracket_update(p, 0, n);
  }
  const std::int64_t kept = std::int64_t(sizeof(levelset::BracketRow)) * (begins ? 1 : 2);
  state.SetBytesProcessed(state.iterations() * n * (4 * (3 * d + (begins ? 2 : 1)) + kept + 1));
}

std::string title(const char* op, std::int64_t n, int l, std::int64_t d) {
  return std::string(op) + "/n:" + std::to_string(n) + "/l:" + std::to_string(l) +
         "/d:" + std::to_string(d);
}

void add_all() {
  using benchmark::RegisterBenchmark;
  for (const std::int64_t bytes :
       {std::int64_t(1) << 18, std::int64_t(1) << 23, std::int64_t(1) << 26}) {
    RegisterBenchmark(("copy/bytes:" + std::to_string(bytes)).c_str(), copy, bytes);
  }
  for (const std::int64_t d : {2, 3, 784}) {
    for (const std::int64_t n : {d == 784 ? 20 : 2000, d == 784 ? 4000 : 400'000}) {
      for (const int l : {1, 2}) {
        RegisterBenchmark(title("newton_update", n, l, d).c_str(), newton_update, n, l, d);
        RegisterBenchmark(title("pinv_apply", n, l, d).c_str(), pinv_apply, n, l, d);
        RegisterBenchmark(title("pinv_adjoint", n, l, d).c_str(), pinv_adjoint, n, l, d);
      }
      RegisterBenchmark(title("bracket_begin", n, 1, d).c_str(), bracket_update, n, d, true);
      RegisterBenchmark(title("bracket_later", n, 1, d).c_str(), bracket_update, n, d, false);
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  benchmark::Initialize(&count, arguments);
  if (benchmark::ReportUnrecognizedArguments(count, arguments)) return 1;
  add_all();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
