// Lets one header serve g++ and nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LEVELSET_HD __host__ __device__ __forceinline__
#define LEVELSET_NOINLINE __noinline__
#else
#define LEVELSET_HD inline
#define LEVELSET_NOINLINE __attribute__((noinline))
#endif
