// Inner loops for x86 processors with 32 registers of 512 bits.
#if defined(__clang__)
#define LEVELSET_TARGET "avx512f,avx512dq,avx512vl,avx512bw,fma"
#else
#define LEVELSET_TARGET "avx512f,avx512dq,avx512vl,avx512bw,fma,prefer-vector-width=512"
#endif
#define LEVELSET_SUPPORTED                                                        \
  __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&      \
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && \
      __builtin_cpu_supports("fma")
#define LEVELSET_KERNELS vector_kernels_avx512
#define LEVELSET_VECTOR_BYTES 64
#define LEVELSET_BLOCK_ROWS 14
#define LEVELSET_SQUARE_ROOT_FLOAT(x) _mm512_sqrt_ps(x)
#define LEVELSET_SQUARE_ROOT_DOUBLE(x) _mm512_sqrt_pd(x)
#include "vector_x86.inc"
