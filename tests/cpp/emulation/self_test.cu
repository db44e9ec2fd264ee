// Kernels that are correct CUDA: nvcc compiles this file as it is, and under the emulator they must
// give the serial results in every order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "self_test.h"

namespace self_test {

// The dynamic shared memory of all kernels here: one name, one type, cast where it is used.
extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

constexpr unsigned all_lanes = 0xffffffffu;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error != cudaSuccess ? error : cudaGetLastError();
}

unsigned blocks_for(int n, int threads) {
  return static_cast<unsigned>((n + threads - 1) / threads);
}

template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(all_lanes, value, offset);
  return value;
}

__global__ void __launch_bounds__(block_threads)
    block_sum_kernel(const float* __restrict__ x, float* __restrict__ out, int n) {
  __shared__ float tile[block_threads];
  const unsigned t = threadIdx.x;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + t);
  tile[t] = i < n ? __ldg(x + i) : 0.0f;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (t < half) tile[t] += tile[t + half];
    __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = tile[0];
}

template <class T>
__global__ void warp_sum_kernel(const T* x, T* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const T sum = sum_of_warp(i < n ? x[i] : T(0));
  if (i < n && i % warpSize == 0) out[i / warpSize] = sum;
}

__global__ void compact_kernel(const float* x, float* out, int* count, int n) {
  __shared__ int warp_start[block_threads / 32 + 1];
  const int t = static_cast<int>(threadIdx.x), lane = t % 32, warp = t / 32;
  const int base = static_cast<int>(blockIdx.x) * block_threads;
  const float value = base + t < n ? x[base + t] : -1.0f;
  const unsigned kept = __ballot_sync(all_lanes, value > 0.0f);
  if (lane == 0) warp_start[warp + 1] = __popc(kept);
  __syncthreads();
  if (t == 0) {
    warp_start[0] = 0;
    for (int w = 0; w < block_threads / 32; ++w) warp_start[w + 1] += warp_start[w];
    count[blockIdx.x] = warp_start[block_threads / 32];
  }
  __syncthreads();
  if (value > 0.0f) out[base + warp_start[warp] + __popc(kept & ((1u << lane) - 1u))] = value;
}

// Double buffering: one barrier per step is enough.
__global__ void prefix_sum_kernel(const float* x, float* out, int n) {
  float* buffer = reinterpret_cast<float*>(dynamic_shared);
  const unsigned t = threadIdx.x;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + t);
  float* from = buffer;
  float* to = buffer + blockDim.x;
  from[t] = i < n ? x[i] : 0.0f;
  __syncthreads();
  for (unsigned offset = 1; offset < blockDim.x; offset *= 2) {
    to[t] = t >= offset ? from[t] + from[t - offset] : from[t];
    __syncthreads();
    float* const swap = from;
    from = to;
    to = swap;
  }
  if (i < n) out[i] = from[t];
}

__global__ void histogram_kernel(const int* x, int n, unsigned* bins, int n_bins, int* extremes) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  unsigned* local = reinterpret_cast<unsigned*>(dynamic_shared);
  for (int b = static_cast<int>(threadIdx.x); b < n_bins; b += static_cast<int>(blockDim.x))
    local[b] = 0;
  __syncthreads();
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    atomicAdd(&local[x[i] % n_bins], 1u);
    atomicMin(&extremes[0], x[i]);
    atomicMax(&extremes[1], x[i]);
  }
  __syncthreads();
  for (int b = static_cast<int>(threadIdx.x); b < n_bins; b += static_cast<int>(blockDim.x))
    atomicAdd(&bins[b], local[b]);
}

__global__ void last_block_sum_kernel(const int* x, int n, int* partial, unsigned* finished,
                                      int* total) {
  __shared__ int sum;
  __shared__ bool is_last;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < n;
       i += static_cast<int>(gridDim.x * blockDim.x))
    atomicAdd(&sum, x[i]);
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    int all = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) all += partial[b];
    *total = all;
  }
}

__global__ void transpose_kernel(const double* x, double* out, int rows, int columns) {
  __shared__ double tile[8][9];
  int column = static_cast<int>(blockIdx.x * 8 + threadIdx.x);
  int row = static_cast<int>(blockIdx.y * 8 + threadIdx.y);
  if (row < rows && column < columns)
    tile[threadIdx.y][threadIdx.x] = x[static_cast<size_t>(row) * columns + column];
  __syncthreads();
  column = static_cast<int>(blockIdx.y * 8 + threadIdx.x);
  row = static_cast<int>(blockIdx.x * 8 + threadIdx.y);
  if (row < columns && column < rows)
    out[static_cast<size_t>(row) * rows + column] = tile[threadIdx.x][threadIdx.y];
}

__global__ void coordinates_kernel(int* out, int nx, int ny, int nz) {
  const int x = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int y = static_cast<int>(blockIdx.y * blockDim.y + threadIdx.y);
  const int z = static_cast<int>(blockIdx.z * blockDim.z + threadIdx.z);
  if (x < nx && y < ny && z < nz) out[(z * ny + y) * nx + x] = x + 100 * y + 10000 * z;
}

__global__ void double_by_four_kernel(const float* x, float* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (4 * i >= n) return;
  const float4 v = reinterpret_cast<const float4*>(x)[i];
  reinterpret_cast<float4*>(out)[i] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
}

__global__ void round_trip_kernel(const float* x, float* half_out, float* bfloat_out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  half_out[i] = __half2float(__float2half(x[i]));
  bfloat_out[i] = __bfloat162float(__float2bfloat16(x[i]));
}

__global__ void warp_operations_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int facts[warp_facts];
  facts[0] = __shfl_sync(all_lanes, lane * 10, 5);
  facts[1] = __shfl_sync(all_lanes, lane, 3, 8);
  facts[2] = __shfl_up_sync(all_lanes, lane, 1u, 16);
  facts[3] = __shfl_down_sync(all_lanes, lane, 3u);
  facts[4] = __any_sync(all_lanes, lane == 31);
  facts[5] = __all_sync(all_lanes, lane < 31);
  facts[6] = static_cast<int>(__match_any_sync(all_lanes, lane % 4));
  facts[7] = __reduce_add_sync(all_lanes, lane);
  // The two halves of the warp part and vote among themselves.
  if (lane < 16)
    facts[8] = static_cast<int>(__ballot_sync(0x0000ffffu, lane % 2));
  else
    facts[8] = static_cast<int>(__ballot_sync(0xffff0000u, lane % 2));
  __syncwarp();
  facts[9] = static_cast<int>(__shfl_xor_sync(all_lanes, 0.5 * lane, 1) * 2);
  facts[10] = __shfl_sync(all_lanes, lane == 7 ? max(lane, 70) : min(lane, 0), 7);
  facts[11] = __clz(lane) + __ffs(lane);
  for (int f = 0; f < warp_facts; ++f) out[f * 32 + lane] = facts[f];
}

__global__ void turns_kernel(int* out, int* counter) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

__global__ void rank_in_block_kernel(const float* x, int* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int first = static_cast<int>(blockIdx.x * blockDim.x);
  const int last = min(first + static_cast<int>(blockDim.x), n);
  for (int j = first; j < last; ++j) {
    const int below = __syncthreads_count(i < n && x[i] < x[j]);
    if (i == j) out[j] = below;
  }
}

}  // namespace

cudaError_t block_sum(const float* x, float* out, int n, cudaStream_t stream) {
  return launch(block_sum_kernel, blocks_for(n, block_threads), block_threads, 0, stream, x, out,
                n);
}
template <class T>
cudaError_t warp_sum(const T* x, T* out, int n, cudaStream_t stream) {
  return launch(warp_sum_kernel<T>, blocks_for(n, block_threads), block_threads, 0, stream, x, out,
                n);
}
template cudaError_t warp_sum<float>(const float*, float*, int, cudaStream_t);
template cudaError_t warp_sum<double>(const double*, double*, int, cudaStream_t);
cudaError_t compact(const float* x, float* out, int* count, int n, cudaStream_t stream) {
  return launch(compact_kernel, blocks_for(n, block_threads), block_threads, 0, stream, x, out,
                count, n);
}
cudaError_t prefix_sum(const float* x, float* out, int n, int threads, cudaStream_t stream) {
  const size_t bytes = 2 * static_cast<size_t>(threads) * sizeof(float);
  return launch(prefix_sum_kernel, blocks_for(n, threads), static_cast<unsigned>(threads), bytes,
                stream, x, out, n);
}
cudaError_t histogram(const int* x, int n, unsigned* bins, int n_bins, int* extremes,
                      cudaStream_t stream) {
  return launch(histogram_kernel, 3, 64, static_cast<size_t>(n_bins) * sizeof(unsigned), stream, x,
                n, bins, n_bins, extremes);
}
cudaError_t last_block_sum(const int* x, int n, int* partial, unsigned* finished, int* total,
                           int blocks, cudaStream_t stream) {
  return launch(last_block_sum_kernel, static_cast<unsigned>(blocks), 64, 0, stream, x, n, partial,
                finished, total);
}
cudaError_t transpose(const double* x, double* out, int rows, int columns, cudaStream_t stream) {
  const dim3 grid(blocks_for(columns, 8), blocks_for(rows, 8));
  return launch(transpose_kernel, grid, dim3(8, 8), 0, stream, x, out, rows, columns);
}
cudaError_t coordinates(int* out, int nx, int ny, int nz, cudaStream_t stream) {
  const dim3 grid(blocks_for(nx, 4), blocks_for(ny, 2), blocks_for(nz, 3));
  return launch(coordinates_kernel, grid, dim3(4, 2, 3), 0, stream, out, nx, ny, nz);
}
cudaError_t double_by_four(const float* x, float* out, int n, cudaStream_t stream) {
  return launch(double_by_four_kernel, blocks_for(n / 4, 64), 64, 0, stream, x, out, n);
}
cudaError_t round_trip(const float* x, float* half_out, float* bfloat_out, int n,
                       cudaStream_t stream) {
  return launch(round_trip_kernel, blocks_for(n, 64), 64, 0, stream, x, half_out, bfloat_out, n);
}
cudaError_t warp_operations(int* out, cudaStream_t stream) {
  return launch(warp_operations_kernel, 1, 32, 0, stream, out);
}
cudaError_t turns(int* out, int* counter, int blocks, int threads, cudaStream_t stream) {
  return launch(turns_kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0,
                stream, out, counter);
}
cudaError_t rank_in_block(const float* x, int* out, int n, cudaStream_t stream) {
  return launch(rank_in_block_kernel, blocks_for(n, 64), 64, 0, stream, x, out, n);
}

}  // namespace self_test
