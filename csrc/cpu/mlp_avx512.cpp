// The compiled fields' inner loops for x86 processors with 32 registers of 512 bits.
#include "mlp_kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma,prefer-vector-width=512")
#endif

#define LEVELSET_VECTOR_BYTES 64
#define LEVELSET_BLOCK_ROWS 14
#include "mlp_kernels.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace levelset::cpu {

template <typename S>
const MlpKernels<S>* mlp_kernels_avx512() {
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("fma");
  return here ? &kKernels<S> : nullptr;
}

#else

namespace levelset::cpu {

template <typename S>
const MlpKernels<S>* mlp_kernels_avx512() {
  return nullptr;
}

#endif

template const MlpKernels<float>* mlp_kernels_avx512();
template const MlpKernels<double>* mlp_kernels_avx512();

}  // namespace levelset::cpu
