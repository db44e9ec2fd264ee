// Inner loops for x86 processors with 32 registers of 512 bits.
#include "vector_kernels.h"

#if defined(__x86_64__)
// The compiler's own header reads a variable that it means to leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,prefer-vector-width=512")
#endif

#define LEVELSET_VECTOR_BYTES 64
#define LEVELSET_BLOCK_ROWS 14
#define LEVELSET_SQUARE_ROOT_FLOAT(x) _mm512_sqrt_ps(x)
#define LEVELSET_SQUARE_ROOT_DOUBLE(x) _mm512_sqrt_pd(x)
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
const VectorKernels<S>* vector_kernels_avx512() {
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("fma");
  return here ? &kKernels<S> : nullptr;
}

#else

namespace levelset::cpu {

template <typename S>
const VectorKernels<S>* vector_kernels_avx512() {
  return nullptr;
}

#endif

template const VectorKernels<float>* vector_kernels_avx512();
template const VectorKernels<double>* vector_kernels_avx512();

}  // namespace levelset::cpu
