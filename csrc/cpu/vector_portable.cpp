// Inner loops for vectors of 128 bits, which every supported processor has.
#include "vector_kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__x86_64__)
#include <emmintrin.h>
#endif

#define LEVELSET_VECTOR_BYTES 16
#if defined(__aarch64__)
#define LEVELSET_BLOCK_ROWS 12
#else
#define LEVELSET_BLOCK_ROWS 6
#endif
#if defined(__aarch64__)
#define LEVELSET_SQUARE_ROOT_FLOAT(x) vsqrtq_f32(x)
#define LEVELSET_SQUARE_ROOT_DOUBLE(x) vsqrtq_f64(x)
#elif defined(__x86_64__)
#define LEVELSET_SQUARE_ROOT_FLOAT(x) _mm_sqrt_ps(x)
#define LEVELSET_SQUARE_ROOT_DOUBLE(x) _mm_sqrt_pd(x)
#endif
#include "lanes.inc"
#include "mlp_kernels.inc"
#include "row_kernels.inc"
#include "segment_kernels.inc"
#include "vector_table.inc"

namespace levelset::cpu {

template <typename S>
const VectorKernels<S>* vector_kernels_portable() {
  return &kKernels<S>;
}

template const VectorKernels<float>* vector_kernels_portable();
template const VectorKernels<double>* vector_kernels_portable();

}  // namespace levelset::cpu
