#include "vector_kernels.h"

#include <cstdlib>
#include <string_view>

namespace levelset::cpu {

namespace {

std::string_view asked_for() {
  const char* asked = std::getenv("LEVELSET_ISA");
  return asked != nullptr ? asked : "";
}

// Whose AVX512-BF16 products of pairs take twice as long as float32 products: there is nothing to
// be gained.
bool intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

template <typename S>
const VectorKernels<S>& vector_kernels() {
  static const VectorKernels<S>* const chosen = [] {
    const std::string_view name = asked_for();
    if (name != "avx2" && name != "portable" && vector_kernels_avx512<S>()) {
      return vector_kernels_avx512<S>();
    }
    if (name != "portable" && vector_kernels_avx2<S>()) return vector_kernels_avx2<S>();
    return vector_kernels_portable<S>();
  }();
  return *chosen;
}

const CoarseKernels* coarse_kernels() {
  static const CoarseKernels* const chosen = [] {
    const VectorKernels<float>* const exact = &vector_kernels<float>();
    if (exact != vector_kernels_avx512<float>()) return static_cast<const CoarseKernels*>(nullptr);
    if (asked_for() == "avx512") return coarse_kernels_bf16();
    if (coarse_kernels_amx() != nullptr) return coarse_kernels_amx();
    return intel() ? nullptr : coarse_kernels_bf16();
  }();
  return chosen;
}

template const VectorKernels<float>& vector_kernels();
template const VectorKernels<double>& vector_kernels();

}  // namespace levelset::cpu
