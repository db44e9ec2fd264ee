// Stands in for the toolkit's cuda_runtime.h when g++ compiles a .cu file for the emulator. Only
// what the project's kernels and launchers use; a name that is missing here is a compile error,
// never a silent difference.
#pragma once

#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include <cassert>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../engine.h"
#include "vector_types.h"

// ---------------------------------------------------------------------------------------------
// Language
// ---------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// thread_local is the one storage class that is static inside a function and may follow `extern`.
// The alignment tells the engine which variables are shared memory.
#define __shared__ thread_local __attribute__((aligned(EMULATION_SHARED_ALIGNMENT)))

inline constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------
// Barriers and warp operations. The defaulted last argument is evaluated at the call: it is the
// source line that messages name.
// ---------------------------------------------------------------------------------------------

#define EMULATION_SITE ::emulation::Site site_ = {__builtin_FILE(), __builtin_LINE()}
#define EMULATION_ALL_LANES 0xffffffffu

inline void __syncthreads(EMULATION_SITE) {
  emulation::engine().barrier("__syncthreads", false, site_);
}
inline int __syncthreads_count(int predicate, EMULATION_SITE) {
  return emulation::engine().barrier("__syncthreads_count", predicate != 0, site_);
}
inline int __syncthreads_or(int predicate, EMULATION_SITE) {
  return emulation::engine().barrier("__syncthreads_or", predicate != 0, site_) > 0;
}
inline int __syncthreads_and(int predicate, EMULATION_SITE) {
  return emulation::engine().barrier("__syncthreads_and", predicate == 0, site_) == 0;
}
inline void __syncwarp(unsigned mask = EMULATION_ALL_LANES, EMULATION_SITE) {
  // Unlike the operations below it may name lanes that have exited: its default names all 32.
  emulation::engine().exchange("__syncwarp", 0, mask, 0, site_, true);
}

namespace emulation {

inline unsigned lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warp_size;
}

// source: the lane to read, or a negative number for the calling lane.
template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source, int width, Site site) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "shuffles move 8 bytes");
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    engine().trap("shuffle: width is not a power of two up to 32", site);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const unsigned from = source < 0 ? lane() : static_cast<unsigned>(source);
  const unsigned variant = static_cast<unsigned>(sizeof(T)) << 8 | static_cast<unsigned>(width);
  bits = engine().exchange(operation, variant, mask, bits, site)[from];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned ballot(const char* operation, unsigned mask, bool predicate, Site site) {
  const std::uint64_t* values = engine().exchange(operation, 0, mask, predicate ? 1 : 0, site);
  unsigned votes = 0;
  for (unsigned i = 0; i < warp_size; ++i)
    if ((mask >> i & 1u) != 0 && values[i] != 0) votes |= 1u << i;
  return votes;
}

template <class T, class Combine>
T reduce(const char* operation, unsigned mask, T value, Site site, Combine combine) {
  const std::uint64_t* values =
      engine().exchange(operation, 0, mask, static_cast<std::uint64_t>(value), site);
  bool first = true;
  for (unsigned i = 0; i < warp_size; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    value = first ? static_cast<T>(values[i]) : combine(value, static_cast<T>(values[i]));
    first = false;
  }
  return value;
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, EMULATION_SITE) {
  const int segment = static_cast<int>(emulation::lane()) & ~(width - 1);
  return emulation::shuffle("__shfl_sync", mask, value, segment + (source & (width - 1)), width,
                            site_);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATION_SITE) {
  const int lane = static_cast<int>(emulation::lane());
  const int source = lane - static_cast<int>(delta);
  return emulation::shuffle("__shfl_up_sync", mask, value,
                            source < (lane & ~(width - 1)) ? -1 : source, width, site_);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, EMULATION_SITE) {
  const int lane = static_cast<int>(emulation::lane());
  const int source = lane + static_cast<int>(delta);
  return emulation::shuffle("__shfl_down_sync", mask, value,
                            source >= (lane & ~(width - 1)) + width ? -1 : source, width, site_);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, EMULATION_SITE) {
  const int lane = static_cast<int>(emulation::lane());
  const int source = lane ^ lanes;
  // A later segment is out of reach, an earlier one is not; so the hardware defines it.
  return emulation::shuffle("__shfl_xor_sync", mask, value,
                            source >= (lane & ~(width - 1)) + width ? -1 : source, width, site_);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return emulation::ballot("__ballot_sync", mask, predicate != 0, site_);
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return emulation::ballot("__any_sync", mask, predicate != 0, site_) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return emulation::ballot("__all_sync", mask, predicate == 0, site_) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATION_SITE) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const std::uint64_t* values =
      emulation::engine().exchange("__match_any_sync", sizeof(T), mask, bits, site_);
  unsigned equal = 0;
  for (unsigned i = 0; i < emulation::warp_size; ++i)
    if ((mask >> i & 1u) != 0 && values[i] == bits) equal |= 1u << i;
  return equal;
}

#define EMULATION_REDUCE(name, T, expression)                                      \
  inline T name(unsigned mask, T value, EMULATION_SITE) {                          \
    return emulation::reduce(#name, mask, value, site_,                            \
                             [](T a, T b) { return static_cast<T>(expression); }); \
  }
EMULATION_REDUCE(__reduce_add_sync, unsigned, a + b)
EMULATION_REDUCE(__reduce_add_sync, int, unsigned(a) + unsigned(b))
EMULATION_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMULATION_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMULATION_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMULATION_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMULATION_REDUCE(__reduce_and_sync, unsigned, a& b)
EMULATION_REDUCE(__reduce_or_sync, unsigned, a | b)
EMULATION_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef EMULATION_REDUCE

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { emulation::engine().maybe_spinning(); }
[[noreturn]] inline void __trap(EMULATION_SITE) { emulation::engine().trap("__trap", site_); }

// ---------------------------------------------------------------------------------------------
// Atomics. Nothing is preempted, so an ordinary read and write is atomic. Arithmetic wraps.
// ---------------------------------------------------------------------------------------------

namespace emulation {

template <class T, class Update>
T atomic(T* address, Update update) {
  engine().maybe_spinning();
  const T old = *address;
  *address = update(old);
  return old;
}

template <class T>
T wrapping_add(T a, T b) {
  if constexpr (std::is_integral<T>::value) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
  } else {
    return a + b;
  }
}

}  // namespace emulation

// Overloads and not templates, so that an argument of another type converts as it does in CUDA.
#define EMULATION_ATOMIC(name, T, expression)                                             \
  inline T name(T* address, T value) {                                                    \
    return emulation::atomic(address, [&](T old) { return static_cast<T>(expression); }); \
  }
#define EMULATION_ATOMIC_32_64(name, expression) \
  EMULATION_ATOMIC(name, int, expression)        \
  EMULATION_ATOMIC(name, unsigned, expression)   \
  EMULATION_ATOMIC(name, unsigned long long, expression)
EMULATION_ATOMIC_32_64(atomicAdd, emulation::wrapping_add(old, value))
EMULATION_ATOMIC(atomicAdd, float, old + value)
EMULATION_ATOMIC(atomicAdd, double, old + value)
EMULATION_ATOMIC(atomicSub, int, unsigned(old) - unsigned(value))
EMULATION_ATOMIC(atomicSub, unsigned, old - value)
EMULATION_ATOMIC_32_64(atomicExch, ((void)old, value))
EMULATION_ATOMIC(atomicExch, float, ((void)old, value))
EMULATION_ATOMIC_32_64(atomicMin, value < old ? value : old)
EMULATION_ATOMIC(atomicMin, long long, value < old ? value : old)
EMULATION_ATOMIC_32_64(atomicMax, value > old ? value : old)
EMULATION_ATOMIC(atomicMax, long long, value > old ? value : old)
EMULATION_ATOMIC_32_64(atomicAnd, old& value)
EMULATION_ATOMIC_32_64(atomicOr, old | value)
EMULATION_ATOMIC_32_64(atomicXor, old ^ value)
EMULATION_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
EMULATION_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
#undef EMULATION_ATOMIC_32_64
#undef EMULATION_ATOMIC

#define EMULATION_ATOMIC_CAS(T)                                                             \
  inline T atomicCAS(T* address, T compare, T value) {                                      \
    return emulation::atomic(address, [&](T old) { return old == compare ? value : old; }); \
  }
EMULATION_ATOMIC_CAS(int)
EMULATION_ATOMIC_CAS(unsigned)
EMULATION_ATOMIC_CAS(unsigned short)
EMULATION_ATOMIC_CAS(unsigned long long)
#undef EMULATION_ATOMIC_CAS

// ---------------------------------------------------------------------------------------------
// Arithmetic and bits. math.h already gives sqrtf, fma, isfinite and the like.
// ---------------------------------------------------------------------------------------------

#define EMULATION_MIN_MAX(A, B)                                                           \
  inline std::common_type_t<A, B> min(A a, B b) {                                         \
    using T = std::common_type_t<A, B>;                                                   \
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b); \
  }                                                                                       \
  inline std::common_type_t<A, B> max(A a, B b) {                                         \
    using T = std::common_type_t<A, B>;                                                   \
    return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b); \
  }
EMULATION_MIN_MAX(int, int)
EMULATION_MIN_MAX(unsigned, unsigned)
EMULATION_MIN_MAX(int, unsigned)
EMULATION_MIN_MAX(unsigned, int)
EMULATION_MIN_MAX(long, long)
EMULATION_MIN_MAX(unsigned long, unsigned long)
EMULATION_MIN_MAX(long, unsigned long)
EMULATION_MIN_MAX(unsigned long, long)
EMULATION_MIN_MAX(long long, long long)
EMULATION_MIN_MAX(unsigned long long, unsigned long long)
EMULATION_MIN_MAX(long long, unsigned long long)
EMULATION_MIN_MAX(unsigned long long, long long)
#undef EMULATION_MIN_MAX
// A NaN loses against a number, as on the device.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}

namespace emulation {
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace emulation
inline int __float_as_int(float x) { return emulation::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return emulation::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return emulation::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::bits_as<double>(x); }

// Loads and stores with a cache hint.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

// ---------------------------------------------------------------------------------------------
// Runtime: one device, everything synchronous
// ---------------------------------------------------------------------------------------------

enum cudaError_t {  // the values of the toolkit
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotSupported = 801,
};
using cudaError = cudaError_t;

namespace emulation {
struct Stream {};
struct Event {};
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
// What cudaFuncSetAttribute allowed a kernel beyond 48 KiB.
inline std::vector<std::pair<const void*, int>> dynamic_limits;
}  // namespace emulation

using cudaStream_t = emulation::Stream*;
using cudaEvent_t = emulation::Event*;

inline cudaError_t cudaPeekAtLastError() { return emulation::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
  }
  return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNotSupported: return "operation not supported";
  }
  return "unrecognized error code";
}

// Device memory is heap memory, so AddressSanitizer knows its bounds. It starts poisoned.
inline cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (pointer == nullptr) return emulation::remember(cudaErrorInvalidValue);
  *pointer = bytes == 0 ? nullptr : std::malloc(bytes);
  if (bytes == 0) return cudaSuccess;
  if (*pointer == nullptr) return emulation::remember(cudaErrorMemoryAllocation);
  std::memset(*pointer, emulation::poison_byte, bytes);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}
template <class T>
cudaError_t cudaMallocAsync(T** pointer, size_t bytes, cudaStream_t) {
  return cudaMalloc(reinterpret_cast<void**>(pointer), bytes);
}
inline cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};
inline cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  if (bytes > 0) std::memset(pointer, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t = nullptr) {
  return cudaMemset(pointer, value, bytes);
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t = nullptr) {
  return cudaMemcpy(to, from, bytes, kind);
}
template <class T>
cudaError_t cudaMemcpyToSymbol(T& symbol, const void* from, size_t bytes, size_t offset = 0,
                               cudaMemcpyKind = cudaMemcpyHostToDevice) {
  if (offset + bytes > sizeof(symbol)) return emulation::remember(cudaErrorInvalidValue);
  std::memcpy(reinterpret_cast<char*>(&symbol) + offset, from, bytes);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyToSymbolAsync(T& symbol, const void* from, size_t bytes, size_t offset,
                                    cudaMemcpyKind kind, cudaStream_t = nullptr) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}

inline cudaError_t cudaDeviceSynchronize() { return emulation::last_error; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return emulation::last_error; }
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new emulation::Stream;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return emulation::remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return emulation::remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = 32; return cudaSuccess;
    // Few, so that grids sized by the device come out small and grid-stride loops do go round.
    case cudaDevAttrMultiProcessorCount: *value = 2; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 * 1024; return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 * 1024; return cudaSuccess;
  }
  return emulation::remember(cudaErrorInvalidValue);
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...),
                                                          int threads, size_t dynamic_bytes) {
  if (threads < 1 || threads > 1024) return emulation::remember(cudaErrorInvalidValue);
  *blocks = min(2048 / threads, 32);
  if (dynamic_bytes > 0) *blocks = min(*blocks, static_cast<int>(228 * 1024 / dynamic_bytes));
  return cudaSuccess;
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > static_cast<int>(emulation::max_dynamic_shared))
    return emulation::remember(cudaErrorInvalidValue);
  emulation::dynamic_limits.emplace_back(reinterpret_cast<const void*>(kernel), value);
  return cudaSuccess;
}

// Launch attributes ask for clusters, cooperative grids and the like; none of that is emulated.
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned int numAttrs;
};

namespace emulation {

// The limits a launch runs into on a real device.
inline cudaError_t check_launch(const cudaLaunchConfig_t* config, const void* kernel) {
  if (config == nullptr || kernel == nullptr) return cudaErrorInvalidValue;
  if (config->numAttrs != 0) return cudaErrorNotSupported;
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.x > 1024 || block.y > 1024 ||
      block.z > 64 || std::size_t(block.x) * block.y * block.z > 1024)
    return cudaErrorInvalidConfiguration;
  std::size_t limit = 48 * 1024;
  for (const auto& entry : dynamic_limits)
    if (entry.first == kernel) limit = static_cast<std::size_t>(entry.second);
  if (config->dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  return cudaSuccess;
}

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const void* address = reinterpret_cast<const void*>(kernel);
  const cudaError_t error = emulation::check_launch(config, address);
  if (error != cudaSuccess) return emulation::remember(error);
  // Converted once, as at a real launch; every thread then gets its own copy.
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  } call{kernel, std::tuple<std::decay_t<Parameters>...>(
                     static_cast<Parameters>(std::forward<Arguments>(arguments))...)};
  emulation::engine().launch(
      config->gridDim, config->blockDim, config->dynamicSmemBytes, address,
      [](void* data) {
        Call& one = *static_cast<Call*>(data);
        std::apply(one.kernel, one.arguments);
      },
      &call);
  return cudaSuccess;
}
