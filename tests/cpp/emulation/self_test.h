// Launchers of self_test.cu: all pointers are device pointers.
#pragma once

#include <cuda_runtime.h>

namespace self_test {

constexpr int block_threads = 256;

// out[b] = sum of the b-th block_threads of x (n values)
cudaError_t block_sum(const float* x, float* out, int n, cudaStream_t stream);
// out[w] = sum of the w-th 32 values of x; n is a multiple of 32
template <class T>
cudaError_t warp_sum(const T* x, T* out, int n, cudaStream_t stream);
// Positive values of each block, in order, to the front of the block's part of out; count[b] of
// them.
cudaError_t compact(const float* x, float* out, int* count, int n, cudaStream_t stream);
// out[i] = inclusive prefix sum within each block; blocks of `threads` with dynamic shared memory
cudaError_t prefix_sum(const float* x, float* out, int n, int threads, cudaStream_t stream);
// bins[x[i] % n_bins] += 1; extremes = {min, max} of x
cudaError_t histogram(const int* x, int n, unsigned* bins, int n_bins, int* extremes,
                      cudaStream_t stream);
// total = sum of x, added up by the block that finishes last; finished must be zero
cudaError_t last_block_sum(const int* x, int n, int* partial, unsigned* finished, int* total,
                           int blocks, cudaStream_t stream);
// out (columns, rows) = transpose of x (rows, columns), both row-major; tiles of 8 x 8
cudaError_t transpose(const double* x, double* out, int rows, int columns, cudaStream_t stream);
// out[z][y][x] = x + 100 y + 10000 z over a grid and a block with three dimensions
cudaError_t coordinates(int* out, int nx, int ny, int nz, cudaStream_t stream);
// out[i] = 2 x[i], through float4 loads; n is a multiple of 4
cudaError_t double_by_four(const float* x, float* out, int n, cudaStream_t stream);
// out[i] = x[i] rounded to half, and to bfloat16
cudaError_t round_trip(const float* x, float* half_out, float* bfloat_out, int n,
                       cudaStream_t stream);
// Shuffles, votes and reductions over parts of a warp, one number each, 32 lanes; see the kernel.
constexpr int warp_facts = 12;
cudaError_t warp_operations(int* out, cudaStream_t stream);
// out[i] = how many threads of the grid came before thread i; counter must be zero
cudaError_t turns(int* out, int* counter, int blocks, int threads, cudaStream_t stream);
// out[i] = how many of the block's values are below x[i], by __syncthreads_count
cudaError_t rank_in_block(const float* x, int* out, int n, cudaStream_t stream);

}  // namespace self_test
