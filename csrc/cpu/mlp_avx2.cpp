// The compiled fields' inner loops for x86 processors with 16 registers of 256 bits.
#include "mlp_kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define LEVELSET_VECTOR_BYTES 32
#define LEVELSET_BLOCK_ROWS 6
#include "mlp_kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace levelset::cpu {

template <typename S>
const MlpKernels<S>* mlp_kernels_avx2() {
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return here ? &kKernels<S> : nullptr;
}

#else

namespace levelset::cpu {

template <typename S>
const MlpKernels<S>* mlp_kernels_avx2() {
  return nullptr;
}

#endif

template const MlpKernels<float>* mlp_kernels_avx2();
template const MlpKernels<double>* mlp_kernels_avx2();

}  // namespace levelset::cpu
