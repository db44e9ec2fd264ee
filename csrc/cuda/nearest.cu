// Exact nearest neighbours by brute force: every block holds a tile of the cloud in shared memory
// and passes its queries over it. Distances are sums of squared differences, never |x|^2 - 2xy +
// |y|^2, which cancels for points close to the cloud. No atomics: the parts of the cloud are
// reduced in a second kernel, and equal distances go to the smallest index, so a result has one
// value.
#include <algorithm>

#include "../core/limits.h"
#include "launch.h"

namespace levelset::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kQueriesPerThread = 2;  // every point read from shared memory serves two queries
constexpr int kQueriesPerBlock = kThreads * kQueriesPerThread;
constexpr int kTile = 512;

template <typename S>
struct Best {
  S distance = FloatRange<S>::largest;
  std::int64_t index = 0;

  __device__ void take(S candidate, std::int64_t candidate_index) {
    if (candidate < distance) {
      distance = candidate;
      index = candidate_index;
    }
  }
};

// Part blockIdx.y of the cloud against the queries of block blockIdx.x. D is the dimension.
template <typename S, int D>
__global__ void __launch_bounds__(kThreads) nearest_tiled(const NearestParams<S> p) {
  __shared__ S tile[kTile * D];
  const std::int64_t part = (p.cloud_size + p.splits - 1) / p.splits;
  const std::int64_t first = part * blockIdx.y;
  const std::int64_t last = min(first + part, p.cloud_size);
  const std::int64_t query = std::int64_t(blockIdx.x) * kQueriesPerBlock + threadIdx.x;

  S x[kQueriesPerThread][D];
  Best<S> best[kQueriesPerThread];
  for (int q = 0; q < kQueriesPerThread; ++q) {
    const std::int64_t row = min(query + q * kThreads, p.queries - 1);
    for (int k = 0; k < D; ++k) x[q][k] = p.query[row * D + k];
    best[q].index = min(first, p.cloud_size - 1);
  }
  for (std::int64_t start = first; start < last; start += kTile) {
    const int count = int(min(std::int64_t(kTile), last - start));
    for (int i = int(threadIdx.x); i < count * D; i += kThreads) tile[i] = p.cloud[start * D + i];
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      for (int q = 0; q < kQueriesPerThread; ++q) {
        S squares = S(0);
        for (int k = 0; k < D; ++k) {
          const S difference = x[q][k] - tile[i * D + k];
          squares += difference * difference;
        }
        best[q].take(squares, start + i);
      }
    }
    __syncthreads();
  }
  for (int q = 0; q < kQueriesPerThread; ++q) {
    const std::int64_t row = query + q * kThreads;
    if (row >= p.queries) continue;
    p.partial_distance[blockIdx.y * p.queries + row] = best[q].distance;
    p.partial_index[blockIdx.y * p.queries + row] = best[q].index;
  }
}

// The same for any dimension, straight from global memory.
template <typename S>
__global__ void __launch_bounds__(kThreads) nearest_any(const NearestParams<S> p) {
  const std::int64_t part = (p.cloud_size + p.splits - 1) / p.splits;
  const std::int64_t first = part * blockIdx.y;
  const std::int64_t last = min(first + part, p.cloud_size);
  const std::int64_t row = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.queries) return;
  Best<S> best;
  best.index = min(first, p.cloud_size - 1);
  for (std::int64_t i = first; i < last; ++i) {
    S squares = S(0);
    for (std::int64_t k = 0; k < p.dimension; ++k) {
      const S difference = p.query[row * p.dimension + k] - p.cloud[i * p.dimension + k];
      squares += difference * difference;
    }
    best.take(squares, i);
  }
  p.partial_distance[blockIdx.y * p.queries + row] = best.distance;
  p.partial_index[blockIdx.y * p.queries + row] = best.index;
}

// Parts come in the order of their indices, so the first of equal distances has the smallest index.
template <typename S>
__global__ void __launch_bounds__(kThreads) nearest_combine(const NearestParams<S> p) {
  const std::int64_t row = std::int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.queries) return;
  Best<S> best;
  best.index = p.partial_index[row];
  for (std::int64_t split = 0; split < p.splits; ++split) {
    best.take(p.partial_distance[split * p.queries + row],
              p.partial_index[split * p.queries + row]);
  }
  // A NaN query is no closer to anything: it keeps the first point and shows its NaN.
  S squares = S(0);
  for (std::int64_t k = 0; k < p.dimension; ++k) {
    const S difference = p.query[row * p.dimension + k] - p.cloud[best.index * p.dimension + k];
    squares += difference * difference;
  }
  p.distance[row] = sqrt(squares);
  p.index[row] = best.index;
}

template <typename Kernel, typename S>
cudaError_t enqueue(Kernel kernel, std::int64_t queries_per_block, std::int64_t splits,
                    const NearestParams<S>& p, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(unsigned((p.queries + queries_per_block - 1) / queries_per_block), unsigned(splits));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

std::int64_t nearest_splits(std::int64_t queries, std::int64_t cloud_size) {
  // About eight blocks on each of a large device's 132 multiprocessors, and a few tiles at least to
  // each part. The device is not asked, so that a result's scratch size depends on the shapes
  // alone.
  constexpr std::int64_t kBlocks = 1056, kMinPart = 4 * kTile, kMaxSplits = 4096;
  const std::int64_t blocks = (queries + kQueriesPerBlock - 1) / kQueriesPerBlock;
  const std::int64_t wanted = (kBlocks + blocks - 1) / std::max<std::int64_t>(blocks, 1);
  const std::int64_t possible = (cloud_size + kMinPart - 1) / kMinPart;
  return std::max<std::int64_t>(1, std::min({wanted, possible, kMaxSplits}));
}

template <typename S>
cudaError_t nearest(const NearestParams<S>& p, cudaStream_t stream) {
  if (p.queries == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  switch (p.dimension) {
    case 2: error = enqueue(nearest_tiled<S, 2>, kQueriesPerBlock, p.splits, p, stream); break;
    case 3: error = enqueue(nearest_tiled<S, 3>, kQueriesPerBlock, p.splits, p, stream); break;
    default: error = enqueue(nearest_any<S>, kThreads, p.splits, p, stream);
  }
  if (error != cudaSuccess) return error;
  return enqueue(nearest_combine<S>, kThreads, 1, p, stream);
}

template cudaError_t nearest(const NearestParams<float>&, cudaStream_t);
template cudaError_t nearest(const NearestParams<double>&, cudaStream_t);

}  // namespace levelset::cuda
