// The compiled fields' inner loops for vectors of 128 bits, which every supported processor has.
#include "mlp_kernels.h"

#define LEVELSET_VECTOR_BYTES 16
#if defined(__aarch64__)
#define LEVELSET_BLOCK_ROWS 12
#else
#define LEVELSET_BLOCK_ROWS 6
#endif
#include "mlp_kernels.inc"

namespace levelset::cpu {

template <typename S>
const MlpKernels<S>* mlp_kernels_portable() {
  return &kKernels<S>;
}

template const MlpKernels<float>* mlp_kernels_portable();
template const MlpKernels<double>* mlp_kernels_portable();

}  // namespace levelset::cpu
