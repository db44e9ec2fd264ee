// Host side of the fused Newton kernel, and packing of parameters.
#include <algorithm>

#include "mlp_tiles.cuh"

namespace levelset::cuda {
namespace {

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

// The same for the matrices that are multiplied in bfloat16, one thread a pair: W^T and under it W.
__global__ void __launch_bounds__(kMlpThreads) mlp_pack_pairs(const MlpPackParams p) {
  const std::int64_t backward = mlp_padded((p.hidden + 1) / 2);
  const std::int64_t rows = backward + mlp_padded((p.outputs + 1) / 2);
  const std::int64_t step = std::int64_t(gridDim.x) * kMlpThreads;
  // Row r of W^T or of W, with zeros around it.
  const auto at = [&](bool transposed, std::int64_t r, std::int64_t c) {
    const std::int64_t row = transposed ? c : r, column = transposed ? r : c;
    const MlpMatrix& m = p.hidden_matrix;
    const bool inside = row < p.outputs && column < p.hidden;
    return inside ? m.at[row * m.row_stride + column * m.column_stride] : 0.0f;
  };
  for (std::int64_t i = std::int64_t(blockIdx.x) * kMlpThreads + threadIdx.x; i < rows * p.width;
       i += step) {
    const std::int64_t c = i % p.width, r = i / p.width;
    const bool forward = r < backward;
    const std::int64_t first = 2 * (forward ? r : r - backward);
    p.coarse[i] = to_bfloat16(at(forward, first, c), at(forward, first + 1, c));
  }
}

MlpKernel kernel_for(const MlpPlan& plan, MlpProduct product) {
  switch (product) {
    case MlpProduct::kFloat: return kernel_of<MlpProduct::kFloat>(plan.width);
    case MlpProduct::kTensor: return mlp_tensor_kernel(plan.width);
    case MlpProduct::kCoarse: return mlp_coarse_kernel(plan.width);
    default: return nullptr;
  }
}

int shared_bytes(const MlpParams& p, const MlpPlan& plan, MlpProduct product) {
  return mlp_room(plan.width, p.dimension, p.outputs, product).bytes;
}

template <typename Kernel>
cudaError_t pack(Kernel kernel, std::int64_t numbers, const MlpPackParams& p, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned((numbers + kMlpThreads - 1) / kMlpThreads));
  config.blockDim = dim3(kMlpThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

cudaError_t mlp_shared_memory(int device, int* bytes) {
  const cudaError_t error =
      cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes -= kMlpStaticBytes;
  return error;
}

cudaError_t mlp_tensor(const MlpParams& p, const MlpPlan& plan, bool* has) {
  int device = 0, capability = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  error = mlp_shared_memory(device, &most);
  if (error == cudaSuccess) *has = mlp_has_tensor(plan, p.dimension, p.outputs, capability, most);
  return error;
}

cudaError_t mlp_blocks(const MlpParams& p, const MlpPlan& plan, MlpProduct product,
                       std::int64_t* blocks) {
  const MlpKernel kernel = kernel_for(plan, product);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  int device = 0, processors = 0, each = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = mlp_shared_memory(device, &most);
  if (error != cudaSuccess) return error;
  const int bytes = shared_bytes(p, plan, product);
  if (bytes > most) return cudaErrorInvalidConfiguration;
  // Always the most there is: with what this launch needs, another thread could take back in
  // between what a larger launch has asked for.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error;
  // All of it as shared memory: the first cache is left with little, and has little to do.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  if (error != cudaSuccess) return error;
  error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kMlpThreads, std::size_t(bytes));
  if (error != cudaSuccess) return error;
  if (each == 0) return cudaErrorInvalidConfiguration;
  const std::int64_t rows = mlp_tile_rows(plan.width);
  *blocks = std::min<std::int64_t>((p.rows + rows - 1) / rows, std::int64_t(processors) * each);
  return cudaSuccess;
}

cudaError_t mlp_newton(const MlpParams& p, const MlpPlan& plan, MlpProduct product,
                       std::int64_t blocks, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const MlpKernel kernel = kernel_for(plan, product);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  const cudaError_t error = cudaMemsetAsync(p.next, 0, sizeof *p.next, stream);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kMlpThreads);
  config.dynamicSmemBytes = std::size_t(shared_bytes(p, plan, product));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p);
}

cudaError_t mlp_pack(const MlpPackParams& p, cudaStream_t stream) {
  const std::int64_t rows = 1 + p.inputs + mlp_padded(p.hidden) + mlp_padded(p.outputs);
  const cudaError_t error = pack(mlp_pack_layer, rows * p.width, p, stream);
  if (error != cudaSuccess || p.coarse == nullptr) return error;
  const std::int64_t pairs = mlp_padded((p.hidden + 1) / 2) + mlp_padded((p.outputs + 1) / 2);
  return pack(mlp_pack_pairs, pairs * p.width, p, stream);
}

}  // namespace levelset::cuda
