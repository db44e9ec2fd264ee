// The fused Newton kernel, run by the emulator, against a network evaluated layer by layer and
// iterated row by row in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/activation.h"
#include "core/status.h"
#include "cuda/launch.h"
#include "reference.h"

namespace levelset::cuda {
EMULATION_DYNAMIC_SHARED(float4, mlp_memory);
}

namespace {

using levelset::Activation;
using levelset::MlpLayer;
using levelset::RowStatus;
using levelset::cuda::MlpPlan;
using levelset::cuda::MlpProduct;

constexpr std::array kProducts = {MlpProduct::kFloat, MlpProduct::kTensor};
constexpr std::array kActivations = {Activation::kNone,     Activation::kRelu, Activation::kSilu,
                                     Activation::kSoftplus, Activation::kSine, Activation::kTanh};

struct Layer {
  MlpLayer shape{};
  std::vector<float> hidden, inputs, bias;
};

struct Net {
  std::int64_t d;
  std::vector<Layer> layers;
  MlpPlan plan{};
  std::vector<float> packed;
  std::vector<std::uint32_t> coarse;

  // Widths of the hidden layers; the points again in every layer of `skips`.
  Net(std::int64_t dimension, std::vector<std::int64_t> widths, int outputs, Activation activation,
      std::vector<int> skips = {}, bool with_bias = true, unsigned seed = 1)
      : d(dimension) {
    reference::Random random(seed);
    widths.push_back(outputs);
    std::int64_t before = 0;
    for (std::size_t k = 0; k < widths.size(); ++k) {
      Layer layer;
      const bool last = k + 1 == widths.size();
      layer.shape.outputs = widths[k];
      layer.shape.hidden = before;
      layer.shape.inputs =
          k == 0 || std::find(skips.begin(), skips.end(), int(k)) != skips.end() ? d : 0;
      layer.shape.activation = last ? Activation::kNone : activation;
      layer.shape.sharpness = activation == Activation::kSoftplus ? 5.0 : 1.5;
      layer.shape.threshold = 20.0;
      const double scale = std::sqrt(2.0 / double(before + layer.shape.inputs));
      const auto fill = [&](std::vector<float>& to, std::int64_t numbers, double by) {
        for (std::int64_t i = 0; i < numbers; ++i) to.push_back(float(by * double(random())));
      };
      fill(layer.hidden, widths[k] * before, scale);
      fill(layer.inputs, widths[k] * layer.shape.inputs, scale);
      if (with_bias) fill(layer.bias, widths[k], 0.3);
      before = widths[k];
      layers.push_back(layer);
    }
    pack();
  }

  std::int64_t outputs() const { return layers.back().shape.outputs; }

  void pack() {
    std::vector<MlpLayer> shapes;
    for (const Layer& layer : layers) shapes.push_back(layer.shape);
    plan = levelset::cuda::mlp_plan(shapes.data(), int(shapes.size()), d);
    if (plan.width == 0) return;
    packed.assign(std::size_t(plan.packed), std::numeric_limits<float>::quiet_NaN());
    coarse.assign(std::size_t(plan.coarse), 0x7fff7fff);
    for (std::size_t k = 0; k < layers.size(); ++k) {
      Layer& layer = layers[k];
      layer.shape = shapes[k];
      const auto matrix = [](const std::vector<float>& m, std::int64_t columns) {
        return levelset::cuda::MlpMatrix{m.empty() ? nullptr : m.data(), columns, 1};
      };
      const levelset::cuda::MlpPackParams p{plan.width,
                                            layer.shape.outputs,
                                            layer.shape.hidden,
                                            layer.shape.inputs,
                                            matrix(layer.hidden, layer.shape.hidden),
                                            matrix(layer.inputs, layer.shape.inputs),
                                            layer.bias.empty() ? nullptr : layer.bias.data(),
                                            1,
                                            packed.data() + layer.shape.bias_at,
                                            coarse_of(shapes, int(k))};
      ASSERT_EQ(levelset::cuda::mlp_pack(p, nullptr), cudaSuccess);
    }
    for (const float x : packed) ASSERT_FALSE(std::isnan(x));  // every number has been written
    for (const std::uint32_t x : coarse) ASSERT_NE(x, 0x7fff7fff);
  }

  std::uint32_t* coarse_of(const std::vector<MlpLayer>& shapes, int k) {
    const bool there = levelset::cuda::mlp_multiplies(shapes.data(), int(shapes.size()), k);
    return there ? coarse.data() + shapes[std::size_t(k)].coarse_forward_at : nullptr;
  }

  // F (l,) and D_xF (l, d) at one point.
  void evaluate(const std::vector<double>& x, std::vector<double>& values,
                std::vector<double>& jacobian) const {
    std::vector<std::vector<double>> slopes;
    std::vector<double> h;
    for (const Layer& layer : layers) {
      std::vector<double> z(std::size_t(layer.shape.outputs)), slope(z.size());
      for (std::size_t c = 0; c < z.size(); ++c) {
        z[c] = layer.bias.empty() ? 0.0 : layer.bias[c];
        for (std::size_t k = 0; k < h.size(); ++k) z[c] += layer.hidden[c * h.size() + k] * h[k];
        for (std::size_t j = 0; j < std::size_t(layer.shape.inputs); ++j) {
          z[c] += layer.inputs[c * x.size() + j] * x[j];
        }
        levelset::activate(layer.shape.activation, layer.shape.sharpness, layer.shape.threshold,
                           z[c], slope[c]);
      }
      h = z;
      slopes.push_back(slope);
    }
    values = h;
    jacobian.assign(values.size() * x.size(), 0.0);
    for (std::size_t o = 0; o < values.size(); ++o) {
      std::vector<double> delta(values.size(), 0.0);
      delta[o] = 1.0;
      for (std::size_t k = layers.size(); k-- > 0;) {
        const Layer& layer = layers[k];
        for (std::size_t c = 0; c < delta.size(); ++c) delta[c] *= slopes[k][c];
        std::vector<double> next(std::size_t(layer.shape.hidden), 0.0);
        for (std::size_t c = 0; c < delta.size(); ++c) {
          for (std::size_t i = 0; i < next.size(); ++i) {
            next[i] += layer.hidden[c * next.size() + i] * delta[c];
          }
          for (std::size_t j = 0; j < std::size_t(layer.shape.inputs); ++j) {
            jacobian[o * x.size() + j] += layer.inputs[c * x.size() + j] * delta[c];
          }
        }
        delta = next;
      }
    }
  }
};

struct Projection {
  std::int64_t n;
  std::vector<float> start, level{0.0f, 0.0f}, lower, upper;
  bool own_levels = false, values_only = false, mixed = false;
  MlpProduct product = MlpProduct::kFloat;
  std::int64_t max_iters = 0;
  double tol = 1e-4, max_step = std::numeric_limits<double>::infinity();
  std::vector<float> points, values, jacobian;
  std::vector<std::int8_t> status;
  std::vector<std::int32_t> iterations;

  Projection(const Net& net, std::int64_t rows, unsigned seed = 7) : n(rows) {
    reference::Random random(seed);
    for (std::int64_t i = 0; i < n * net.d; ++i) start.push_back(float(random()));
  }

  void operator()(const Net& net) {
    const std::int64_t l = net.outputs();
    points.assign(std::size_t(n * net.d), -5.0f);
    values.assign(std::size_t(n * l), -5.0f);
    jacobian.assign(std::size_t(n * l * net.d), -5.0f);
    status.assign(std::size_t(n), -5);
    iterations.assign(std::size_t(n), -5);
    levelset::cuda::MlpParams p{};
    for (std::size_t k = 0; k < net.layers.size(); ++k) p.layers[k] = net.layers[k].shape;
    p.count = int(net.layers.size());
    p.dimension = int(net.d);
    p.outputs = int(l);
    p.packed = net.packed.data();
    p.rows = n;
    p.start = start.data();
    p.level = level.data();
    p.level_stride = own_levels ? l : 0;
    p.lower = lower.empty() ? nullptr : lower.data();
    p.upper = upper.empty() ? nullptr : upper.data();
    p.max_iters = max_iters;
    p.tol = tol;
    p.max_step = max_step;
    p.points = points.data();
    p.values = values.data();
    p.jacobian = values_only ? nullptr : jacobian.data();
    p.status = status.data();
    p.iterations = iterations.data();
    const auto launch = [&](MlpProduct with) {
      std::int64_t blocks = 0;
      ASSERT_EQ(levelset::cuda::mlp_blocks(p, net.plan, with, &blocks), cudaSuccess);
      const std::size_t hidden = net.layers.size() - 1;
      std::vector<float4> slopes(std::size_t(blocks) * hidden * levelset::cuda::kMlpTile / 4);
      unsigned long long next = 99;
      p.slopes = reinterpret_cast<float*>(slopes.data());
      p.next = &next;
      ASSERT_EQ(levelset::cuda::mlp_newton(p, net.plan, with, blocks, nullptr), cudaSuccess);
    };
    if (mixed) {
      p.coarse = net.coarse.data();
      launch(MlpProduct::kCoarse);
      p.start = p.points;
      p.begun = p.iterations;
    }
    launch(product);
  }
};

double length(const std::vector<double>& v) {
  double sum = 0;
  for (const double x : v) sum += x * x;
  return std::sqrt(sum);
}

// Values and Jacobian of the points that a run returned.
void check_numbers(const Net& net, const Projection& run, double tolerance) {
  const std::size_t d = std::size_t(net.d), l = std::size_t(net.outputs());
  for (std::size_t i = 0; i < std::size_t(run.n); ++i) {
    const std::vector<double> x(run.points.begin() + long(i * d),
                                run.points.begin() + long((i + 1) * d));
    std::vector<double> values, jacobian;
    net.evaluate(x, values, jacobian);
    const double slope = 1.0 + length(jacobian);
    const double scale = tolerance * (1.0 + length(values) + length(x) * slope);
    for (std::size_t o = 0; o < l; ++o) ASSERT_NEAR(run.values[i * l + o], values[o], scale);
    for (std::size_t j = 0; j < l * d; ++j) {
      ASSERT_NEAR(run.jacobian[i * l * d + j], jacobian[j], tolerance * slope) << "row " << i;
    }
  }
}

// Newton's iteration of row i in double: where it ends, how, and after how many updates.
struct Ending {
  std::vector<double> point;
  RowStatus status;
  int iterations;
};
Ending iterate(const Net& net, const Projection& run, std::size_t i) {
  const std::size_t d = std::size_t(net.d), l = std::size_t(net.outputs());
  Ending end{{run.start.begin() + long(i * d), run.start.begin() + long((i + 1) * d)},
             RowStatus::kMaxIterations,
             0};
  for (;; ++end.iterations) {
    std::vector<double> f, j;
    net.evaluate(end.point, f, j);
    double residual = 0;
    for (std::size_t o = 0; o < l; ++o) {
      f[o] -= run.level[(run.own_levels ? i * l : 0) + o];
      residual = std::max(residual, std::fabs(f[o]));
    }
    if (residual <= run.tol) end.status = RowStatus::kConverged;
    if (residual <= run.tol || end.iterations == run.max_iters) return end;
    const auto dot = [&](std::size_t a, std::size_t b) {
      double sum = 0;
      for (std::size_t c = 0; c < d; ++c) sum += j[a * d + c] * j[b * d + c];
      return sum;
    };
    std::vector<double> weight(l);
    if (l == 1) {
      weight[0] = f[0] / dot(0, 0);
    } else {
      const double determinant = dot(0, 0) * dot(1, 1) - dot(0, 1) * dot(0, 1);
      weight[0] = (dot(1, 1) * f[0] - dot(0, 1) * f[1]) / determinant;
      weight[1] = (dot(0, 0) * f[1] - dot(0, 1) * f[0]) / determinant;
    }
    std::vector<double> step(d, 0.0);
    for (std::size_t o = 0; o < l; ++o) {
      for (std::size_t c = 0; c < d; ++c) step[c] += weight[o] * j[o * d + c];
    }
    const double shrink = std::min(1.0, run.max_step / length(step));
    for (std::size_t c = 0; c < d; ++c) {
      double x = end.point[c] - shrink * step[c];
      if (!run.lower.empty()) x = std::max<double>(x, run.lower[c]);
      if (!run.upper.empty()) x = std::min<double>(x, run.upper[c]);
      end.point[c] = x;
    }
  }
}

// The share of rows that end like the double ones; a rounding sends a few another way.
double share_alike(const Net& net, const Projection& run, double tolerance) {
  const std::size_t d = std::size_t(net.d);
  int alike = 0;
  for (std::size_t i = 0; i < std::size_t(run.n); ++i) {
    const Ending end = iterate(net, run, i);
    bool same =
        RowStatus(run.status[i]) == end.status && std::abs(run.iterations[i] - end.iterations) <= 1;
    if (end.status != RowStatus::kConverged) same = same && run.iterations[i] == end.iterations;
    for (std::size_t c = 0; c < d; ++c) {
      same = same && std::fabs(run.points[i * d + c] - end.point[c]) <= tolerance;
    }
    alike += same;
  }
  return double(alike) / double(run.n);
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

TEST(EmulatedMlp, EveryActivationWithAndWithoutTheInputInLaterLayers) {
  for (const Activation activation : kActivations) {
    for (const std::vector<int>& skips : {std::vector<int>{}, std::vector<int>{1, 2}}) {
      for (const int outputs : {1, 2}) {
        SCOPED_TRACE(testing::Message() << "activation " << int(activation) << ", skips "
                                        << skips.size() << ", outputs " << outputs);
        const Net net(3, {17, 21}, outputs, activation, skips);
        ASSERT_EQ(net.plan.width, 64);
        for (const MlpProduct product : kProducts) {
          if (product == MlpProduct::kTensor && outputs == 2 && skips.empty()) continue;  // time
          Projection run(net, 37);
          run.product = product;
          run(net);
          check_numbers(net, run, 2e-6);
          for (const std::int32_t count : run.iterations) ASSERT_EQ(count, 0);
          // F alone is the same to the bit.
          Projection plain = run;
          plain.values_only = true;
          plain(net);
          ASSERT_TRUE(same_bits(plain.values, run.values));
        }
      }
    }
  }
}

TEST(EmulatedMlp, SineOfNumbersNearAndFar) {
  reference::Random random(5);
  for (int i = 0; i < 20000; ++i) {
    const double u = double(random()), scale = std::pow(10.0, i % 13 - 4);
    const float x = float(u * scale);
    float sine, cosine;
    levelset::sine_and_cosine(x, sine, cosine);
    ASSERT_NEAR(sine, std::sin(double(x)), 1.5e-7) << x;
    ASSERT_NEAR(cosine, std::cos(double(x)), 1.5e-7) << x;
  }
  for (const float x : {1e20f, -3e38f}) {
    float sine, cosine;
    levelset::sine_and_cosine(x, sine, cosine);
    EXPECT_LE(std::max(std::fabs(sine), std::fabs(cosine)), 1.0f);
  }
  float sine, cosine;
  levelset::sine_and_cosine(std::numeric_limits<float>::infinity(), sine, cosine);
  EXPECT_TRUE(std::isnan(sine) && std::isnan(cosine));
}

// Every tile: widths around its columns, more rows than slots.
TEST(EmulatedMlp, EveryTile) {
  struct Case {
    std::vector<std::int64_t> widths;
    std::int64_t d, rows;
    int width;
  };
  for (const Case& c : {Case{{}, 2, 300, 64}, Case{{1}, 1, 257, 64}, Case{{64, 5, 63}, 2, 260, 64},
                        Case{{65, 128}, 3, 129, 128}, Case{{129, 200}, 16, 65, 256},
                        Case{{257, 30}, 3, 33, 512}, Case{{12, 509}, 3, 5, 512}}) {
    for (const MlpProduct product : kProducts) {
      SCOPED_TRACE(testing::Message() << "tile of " << c.width << " columns, rows " << c.rows
                                      << ", product " << int(product));
      const Net net(c.d, c.widths, 1, Activation::kTanh, {1});
      ASSERT_EQ(net.plan.width, c.width);
      Projection run(net, c.rows);
      run.product = product;
      run(net);
      check_numbers(net, run, 2e-6);
    }
  }
}

TEST(EmulatedMlp, NewtonEndsWhereTheDoubleIterationDoes) {
  for (const int outputs : {1, 2}) {
    for (const bool boxed : {false, true}) {
      SCOPED_TRACE(testing::Message() << "outputs " << outputs << ", box " << boxed);
      const Net net(3, {40, 40}, outputs, Activation::kSoftplus, {1});
      Projection run(net,
                     700);  // more than the slots of a block, and rows that end sooner and later
      run.max_iters = 6;
      run.own_levels = true;
      reference::Random random(3);
      run.level.clear();
      for (std::int64_t i = 0; i < run.n * outputs; ++i) {
        run.level.push_back(float(0.3 * double(random())));
      }
      if (boxed) {
        run.max_step = 0.4;
        run.lower.assign(3, -1.5f);
        run.upper.assign(3, 1.2f);
      }
      run(net);
      check_numbers(net, run, 2e-6);
      EXPECT_GT(share_alike(net, run, 1e-3), 0.97);
      const auto ended = [&](RowStatus status) {
        return std::count(run.status.begin(), run.status.end(), std::int8_t(status));
      };
      EXPECT_GT(ended(RowStatus::kConverged), 100);
      const auto [fewest, most] = std::minmax_element(run.iterations.begin(), run.iterations.end());
      EXPECT_LT(*fewest + 2, *most);  // rows that finish at different iterations
    }
  }
}

TEST(EmulatedMlp, ARowDependsNeitherOnTheOrderOfThreadsNorOnTheRowsBesideIt) {
  const Net net(3, {33, 33}, 1, Activation::kSilu);
  for (const int way : {0, 1, 2}) {  // float32, tensor cores, mixed
    SCOPED_TRACE(testing::Message() << "way " << way);
    Projection first(net, way == 0 ? 300 : 40);  // an emulated instruction is slow
    first.max_iters = way == 0 ? 4 : 2;
    first.product = way == 0 ? MlpProduct::kFloat : MlpProduct::kTensor;
    first.mixed = way == 2;
    first.start[3 * 13] = std::numeric_limits<float>::quiet_NaN();
    first(net);
    EXPECT_EQ(RowStatus(first.status[13]), RowStatus::kNonFinite);
    emulation::for_each_order(
        [&] {
          Projection again = first;
          again(net);
          ASSERT_TRUE(same_bits(again.points, first.points)) << emulation::order_name();
          ASSERT_TRUE(same_bits(again.values, first.values)) << emulation::order_name();
          ASSERT_TRUE(same_bits(again.jacobian, first.jacobian)) << emulation::order_name();
          ASSERT_EQ(again.status, first.status) << emulation::order_name();
          ASSERT_EQ(again.iterations, first.iterations) << emulation::order_name();
        },
        1);
    for (const std::size_t i : {std::size_t(0), std::size_t(12), std::size_t(first.n - 1)}) {
      Projection alone = first;
      alone.n = 1;
      alone.start.assign(first.start.begin() + long(3 * i), first.start.begin() + long(3 * i + 3));
      alone(net);
      EXPECT_EQ(alone.status[0], first.status[i]);
      EXPECT_TRUE(std::equal(alone.points.begin(), alone.points.end(), &first.points[3 * i]));
      EXPECT_TRUE(std::equal(alone.jacobian.begin(), alone.jacobian.end(), &first.jacobian[3 * i]));
    }
  }
}

// The largest errors of F and of D_xF against double, relative to one more than their lengths.
std::array<double, 2> errors(const Net& net, const Projection& run) {
  std::array<double, 2> worst{};
  const std::size_t d = std::size_t(net.d);
  for (std::size_t i = 0; i < std::size_t(run.n); ++i) {
    const std::vector<double> x(run.points.begin() + long(i * d),
                                run.points.begin() + long((i + 1) * d));
    std::vector<double> values, jacobian;
    net.evaluate(x, values, jacobian);
    const auto take = [](double& most, double error) {  // std::max would drop a NaN
      most = std::isnan(error) ? HUGE_VAL : std::max(most, error);
    };
    take(worst[0], std::fabs(run.values[i] - values[0]) / (1 + length(values)));
    for (std::size_t j = 0; j < d; ++j) {
      const double error = std::fabs(run.jacobian[i * d + j] - jacobian[j]);
      take(worst[1], error / (1 + length(jacobian)));
    }
  }
  return worst;
}

// Three products in TF32 are about as exact as one in float32; one of them alone is far from it.
TEST(EmulatedMlp, TensorCoresAreAsExactAsFloat32) {
  const Net net(3, {128, 128}, 1, Activation::kSine, {1});
  Projection exact(net, 64), tensor(net, 64);
  exact(net);
  tensor.product = MlpProduct::kTensor;
  tensor(net);
  const auto of_float = errors(net, exact), of_tensor = errors(net, tensor);
  for (const std::size_t i : {0u, 1u}) {
    EXPECT_LT(of_tensor[i], 3 * of_float[i]);
    EXPECT_LT(of_float[i], 1e-5);
    RecordProperty(i == 0 ? "values" : "jacobian", std::to_string(of_tensor[i] / of_float[i]));
  }
}

// Where the first evaluation is coarse a row takes another way to a point as exact.
TEST(EmulatedMlp, MixedPrecisionEndsWithExactNumbers) {
  struct Case {
    std::vector<std::int64_t> widths;
    int outputs;
    std::int64_t rows;
  };
  for (const Case& c : {Case{{40, 47}, 1, 80}, Case{{33, 20}, 2, 40}, Case{{100, 65}, 1, 20},
                        Case{{300, 17}, 1, 8}}) {
    SCOPED_TRACE(testing::Message() << "widths " << c.widths[0] << ", outputs " << c.outputs);
    const Net net(3, c.widths, c.outputs, Activation::kSine);
    Projection run(net, c.rows);
    run.max_iters = 6;
    run.max_step = 0.5;
    run.product = MlpProduct::kTensor;
    Projection mixed = run;
    mixed.mixed = true;
    run(net);
    mixed(net);
    check_numbers(net, mixed, 2e-6);
    ASSERT_FALSE(same_bits(mixed.points, run.points));
    const auto ended = [&](const Projection& of) {
      return std::count(of.status.begin(), of.status.end(), std::int8_t(RowStatus::kConverged));
    };
    EXPECT_GT(ended(mixed), run.n / 2);
    EXPECT_LE(std::abs(ended(mixed) - ended(run)), run.n / 20 + 1);
    double far = 0;
    for (std::int64_t i = 0; i < run.n * net.d; ++i) {
      const std::size_t at = std::size_t(i);
      if (RowStatus(run.status[at / 3]) != RowStatus::kConverged) continue;
      far += std::fabs(run.points[at] - mixed.points[at]) > 0.05;
    }
    EXPECT_LE(far, double(run.n * net.d) / 20);
  }
}

// A coarse step that fails is not taken: the row is judged by exact numbers where it began.
TEST(EmulatedMlp, ACoarseStepThatFailsIsNotTaken) {
  Net net(2, {16, 16}, 1, Activation::kRelu, {}, false);
  for (float& weight : net.layers[0].inputs) weight = 1.0f;
  for (float& weight : net.layers[1].hidden) weight = 1.0f;
  for (float& weight : net.layers[2].hidden) weight = 1.0f;
  net.pack();
  Projection run(net, 3);
  run.start = {-1.0f, -1.0f, 1.0f, 1.0f, 0.5f, std::numeric_limits<float>::quiet_NaN()};
  run.level = {256.0f};  // F = 256 (x + y) where that is positive
  run.max_iters = 5;
  run.mixed = true;
  run.product = MlpProduct::kTensor;
  run(net);
  EXPECT_EQ(RowStatus(run.status[0]), RowStatus::kRankDeficient);
  EXPECT_EQ(RowStatus(run.status[1]), RowStatus::kConverged);
  EXPECT_EQ(RowStatus(run.status[2]), RowStatus::kNonFinite);
  EXPECT_EQ(run.iterations[0], 0);
  EXPECT_EQ(run.iterations[1], 1);
  EXPECT_EQ(run.points[0], -1.0f);
  EXPECT_EQ(run.points[4], 0.5f);
}

TEST(EmulatedMlp, TheRuleForTensorCores) {
  using levelset::cuda::mlp_has_tensor;
  const auto product = [](const Net& net, bool has_tensor) {
    std::vector<MlpLayer> shapes;
    for (const Layer& layer : net.layers) shapes.push_back(layer.shape);
    return levelset::cuda::mlp_product(shapes.data(), int(shapes.size()), has_tensor);
  };
  const Net deep(3, {64, 64}, 1, Activation::kRelu), shallow(3, {64}, 1, Activation::kRelu);
  const Net narrow(3, {15, 64}, 1, Activation::kRelu), wide(3, {512, 512}, 1, Activation::kRelu);
  EXPECT_EQ(product(deep, true), MlpProduct::kTensor);
  EXPECT_EQ(product(deep, false), MlpProduct::kFloat);
  EXPECT_EQ(product(shallow, true), MlpProduct::kFloat);
  EXPECT_EQ(product(narrow, true), MlpProduct::kFloat);
  EXPECT_EQ(shallow.plan.coarse, 0);
  EXPECT_TRUE(mlp_has_tensor(deep.plan, 3, 1, 8, 163 * 1024));
  EXPECT_FALSE(mlp_has_tensor(deep.plan, 3, 1, 7, 163 * 1024));
  EXPECT_TRUE(mlp_has_tensor(wide.plan, 3, 1, 9, 227 * 1024));
  EXPECT_FALSE(mlp_has_tensor(wide.plan, 3, 1, 8, 99 * 1024));
}

TEST(EmulatedMlp, NoRows) {
  const Net net(3, {8}, 1, Activation::kRelu);
  Projection run(net, 0);
  run.max_iters = 3;
  run(net);
}

// A layer overflows and the next one's tanh brings it back; infinity must not meet the zeros that
// pad the matrices.
TEST(EmulatedMlp, InfinityThatAnActivationBringsBack) {
  Net net(2, {3, 3}, 1, Activation::kTanh, {}, false);
  net.layers[0].shape.activation = Activation::kNone;
  std::fill(net.layers[0].inputs.begin(), net.layers[0].inputs.end(), 3e38f);
  for (float& weight : net.layers[1].hidden) weight = std::fabs(weight);
  net.pack();
  Projection run(net, 2);
  run.start = {9.0f, 9.0f, -9.0f, -9.0f};
  run(net);
  check_numbers(net, run, 2e-6);
}

TEST(EmulatedMlp, EveryStatus) {
  Net net(2, {2}, 1, Activation::kRelu);  // F = relu(x) + relu(y) - 1
  net.layers[0].inputs = {1, 0, 0, 1};
  net.layers[0].bias = {0, 0};
  net.layers[1].hidden = {1, 1};
  net.layers[1].bias = {-1};
  net.pack();
  Projection run(net, 5);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  run.start = {0.5f, 0.5f, 3.0f, 3.0f, -1.0f, -1.0f, nan, 1.0f, inf, 0.0f};
  run.max_iters = 1;
  run(net);
  const std::vector<RowStatus> expected = {RowStatus::kConverged, RowStatus::kConverged,
                                           RowStatus::kRankDeficient, RowStatus::kNonFinite,
                                           RowStatus::kNonFinite};
  for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(RowStatus(run.status[i]), expected[i]) << i;
  EXPECT_EQ(run.iterations, (std::vector<std::int32_t>{0, 1, 0, 0, 0}));
  run.max_iters = 0;
  run(net);
  EXPECT_EQ(RowStatus(run.status[1]), RowStatus::kMaxIterations);
  run.max_iters = 5;
  run.lower = {2.9f, 2.9f};
  run.upper = {3.0f, 3.0f};
  run(net);
  EXPECT_EQ(RowStatus(run.status[1]), RowStatus::kStalled);
}

TEST(EmulatedMlp, NetworksThatDoNotFitHaveNoPlan) {
  const auto width = [](const Net& net) { return net.plan.width; };
  EXPECT_EQ(width(Net(3, {513}, 1, Activation::kRelu)), 0);
  EXPECT_EQ(width(Net(17, {8}, 1, Activation::kRelu)), 0);
  EXPECT_EQ(width(Net(3, {8}, 3, Activation::kRelu)), 0);
  EXPECT_EQ(width(Net(3, std::vector<std::int64_t>(24, 4), 1, Activation::kRelu)), 0);
  EXPECT_EQ(width(Net(3, std::vector<std::int64_t>(23, 4), 1, Activation::kRelu)), 64);
  // What two blocks of one multiprocessor need, and what a device with less has.
  for (const int columns : levelset::cuda::kMlpWidths) {
    for (const MlpProduct product : {MlpProduct::kFloat, MlpProduct::kTensor}) {
      const auto bytes = [&](int d, int l) {
        return levelset::cuda::mlp_room(columns, d, l, product).bytes;
      };
      EXPECT_LE(2 * (bytes(3, 2) + 1024), 228 * 1024) << columns;
      EXPECT_LE(bytes(16, 2), 163 * 1024);
    }
  }
}

}  // namespace
