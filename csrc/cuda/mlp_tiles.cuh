// Newton's iteration on a multilayer perceptron, fused into one launch: a block holds a tile of
// rows, evaluates F and D_xF of all of them layer by layer, updates them, and gives the slot of a
// row that is done to the next one that waits. Rows are handed out by a counter in global memory;
// what becomes of a row depends neither on its slot nor on the rows beside it.
//
// With MlpProduct::kCoarse every row is evaluated once, and moved where its step is a sound one;
// the launch that follows goes on from there.
#pragma once

#include <type_traits>

#include "../core/activation.h"
#include "../core/newton_row.h"
#include "launch.h"
#include "mlp_float.cuh"
#include "mlp_tensor.cuh"
#include "team.cuh"

namespace levelset::cuda {

extern __shared__ float4 mlp_memory[];  // float4 for its alignment

namespace {

// The launch's parameters, copied to shared memory: no phase has to be handed a pointer to them.
__device__ __forceinline__ const MlpParams& parameters() {
  return *reinterpret_cast<const MlpParams*>(reinterpret_cast<char*>(mlp_memory) + kMlpParamsAt);
}
static_assert(sizeof(MlpParams) <= kMlpParamBytes && sizeof(MlpParams) % 4 == 0);

template <int W, MlpProduct P>
using MlpThread = std::conditional_t<P == MlpProduct::kFloat, FloatThread<W>, TensorThread<W, P>>;

// The block's part of shared memory. Made anew in every phase: what is kept over a phase would take
// registers from the sums.
template <MlpProduct P>
struct Room {
  int rows;
  float *tile, *panels, *points, *values, *jacobian, *level;
  std::int64_t* row;
  std::int32_t* iterations;
  std::int8_t* status;

  __device__ __forceinline__ Room(const MlpParams& p, int width) {
    const MlpRoom room = mlp_room(width, p.dimension, p.outputs, P);
    char* const memory = reinterpret_cast<char*>(mlp_memory);
    rows = mlp_tile_rows(width);
    tile = reinterpret_cast<float*>(memory + room.tile);
    panels = reinterpret_cast<float*>(memory + room.panels);
    points = reinterpret_cast<float*>(memory + room.points);
    values = reinterpret_cast<float*>(memory + room.values);
    jacobian = reinterpret_cast<float*>(memory + room.jacobian);
    level = reinterpret_cast<float*>(memory + room.level);
    row = reinterpret_cast<std::int64_t*>(memory + room.row);
    iterations = reinterpret_cast<std::int32_t*>(memory + room.iterations);
    status = reinterpret_cast<std::int8_t*>(memory + room.status);
  }

  // A^T m for row r of the tile A (count, rows) and m (count,) in global memory, in four sums.
  __device__ __forceinline__ float dot(int r, const float* m, int count) const {
    const auto number = [&](int k) {
      return tile[k * rows + (P == MlpProduct::kFloat ? r : mlp_turned(k, r))];
    };
    float sum[4] = {};
    int k = 0;
    for (; k + 4 <= count; k += 4) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(m + k));
      sum[0] += number(k) * x.x;
      sum[1] += number(k + 1) * x.y;
      sum[2] += number(k + 2) * x.z;
      sum[3] += number(k + 3) * x.w;
    }
    float rest = 0.0f;
    for (; k < count; ++k) rest += number(k) * m[k];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
  }
};

// Four slopes of hidden layer k, `part` of the thread's 16 (see MlpThread::number), in global
// memory. A thread reads only what it wrote itself.
__device__ __forceinline__ float4& slope(const MlpParams& p, int k, int part) {
  const std::int64_t layer = std::int64_t(blockIdx.x) * (p.count - 1) + k;
  return reinterpret_cast<float4*>(p.slopes)[(layer * 16 + part) * kMlpThreads + threadIdx.x];
}

// The pre-activations of hidden layer k in the tile become h_k, and leave their slopes.
template <int W, MlpProduct P>
__device__ LEVELSET_NOINLINE void activate_tile(int k) {
  const MlpParams& p = parameters();
  const Room<P> room(p, W);
  const MlpThread<W, P> own;
  const MlpLayer& layer = p.layers[k];
  const Activation activation = layer.activation;
  const float sharpness = float(layer.sharpness), threshold = float(layer.threshold);
  // Not unrolled: sixteen copies of every activation would not fit the instruction cache.
#pragma unroll 1
  for (int part = 0; part < 16; ++part) {
    float a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      activate(activation, sharpness, threshold, own.number(room.tile, part, i), a[i]);
    }
    if (p.jacobian != nullptr) slope(p, k, part) = make_float4(a[0], a[1], a[2], a[3]);
  }
}

// h_k of a hidden layer takes the place of h_{k-1} in the tile.
template <int W, MlpProduct P>
__device__ LEVELSET_NOINLINE void forward_layer(int k) {
  const MlpParams& p = parameters();
  const Room<P> room(p, W);
  const MlpThread<W, P> own;
  const MlpLayer& layer = p.layers[k];
  const float* matrix = p.packed + layer.forward_at;
  typename MlpThread<W, P>::Sums sums;
  own.fill(sums, p.packed + layer.bias_at);
  if (layer.inputs > 0) own.multiply_points(room.points, matrix, p.dimension, sums);
  if (layer.hidden > 0) {
    const int count = int(layer.hidden);
    if constexpr (P == MlpProduct::kCoarse) {
      own.multiply_tile(room.tile, room.panels, p.coarse + layer.coarse_forward_at, count, sums);
    } else {
      own.multiply_tile(room.tile, room.panels, matrix + layer.inputs * W, count, sums);
    }
  }
  own.store(sums, room.tile);
  if (layer.activation != Activation::kNone) activate_tile<W, P>(k);
}

// sums, the gradient with respect to h_k, become delta_k in the tile.
template <int W, MlpProduct P>
__device__ __forceinline__ void store_delta(const MlpParams& p, const MlpThread<W, P>& own, int k,
                                            float* tile, typename MlpThread<W, P>::Sums& sums) {
  if (p.layers[k].activation != Activation::kNone) {
#pragma unroll
    for (int part = 0; part < 16; ++part) {
      const float4 a = slope(p, k, part);
      float* const x = sums.four(part);
      x[0] *= a.x;
      x[1] *= a.y;
      x[2] *= a.z;
      x[3] *= a.w;
    }
  }
  own.store(sums, tile);
}

// delta of the last hidden layer, for one output.
template <int W, MlpProduct P>
__device__ LEVELSET_NOINLINE void seed_deltas(int output) {
  const MlpParams& p = parameters();
  const MlpThread<W, P> own;
  typename MlpThread<W, P>::Sums sums;
  own.fill(sums, p.packed + p.layers[p.count - 1].backward_at + output * W);
  store_delta<W, P>(p, own, p.count - 2, Room<P>(p, W).tile, sums);
}

// delta_{k-1} takes the place of delta_k in the tile.
template <int W, MlpProduct P>
__device__ LEVELSET_NOINLINE void backward_layer(int k) {
  const MlpParams& p = parameters();
  const Room<P> room(p, W);
  const MlpThread<W, P> own;
  const MlpLayer& layer = p.layers[k];
  typename MlpThread<W, P>::Sums sums;
  own.clear(sums);
  const int count = int(layer.outputs);
  if constexpr (P == MlpProduct::kCoarse) {
    own.multiply_tile(room.tile, room.panels, p.coarse + layer.coarse_backward_at, count, sums);
  } else {
    own.multiply_tile(room.tile, room.panels, p.packed + layer.backward_at, count, sums);
  }
  store_delta<W, P>(p, own, k - 1, room.tile, sums);
}

// F of every row; the last hidden layer has left h in the tile.
template <MlpProduct P>
__device__ LEVELSET_NOINLINE void last_layer(int width) {
  const MlpParams& p = parameters();
  const Room<P> room(p, width);
  const MlpLayer& layer = p.layers[p.count - 1];
  const float *bias = p.packed + layer.bias_at, *inputs = p.packed + layer.forward_at;
  const float* hidden = p.packed + layer.backward_at;
  for (int i = int(threadIdx.x); i < room.rows * p.outputs; i += kMlpThreads) {
    const int r = i % room.rows, o = i / room.rows;
    float sum = bias[o];
    for (int j = 0; j < layer.inputs; ++j) {
      sum += room.points[r * p.dimension + j] * inputs[j * width + o];
    }
    if (layer.hidden > 0) {
      sum += room.dot(r, hidden + o * width, int(layer.hidden));
    }
    room.values[r * p.outputs + o] = sum;
  }
}

// What layer k adds to D_xF of one output through U_k; the last layer comes first and has no
// deltas.
template <MlpProduct P>
__device__ LEVELSET_NOINLINE void add_to_jacobian(int width, int k, int output) {
  const MlpParams& p = parameters();
  const Room<P> room(p, width);
  const MlpLayer& layer = p.layers[k];
  const bool first = k == p.count - 1;
  const int d = p.dimension;
  // The same thread comes to the same numbers in every layer.
  for (int i = int(threadIdx.x); i < room.rows * d; i += kMlpThreads) {
    const int r = i % room.rows, j = i / room.rows;
    const float* const column = p.packed + layer.forward_at + j * width;
    float& to = room.jacobian[(r * p.outputs + output) * d + j];
    if (first) {
      to = layer.inputs > 0 ? column[output] : 0.0f;
    } else {
      to += room.dot(r, column, int(layer.outputs));
    }
  }
}

// D_xF of one output.
template <int W, MlpProduct P>
__device__ __forceinline__ void backward(int output) {
  const MlpParams& p = parameters();
  int k = p.count - 1;
  add_to_jacobian<P>(W, k, output);
  if (p.layers[k].hidden == 0) return;
  __syncthreads();  // until now the tile was being read
  seed_deltas<W, P>(output);
  for (--k;; --k) {
    __syncthreads();
    if (p.layers[k].inputs > 0) add_to_jacobian<P>(W, k, output);
    if (p.layers[k].hidden == 0) return;
    backward_layer<W, P>(k);
  }
}

// Gives every free slot a row that waits; false where no slot has one.
template <MlpProduct P>
__device__ LEVELSET_NOINLINE bool refill(int width) {
  const MlpParams& p = parameters();
  __shared__ int wanted[kMlpThreads / kWarpSize];
  __shared__ long long first;
  static_assert(sizeof wanted + sizeof first <= kMlpStaticBytes);
  const Room<P> room(p, width);
  const int slot = int(threadIdx.x), lane = slot % kWarpSize, warp = slot / kWarpSize;
  const bool wants = slot < room.rows && room.row[slot] < 0;
  const unsigned votes = __ballot_sync(kFullWarp, wants);
  if (lane == 0) wanted[warp] = __popc(votes);
  __syncthreads();
  if (slot == 0) {
    unsigned long long total = 0;
    for (const int count : wanted) total += (unsigned long long)(count);
    first = total > 0 ? (long long)(atomicAdd(p.next, total)) : 0;
  }
  __syncthreads();
  if (wants) {
    long long row = first + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < warp; ++w) row += wanted[w];
    if (row < p.rows) {
      room.row[slot] = row;
      room.iterations[slot] = p.begun != nullptr ? p.begun[row] : 0;
      const int d = p.dimension, l = p.outputs;
      for (int j = 0; j < d; ++j) room.points[slot * d + j] = p.start[row * d + j];
      for (int o = 0; o < l && p.jacobian != nullptr; ++o) {
        room.level[slot * l + o] = p.level[row * p.level_stride + o];
      }
    }
  }
  return __syncthreads_or(slot < room.rows && room.row[slot] >= 0) != 0;
}

// Copies what a row leaves behind and frees its slot.
template <MlpProduct P>
__device__ __forceinline__ void hand_over(const MlpParams& p, const Room<P>& room, int slot,
                                          RowStatus status) {
  const int d = p.dimension, l = p.outputs;
  const std::int64_t row = room.row[slot];
  room.row[slot] = -1;
  for (int o = 0; o < l; ++o) p.values[row * l + o] = room.values[slot * l + o];
  if (p.jacobian == nullptr) return;
  for (int j = 0; j < d; ++j) p.points[row * d + j] = room.points[slot * d + j];
  for (int j = 0; j < l * d; ++j) p.jacobian[row * l * d + j] = room.jacobian[slot * l * d + j];
  p.status[row] = std::int8_t(status);
  p.iterations[row] = room.iterations[slot];
}

// One Newton update of every row, a thread a row.
template <MlpProduct P, int L>
__device__ LEVELSET_NOINLINE void update_rows(int width) {
  const MlpParams& p = parameters();
  const Room<P> room(p, width);
  const int slot = int(threadIdx.x);
  if (slot >= room.rows || room.row[slot] < 0) return;
  NewtonParams<float> u{};
  u.rows = u.point_rows = room.rows;
  u.columns = p.dimension;
  u.outputs = L;
  u.points = u.next = room.points;
  u.values = room.values;
  u.jacobian = room.jacobian;
  u.level = room.level;
  u.level_stride = L;
  u.running = u.status = room.status;
  u.lower = p.lower;
  u.upper = p.upper;
  u.tol = P == MlpProduct::kCoarse ? -1.0 : p.tol;  // coarse numbers end no row
  u.max_step = p.max_step;
  // A row that has no update left keeps its point.
  room.status[slot] = std::int8_t(room.iterations[slot] < p.max_iters ? RowStatus::kRunning
                                                                      : RowStatus::kMaxIterations);
  newton_update_row<float, float, L>(SerialTeam{}, u, slot, u.columns);
  RowStatus status = RowStatus(room.status[slot]);
  const bool moved = status == RowStatus::kRunning;
  if (moved) ++room.iterations[slot];
  if constexpr (P == MlpProduct::kCoarse) {
    // A step that failed is not taken; the row is looked at again exactly.
    const std::int64_t row = room.row[slot];
    const int d = p.dimension;
    for (int j = 0; j < d; ++j) {
      p.points[row * d + j] = moved ? room.points[slot * d + j] : p.start[row * d + j];
    }
    p.iterations[row] = room.iterations[slot];
    room.row[slot] = -1;
    return;
  }
  if (moved) return;
  if (status == RowStatus::kMaxIterations) {
    status = last_verdict(room.values + slot * L, room.level + slot * L, L,
                          room.points + slot * p.dimension, p.dimension, p.tol);
  }
  hand_over(p, room, slot, status);
}

// Rows that are done with one evaluation.
template <MlpProduct P>
__device__ LEVELSET_NOINLINE void end_rows(int width) {
  const MlpParams& p = parameters();
  const Room<P> room(p, width);
  const int slot = int(threadIdx.x);
  if (slot < room.rows && room.row[slot] >= 0) hand_over(p, room, slot, RowStatus::kRunning);
}

template <int W, MlpProduct P>
__global__ void __launch_bounds__(kMlpThreads, 2)
    mlp_newton_tiles(const __grid_constant__ MlpParams given) {
  for (int i = int(threadIdx.x); i < int(sizeof given / 4); i += kMlpThreads) {
    char* const to = reinterpret_cast<char*>(mlp_memory) + kMlpParamsAt;
    reinterpret_cast<int*>(to)[i] = reinterpret_cast<const int*>(&given)[i];
  }
  __syncthreads();
  const MlpParams& p = parameters();
  {
    const Room<P> room(p, W);
    const int slot = int(threadIdx.x);
    if (slot < room.rows) {
      room.row[slot] = -1;
      for (int j = 0; j < p.dimension; ++j) room.points[slot * p.dimension + j] = 0.0f;
    }
  }
  while (refill<P>(W)) {
    for (int k = 0; k + 1 < p.count; ++k) forward_layer<W, P>(k);
    __syncthreads();
    last_layer<P>(W);
    if (p.jacobian == nullptr) {
      __syncthreads();
      end_rows<P>(W);
      continue;
    }
    for (int o = 0; o < p.outputs; ++o) backward<W, P>(o);
    __syncthreads();
    p.outputs == 1 ? update_rows<P, 1>(W) : update_rows<P, 2>(W);
  }
}

}  // namespace

// The kernel for tiles of so many columns, or null.
template <MlpProduct P>
MlpKernel kernel_of(int width) {
  switch (width) {
    case 64: return mlp_newton_tiles<64, P>;
    case 128: return mlp_newton_tiles<128, P>;
    case 256: return mlp_newton_tiles<256, P>;
    case 512: return mlp_newton_tiles<512, P>;
    default: return nullptr;
  }
}

}  // namespace levelset::cuda
