// 16-bit storage types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../core/storage.h"

namespace levelset {

template <>
struct Storage<__half> {
  using Arithmetic = float;
  static LEVELSET_HD float load(__half x) { return __half2float(x); }
  static LEVELSET_HD __half store(float x) { return __float2half(x); }
};

template <>
struct Storage<__nv_bfloat16> {
  using Arithmetic = float;
  static LEVELSET_HD float load(__nv_bfloat16 x) { return __bfloat162float(x); }
  static LEVELSET_HD __nv_bfloat16 store(float x) { return __float2bfloat16(x); }
};

}  // namespace levelset
