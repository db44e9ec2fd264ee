// Newton's iteration on a multilayer perceptron, fused into one launch: a block holds a tile of
// rows, evaluates F and D_xF of all of them layer by layer, updates them, and gives the slot of a
// row that is done to the next one that waits. Rows are handed out by a counter in global memory;
// what becomes of a row depends neither on its slot nor on the rows beside it.
#include <algorithm>

#include "../core/activation.h"
#include "../core/newton_row.h"
#include "launch.h"
#include "mlp_products.cuh"
#include "team.cuh"

namespace levelset::cuda {

extern __shared__ float4 mlp_memory[];  // float4 for its alignment

namespace {

// The launch's parameters, copied to shared memory: no phase has to be handed a pointer to them.
__device__ __forceinline__ const MlpParams& parameters() {
  return *reinterpret_cast<const MlpParams*>(reinterpret_cast<char*>(mlp_memory) + kMlpParamsAt);
}
static_assert(sizeof(MlpParams) <= kMlpParamBytes && sizeof(MlpParams) % 4 == 0);

// The block's part of shared memory. Made anew in every phase: what is kept over a phase would take
// registers from the sums.
struct Room {
  int rows;
  float *tile, *panels, *points, *values, *jacobian, *level;
  std::int64_t* row;
  std::int32_t* iterations;
  std::int8_t* status;

  __device__ __forceinline__ Room(const MlpParams& p, int width) {
    const MlpRoom room = mlp_room(width, p.dimension, p.outputs);
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
};

// Four slopes of hidden layer k, `part` of the thread's 16 (see MlpThread::place), in global
// memory. A thread reads only what it wrote itself.
__device__ __forceinline__ float4& slope(const MlpParams& p, int k, int part) {
  const std::int64_t layer = std::int64_t(blockIdx.x) * (p.count - 1) + k;
  return reinterpret_cast<float4*>(p.slopes)[(layer * 16 + part) * kMlpThreads + threadIdx.x];
}

// The pre-activations of hidden layer k in the tile become h_k, and leave their slopes.
template <int W>
__device__ LEVELSET_NOINLINE void activate_tile(int k) {
  const MlpParams& p = parameters();
  const Room room(p, W);
  const MlpThread<W> own;
  const MlpLayer& layer = p.layers[k];
  const Activation activation = layer.activation;
  const float sharpness = float(layer.sharpness), threshold = float(layer.threshold);
  // Not unrolled: sixteen copies of every activation would not fit the instruction cache.
#pragma unroll 1
  for (int part = 0; part < 16; ++part) {
    float* const z = own.place(room.tile, part);
    float a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) activate(activation, sharpness, threshold, z[i], a[i]);
    if (p.jacobian != nullptr) slope(p, k, part) = make_float4(a[0], a[1], a[2], a[3]);
  }
}

// h_k of a hidden layer takes the place of h_{k-1} in the tile.
template <int W>
__device__ LEVELSET_NOINLINE void forward_layer(int k) {
  const MlpParams& p = parameters();
  const Room room(p, W);
  const MlpThread<W> own;
  const MlpLayer& layer = p.layers[k];
  const float* matrix = p.packed + layer.forward_at;
  MlpSums sums;
  sums.fill(Eight::load(p.packed + layer.bias_at + own.column, W / 2));
  if (layer.inputs > 0) multiply_points(own, room.points, matrix, p.dimension, sums);
  if (layer.hidden > 0) {
    multiply_tile(own, room.tile, room.panels, matrix + layer.inputs * W, int(layer.hidden), sums);
  }
  own.store(sums, room.tile);
  if (layer.activation != Activation::kNone) activate_tile<W>(k);
}

// sums, the gradient with respect to h_k, become delta_k in the tile.
template <int W>
__device__ __forceinline__ void store_delta(const MlpParams& p, const MlpThread<W>& own, int k,
                                            float* tile, MlpSums& sums) {
  if (p.layers[k].activation != Activation::kNone) {
#pragma unroll
    for (int part = 0; part < 16; ++part) {
      const float4 a = slope(p, k, part);
      float* const x = sums.at[part / 2] + part % 2 * 4;
      x[0] *= a.x;
      x[1] *= a.y;
      x[2] *= a.z;
      x[3] *= a.w;
    }
  }
  own.store(sums, tile);
}

// delta of the last hidden layer, for one output.
template <int W>
__device__ LEVELSET_NOINLINE void seed_deltas(int output) {
  const MlpParams& p = parameters();
  const MlpThread<W> own;
  MlpSums sums;
  sums.fill(
      Eight::load(p.packed + p.layers[p.count - 1].backward_at + output * W + own.column, W / 2));
  store_delta(p, own, p.count - 2, Room(p, W).tile, sums);
}

// delta_{k-1} takes the place of delta_k in the tile.
template <int W>
__device__ LEVELSET_NOINLINE void backward_layer(int k) {
  const MlpParams& p = parameters();
  const Room room(p, W);
  const MlpThread<W> own;
  const MlpLayer& layer = p.layers[k];
  MlpSums sums;
  sums.fill(Eight{});
  multiply_tile(own, room.tile, room.panels, p.packed + layer.backward_at, int(layer.outputs),
                sums);
  store_delta(p, own, k - 1, room.tile, sums);
}

// F of every row; the last hidden layer has left h in the tile.
__device__ LEVELSET_NOINLINE void last_layer(int width) {
  const MlpParams& p = parameters();
  const Room room(p, width);
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
      sum += dot_with_tile(room.tile, room.rows, r, hidden + o * width, int(layer.hidden));
    }
    room.values[r * p.outputs + o] = sum;
  }
}

// What layer k adds to D_xF of one output through U_k; the last layer comes first and has no
// deltas.
__device__ LEVELSET_NOINLINE void add_to_jacobian(int width, int k, int output) {
  const MlpParams& p = parameters();
  const Room room(p, width);
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
      to += dot_with_tile(room.tile, room.rows, r, column, int(layer.outputs));
    }
  }
}

// D_xF of one output.
template <int W>
__device__ __forceinline__ void backward(int output) {
  const MlpParams& p = parameters();
  int k = p.count - 1;
  add_to_jacobian(W, k, output);
  if (p.layers[k].hidden == 0) return;
  __syncthreads();  // until now the tile was being read
  seed_deltas<W>(output);
  for (--k;; --k) {
    __syncthreads();
    if (p.layers[k].inputs > 0) add_to_jacobian(W, k, output);
    if (p.layers[k].hidden == 0) return;
    backward_layer<W>(k);
  }
}

// Gives every free slot a row that waits; false where no slot has one.
__device__ LEVELSET_NOINLINE bool refill(int width) {
  const MlpParams& p = parameters();
  __shared__ int wanted[kMlpThreads / kWarpSize];
  __shared__ long long first;
  static_assert(sizeof wanted + sizeof first <= kMlpStaticBytes);
  const Room room(p, width);
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
      room.iterations[slot] = 0;
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
__device__ __forceinline__ void hand_over(const MlpParams& p, const Room& room, int slot,
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
template <int L>
__device__ LEVELSET_NOINLINE void update_rows(int width) {
  const MlpParams& p = parameters();
  const Room room(p, width);
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
  u.tol = p.tol;
  u.max_step = p.max_step;
  // A row that has no update left keeps its point.
  room.status[slot] = std::int8_t(room.iterations[slot] < p.max_iters ? RowStatus::kRunning
                                                                      : RowStatus::kMaxIterations);
  newton_update_row<float, float, L>(SerialTeam{}, u, slot, u.columns);
  RowStatus status = RowStatus(room.status[slot]);
  if (status == RowStatus::kRunning) {
    ++room.iterations[slot];
    return;
  }
  if (status == RowStatus::kMaxIterations) {
    status = last_verdict(room.values + slot * L, room.level + slot * L, L,
                          room.points + slot * p.dimension, p.dimension, p.tol);
  }
  hand_over(p, room, slot, status);
}

// Rows that are done with one evaluation.
__device__ LEVELSET_NOINLINE void end_rows(int width) {
  const MlpParams& p = parameters();
  const Room room(p, width);
  const int slot = int(threadIdx.x);
  if (slot < room.rows && room.row[slot] >= 0) hand_over(p, room, slot, RowStatus::kRunning);
}

template <int W>
__global__ void __launch_bounds__(kMlpThreads, 2)
    mlp_newton_tiles(const __grid_constant__ MlpParams given) {
  for (int i = int(threadIdx.x); i < int(sizeof given / 4); i += kMlpThreads) {
    char* const to = reinterpret_cast<char*>(mlp_memory) + kMlpParamsAt;
    reinterpret_cast<int*>(to)[i] = reinterpret_cast<const int*>(&given)[i];
  }
  __syncthreads();
  const MlpParams& p = parameters();
  {
    const Room room(p, W);
    const int slot = int(threadIdx.x);
    if (slot < room.rows) {
      room.row[slot] = -1;
      for (int j = 0; j < p.dimension; ++j) room.points[slot * p.dimension + j] = 0.0f;
    }
  }
  while (refill(W)) {
    for (int k = 0; k + 1 < p.count; ++k) forward_layer<W>(k);
    __syncthreads();
    last_layer(W);
    if (p.jacobian == nullptr) {
      __syncthreads();
      end_rows(W);
      continue;
    }
    for (int o = 0; o < p.outputs; ++o) backward<W>(o);
    __syncthreads();
    p.outputs == 1 ? update_rows<1>(W) : update_rows<2>(W);
  }
}

// One thread an element of the packed layer: the bias, U^T, W^T and W below each other.
__global__ void __launch_bounds__(kMlpThreads) mlp_pack_layer(const MlpPackParams p) {
  const std::int64_t backward = 1 + p.inputs + mlp_padded(p.hidden);
  const std::int64_t rows = backward + (p.hidden > 0 ? mlp_padded(p.outputs) : 0);
  const std::int64_t step = std::int64_t(gridDim.x) * kMlpThreads;
  const auto at = [](const MlpMatrix& m, std::int64_t row, std::int64_t column) {
    return m.at[row * m.row_stride + column * m.column_stride];
  };
  for (std::int64_t i = std::int64_t(blockIdx.x) * kMlpThreads + threadIdx.x; i < rows * p.width;
       i += step) {
    const std::int64_t c = i % p.width;
    std::int64_t r = i / p.width;
    float x = 0.0f;
    if (r >= backward) {
      r -= backward;
      if (r < p.outputs && c < p.hidden) x = at(p.hidden_matrix, r, c);
    } else if (c < p.outputs) {
      if (r == 0) {
        if (p.bias != nullptr) x = p.bias[c * p.bias_stride];
      } else if (r <= p.inputs) {
        x = at(p.input_matrix, c, r - 1);
      } else if (r - 1 - p.inputs < p.hidden) {
        x = at(p.hidden_matrix, c, r - 1 - p.inputs);
      }
    }
    p.packed[i] = x;
  }
}

// Calls run(kernel) with the kernel for tiles of so many columns.
template <typename Run>
cudaError_t with_kernel(int width, Run run) {
  switch (width) {
    case 64: return run(mlp_newton_tiles<64>);
    case 128: return run(mlp_newton_tiles<128>);
    case 256: return run(mlp_newton_tiles<256>);
    case 512: return run(mlp_newton_tiles<512>);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t mlp_shared_memory(int device, int* bytes) {
  const cudaError_t error =
      cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes -= kMlpStaticBytes;
  return error;
}

cudaError_t mlp_blocks(const MlpPlan& plan, std::int64_t rows, std::int64_t* blocks) {
  return with_kernel(plan.width, [&](auto kernel) {
    int device = 0, processors = 0, each = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    error = mlp_shared_memory(device, &most);
    if (error != cudaSuccess) return error;
    if (plan.shared_bytes > most) return cudaErrorInvalidConfiguration;
    // Always the most there is: with what this launch needs, another thread could take back in
    // between what a larger launch has asked for.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
    // All of it as shared memory: the first cache is left with little, and has little to do.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    if (error != cudaSuccess) return error;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kMlpThreads,
                                                          std::size_t(plan.shared_bytes));
    if (error != cudaSuccess) return error;
    const std::int64_t wanted = (rows + mlp_tile_rows(plan.width) - 1) / mlp_tile_rows(plan.width);
    if (each == 0) return cudaErrorInvalidConfiguration;
    *blocks = std::min<std::int64_t>(wanted, std::int64_t(processors) * each);
    return cudaSuccess;
  });
}

cudaError_t mlp_newton(const MlpParams& p, const MlpPlan& plan, std::int64_t blocks,
                       cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const cudaError_t error = cudaMemsetAsync(p.next, 0, sizeof *p.next, stream);
  if (error != cudaSuccess) return error;
  return with_kernel(plan.width, [&](auto kernel) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(kMlpThreads);
    config.dynamicSmemBytes = std::size_t(plan.shared_bytes);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, p);
  });
}

cudaError_t mlp_pack(const MlpPackParams& p, cudaStream_t stream) {
  const std::int64_t numbers =
      (1 + p.inputs + mlp_padded(p.hidden) + mlp_padded(p.outputs)) * p.width;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned((numbers + kMlpThreads - 1) / kMlpThreads));
  config.blockDim = dim3(kMlpThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, mlp_pack_layer, p);
}

}  // namespace levelset::cuda
