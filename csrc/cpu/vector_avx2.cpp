// Inner loops for x86 processors with 16 registers of 256 bits.
#define LEVELSET_TARGET "avx2,fma"
#define LEVELSET_SUPPORTED __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
#define LEVELSET_KERNELS vector_kernels_avx2
#define LEVELSET_VECTOR_BYTES 32
#define LEVELSET_BLOCK_ROWS 6
#define LEVELSET_SQUARE_ROOT_FLOAT(x) _mm256_sqrt_ps(x)
#define LEVELSET_SQUARE_ROOT_DOUBLE(x) _mm256_sqrt_pd(x)
#include "vector_x86.inc"
