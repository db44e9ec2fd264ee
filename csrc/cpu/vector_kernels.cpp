#include "vector_kernels.h"

#include <cstdlib>
#include <string_view>

namespace levelset::cpu {

template <typename S>
const VectorKernels<S>& vector_kernels() {
  static const VectorKernels<S>* const chosen = [] {
    const char* asked = std::getenv("LEVELSET_ISA");
    const std::string_view name = asked != nullptr ? asked : "";
    if (name != "avx2" && name != "portable" && vector_kernels_avx512<S>()) {
      return vector_kernels_avx512<S>();
    }
    if (name != "portable" && vector_kernels_avx2<S>()) return vector_kernels_avx2<S>();
    return vector_kernels_portable<S>();
  }();
  return *chosen;
}

template const VectorKernels<float>& vector_kernels();
template const VectorKernels<double>& vector_kernels();

}  // namespace levelset::cpu
