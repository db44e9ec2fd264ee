// Checks the emulator: correct kernels give the serial results in every order, and every planted
// bug is noticed. Prints what failed and one line with the counts; exit status 0 only if all
// passed.
#include "self_test.h"

#include <cuda_fp16.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

#include "planted_bugs.h"

// The storage of the kernels' dynamic shared memory, in their namespaces.
namespace self_test {
EMULATION_DYNAMIC_SHARED(unsigned char, dynamic_shared);
}
// histogram_kernel declares its array inside of an anonymous namespace.
EMULATION_DYNAMIC_SHARED_SYMBOL("_ZN9self_test12_GLOBAL__N_114dynamic_sharedE", histogram_shared);
namespace planted_bugs {
EMULATION_DYNAMIC_SHARED(unsigned char, bug_shared);
}

namespace {

int passed = 0, failed = 0, skipped = 0;

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failed);
  if (!condition) std::printf("FAILED: %s\n", what.c_str());
}

// Device memory that is freed with the scope; reading past it is an AddressSanitizer error.
template <class T>
class Device {
 public:
  explicit Device(std::size_t n) : n_(n) { cudaMalloc(&data_, n * sizeof(T)); }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    cudaMemcpy(data_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(data_); }
  operator T*() { return data_; }
  std::vector<T> host() const { return std::vector<T>(data_, data_ + n_); }

 private:
  T* data_ = nullptr;
  std::size_t n_;
};

// Small whole numbers: float sums of them are exact, so every order of addition agrees.
std::vector<float> numbers(int n) {
  std::vector<float> x(static_cast<std::size_t>(n));
  for (int i = 0; i < n; ++i)
    x[static_cast<std::size_t>(i)] = static_cast<float>(i * 37 % 101 - 50);
  return x;
}

void check_kernels() {
  using namespace self_test;
  const std::string order = " in order " + emulation::order_name();
  const int n = 1000;
  const std::vector<float> x = numbers(n);
  const std::vector<int> whole(x.begin(), x.end());
  Device<float> dx(x);

  {
    Device<float> out(4);
    expect(block_sum(dx, out, n, nullptr) == cudaSuccess, "block_sum launches" + order);
    std::vector<float> sums(4);
    for (int i = 0; i < n; ++i) sums[i / 256] += x[i];
    expect(out.host() == sums, "block_sum" + order);
  }
  {
    const int n32 = 992;
    Device<float> out(n32 / 32);
    Device<double> dxd(std::vector<double>(x.begin(), x.end())), outd(n32 / 32);
    expect(warp_sum<float>(dx, out, n32, nullptr) == cudaSuccess, "warp_sum launches" + order);
    expect(warp_sum<double>(dxd, outd, n32, nullptr) == cudaSuccess, "warp_sum launches" + order);
    std::vector<float> sums(n32 / 32);
    for (int i = 0; i < n32; ++i) sums[i / 32] += x[i];
    expect(out.host() == sums, "warp_sum<float>" + order);
    expect(outd.host() == std::vector<double>(sums.begin(), sums.end()),
           "warp_sum<double>" + order);
  }
  {
    Device<float> out(std::vector<float>(1024, 0.0f));
    Device<int> count(4);
    expect(compact(dx, out, count, n, nullptr) == cudaSuccess, "compact launches" + order);
    std::vector<float> kept(1024, 0.0f);
    std::vector<int> counts(4, 0);
    for (int i = 0; i < n; ++i)
      if (x[i] > 0) kept[i / 256 * 256 + counts[i / 256]++] = x[i];
    expect(out.host() == kept && count.host() == counts, "compact" + order);
  }
  for (int threads : {64, 96, 1024}) {
    Device<float> out(n);
    expect(prefix_sum(dx, out, n, threads, nullptr) == cudaSuccess, "prefix_sum launches" + order);
    std::vector<float> sums(x);
    for (int i = 0; i < n; ++i)
      if (i % threads != 0) sums[i] += sums[i - 1];
    expect(out.host() == sums, "prefix_sum, " + std::to_string(threads) + " threads" + order);
  }
  {
    std::vector<int> positive(whole);
    for (int& value : positive) value += 50;
    Device<int> in(positive), extremes(std::vector<int>{INT_MAX, INT_MIN});
    Device<unsigned> bins(std::vector<unsigned>(7, 0));
    expect(histogram(in, n, bins, 7, extremes, nullptr) == cudaSuccess,
           "histogram launches" + order);
    std::vector<unsigned> counts(7, 0);
    for (int value : positive) ++counts[value % 7];
    expect(bins.host() == counts, "histogram" + order);
    expect(extremes.host() == std::vector<int>{0, 100}, "atomicMin, atomicMax" + order);
  }
  {
    Device<int> in(whole), partial(5), total(1);
    Device<unsigned> finished(std::vector<unsigned>{0});
    expect(last_block_sum(in, n, partial, finished, total, 5, nullptr) == cudaSuccess,
           "last_block_sum launches" + order);
    expect(total.host()[0] == std::accumulate(whole.begin(), whole.end(), 0),
           "last_block_sum" + order);
  }
  {
    const int rows = 19, columns = 37;
    std::vector<double> matrix(rows * columns), turned(rows * columns);
    std::iota(matrix.begin(), matrix.end(), 0.0);
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c) turned[c * rows + r] = matrix[r * columns + c];
    Device<double> in(matrix), out(matrix.size());
    expect(transpose(in, out, rows, columns, nullptr) == cudaSuccess, "transpose launches" + order);
    expect(out.host() == turned, "transpose" + order);
  }
  {
    const int nx = 10, ny = 5, nz = 7;
    Device<int> out(nx * ny * nz);
    expect(coordinates(out, nx, ny, nz, nullptr) == cudaSuccess, "coordinates launches" + order);
    std::vector<int> wanted;
    for (int z = 0; z < nz; ++z)
      for (int y = 0; y < ny; ++y)
        for (int i = 0; i < nx; ++i) wanted.push_back(i + 100 * y + 10000 * z);
    expect(out.host() == wanted, "coordinates" + order);
  }
  {
    Device<float> out(n);
    expect(double_by_four(dx, out, n, nullptr) == cudaSuccess, "double_by_four launches" + order);
    std::vector<float> twice(x);
    for (float& value : twice) value *= 2;
    expect(out.host() == twice, "double_by_four" + order);
  }
  {
    Device<int> out(warp_facts * 32);
    expect(warp_operations(out, nullptr) == cudaSuccess, "warp_operations launches" + order);
    const std::vector<int> facts = out.host();
    for (int lane = 0; lane < 32; ++lane) {
      const int leading = lane == 0 ? 32 : 31 - static_cast<int>(std::log2(lane));
      int trailing = 0;
      while (lane != 0 && (lane >> trailing & 1) == 0) ++trailing;
      const int wanted[warp_facts] = {50,
                                      lane / 8 * 8 + 3,
                                      lane % 16 == 0 ? lane : lane - 1,
                                      lane + 3 < 32 ? lane + 3 : lane,
                                      1,
                                      0,
                                      static_cast<int>(0x11111111u << lane % 4),
                                      496,
                                      static_cast<int>(lane < 16 ? 0x0000aaaau : 0xaaaa0000u),
                                      lane ^ 1,
                                      70,
                                      leading + (lane == 0 ? 0 : trailing + 1)};
      for (int f = 0; f < warp_facts; ++f)
        expect(facts[f * 32 + lane] == wanted[f],
               "warp operation " + std::to_string(f) + " of lane " + std::to_string(lane) + order);
    }
  }
  {
    Device<int> out(n);
    expect(rank_in_block(dx, out, n, nullptr) == cudaSuccess, "rank_in_block launches" + order);
    std::vector<int> ranks(n, 0);
    for (int i = 0; i < n; ++i)
      for (int j = i / 64 * 64; j < std::min(i / 64 * 64 + 64, n); ++j) ranks[i] += x[j] < x[i];
    expect(out.host() == ranks, "rank_in_block" + order);
  }
}

void check_half_precision() {
  // Ties, the largest half, the smallest normal and subnormal numbers, and what lies between.
  const std::vector<float> x = {1.0f,       -2.5f,   65504.0f, 65519.0f,     65520.0f,
                                1e30f,      -0.0f,   0x1p-14f, 0x1p-24f,     0x1p-25f,
                                0x1.8p-25f, 2049.0f, 2051.0f,  0x1.ffcp-15f, 3.3e38f};
  const float infinity = __builtin_inff();
  const std::vector<float> halves = {1.0f,     -2.5f,   65504.0f, 65504.0f, infinity,
                                     infinity, -0.0f,   0x1p-14f, 0x1p-24f, 0.0f,
                                     0x1p-24f, 2048.0f, 2052.0f,  0x1p-14f, infinity};
  const std::vector<float> bfloats = {1.0f,        -2.5f,   65536.0f, 65536.0f, 65536.0f,
                                      0x1.94p+99f, -0.0f,   0x1p-14f, 0x1p-24f, 0x1p-25f,
                                      0x1.8p-25f,  2048.0f, 2048.0f,  0x1p-14f, 0x1.fp+127f};
  const int n = static_cast<int>(x.size());
  Device<float> in(x), half_out(x.size()), bfloat_out(x.size());
  expect(self_test::round_trip(in, half_out, bfloat_out, n, nullptr) == cudaSuccess, "round_trip");
  for (int i = 0; i < n; ++i) {
    const auto same = [](float a, float b) { return a == b && std::signbit(a) == std::signbit(b); };
    char what[64];
    std::snprintf(what, sizeof what, "%a is %a, not %a", x[i], half_out.host()[i], halves[i]);
    expect(same(half_out.host()[i], halves[i]), std::string("half of ") + what);
    std::snprintf(what, sizeof what, "%a is %a, not %a", x[i], bfloat_out.host()[i], bfloats[i]);
    expect(same(bfloat_out.host()[i], bfloats[i]), std::string("bfloat16 of ") + what);
  }
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const __half value = __ushort_as_half(static_cast<unsigned short>(bits));
    if (std::isnan(__half2float(value))) continue;
    if (__half_as_ushort(__float2half(__half2float(value))) != bits)
      expect(false, "half " + std::to_string(bits) + " survives a round trip");
  }
  ++passed;
}

void check_orders() {
  const int blocks = 5, threads = 100, n = blocks * threads;
  const auto turns = [&](emulation::Order order, unsigned seed) {
    emulation::set_order(order, seed);
    Device<int> out(n), counter(std::vector<int>{0});
    self_test::turns(out, counter, blocks, threads, nullptr);
    emulation::set_order(emulation::Order::forward);
    return out.host();
  };
  std::vector<int> ascending(n);
  std::iota(ascending.begin(), ascending.end(), 0);
  const std::vector<int> descending(ascending.rbegin(), ascending.rend());
  const std::vector<int> one = turns(emulation::Order::random, 1);
  expect(turns(emulation::Order::forward, 1) == ascending, "forward is ascending");
  expect(turns(emulation::Order::reverse, 1) == descending, "reverse is descending");
  expect(one != ascending && one != descending, "random is neither");
  expect(one != turns(emulation::Order::random, 2), "seeds differ");
  expect(one == turns(emulation::Order::random, 1), "a seed can be repeated");
}

void check_launch_limits() {
  Device<float> x(1), out(1);
  const auto bug = planted_bugs::bugs[0].kernel;
  const auto launch = [&](dim3 grid, dim3 block, std::size_t bytes) {
    cudaLaunchConfig_t config{grid, block, bytes, nullptr, nullptr, 0};
    return cudaLaunchKernelEx(&config, bug, x, out);
  };
  expect(launch(0, 32, 0) == cudaErrorInvalidConfiguration, "an empty grid is refused");
  expect(cudaPeekAtLastError() == cudaErrorInvalidConfiguration, "the error is remembered");
  expect(cudaGetLastError() == cudaErrorInvalidConfiguration, "the error is told");
  expect(cudaGetLastError() == cudaSuccess, "and told once");
  expect(launch(1, dim3(32, 33), 0) == cudaErrorInvalidConfiguration, "1056 threads are refused");
  expect(launch(1, 32, 49153) == cudaErrorInvalidValue, "49153 bytes need an opt-in");
  cudaGetLastError();
}

// Runs one planted bug in every order in a child; returns what it wrote and how it ended.
struct Outcome {
  int status = 0;
  std::string text;
};
constexpr int wrong_numbers = 3;

Outcome run_bug(const planted_bugs::Bug& bug) {
  std::fflush(nullptr);
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDOUT_FILENO);
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    const int n = planted_bugs::n;
    std::vector<float> x = numbers(n), wanted(n);
    for (int i = 0; i < n; ++i) wanted[i] = x[i] + x[(i + 1) % n];
    bool right = true;
    emulation::for_each_order([&] {
      Device<float> in(x), out(n);
      cudaLaunchConfig_t config{1, n, bug.shared_bytes, nullptr, nullptr, 0};
      if (cudaLaunchKernelEx(&config, bug.kernel, in, out) != cudaSuccess) _exit(4);
      right = right && out.host() == wanted;
    });
    std::fflush(nullptr);
    _exit(right ? 0 : wrong_numbers);
  }
  close(ends[1]);
  Outcome outcome;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;)
    outcome.text.append(buffer, static_cast<std::size_t>(n));
  close(ends[0]);
  waitpid(child, &outcome.status, 0);
  return outcome;
}

// A bug that only a sanitizer sees is skipped, visibly, where that sanitizer is missing. UBSan has
// no macro of its own, so the build says whether it is on.
#ifdef SELF_TEST_UBSAN
constexpr bool ubsan_is_on = true;
#else
constexpr bool ubsan_is_on = false;
#endif

bool sanitizer_is_on(const char* message) {
  return std::string(message) == "runtime error" ? ubsan_is_on : EMULATION_ASAN != 0;
}

void check_bugs(bool verbose) {
  for (int b = 0; b < planted_bugs::n_bugs; ++b) {
    const planted_bugs::Bug& bug = planted_bugs::bugs[b];
    const char* message = bug.message;
    bool by_ubsan = false;  // it may come before AddressSanitizer with its own opinion
    if (bug.sanitizer_message != nullptr && sanitizer_is_on(bug.sanitizer_message)) {
      message = bug.sanitizer_message;
      by_ubsan = ubsan_is_on;
    }
    if (message == nullptr) {
      ++skipped;
      std::printf("SKIPPED: bug '%s' is seen only by a sanitizer that is off (%s)\n", bug.name,
                  bug.sanitizer_message);
      continue;
    }
    const Outcome outcome = run_bug(bug);
    const bool ended_itself = WIFEXITED(outcome.status) && WEXITSTATUS(outcome.status) == 0;
    const bool wrong = WIFEXITED(outcome.status) && WEXITSTATUS(outcome.status) == wrong_numbers;
    const auto said = [&](const char* part) {
      return outcome.text.find(part) != std::string::npos;
    };
    const bool noticed =
        message[0] == '\0'
            ? wrong
            : !ended_itself && !wrong && (said(message) || (by_ubsan && said("runtime error")));
    expect(noticed, std::string("bug '") + bug.name + "' is noticed; status " +
                        std::to_string(outcome.status) + ", output: " + outcome.text);
    if (verbose)
      std::printf("bug '%s': %s\n%s", bug.name, wrong ? "wrong numbers" : "stopped",
                  outcome.text.substr(0, 700).c_str());
  }
}

void report_speed() {
  const int n = 100 * self_test::block_threads;
  const std::vector<float> x = numbers(n);
  Device<float> in(x), out(100), sums(n / 32);
  const auto start = std::chrono::steady_clock::now();
  self_test::block_sum(in, out, n, nullptr);
  self_test::warp_sum<float>(in, sums, n, nullptr);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("100 blocks of 256 threads, two reductions: %.3f s\n", seconds.count());
}

}  // namespace

int main(int argc, char**) {
  check_kernels();  // the order of the environment
  emulation::for_each_order(check_kernels);
  check_half_precision();
  check_orders();
  check_launch_limits();
  check_bugs(argc > 1);
  report_speed();
  std::printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
  return failed == 0 ? 0 : 1;
}
