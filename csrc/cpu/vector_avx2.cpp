// Inner loops for x86 processors with 16 registers of 256 bits.
#include "vector_kernels.h"

#if defined(__x86_64__)
// The compiler's own header reads a variable that it means to leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define LEVELSET_VECTOR_BYTES 32
#define LEVELSET_BLOCK_ROWS 6
#define LEVELSET_SQUARE_ROOT_FLOAT(x) _mm256_sqrt_ps(x)
#define LEVELSET_SQUARE_ROOT_DOUBLE(x) _mm256_sqrt_pd(x)
#include "mlp_kernels.inc"
#include "newton_kernels.inc"
#include "vector_table.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace levelset::cpu {

template <typename S>
const VectorKernels<S>* vector_kernels_avx2() {
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return here ? &kKernels<S> : nullptr;
}

#else

namespace levelset::cpu {

template <typename S>
const VectorKernels<S>* vector_kernels_avx2() {
  return nullptr;
}

#endif

template const VectorKernels<float>* vector_kernels_avx2();
template const VectorKernels<double>* vector_kernels_avx2();

}  // namespace levelset::cpu
