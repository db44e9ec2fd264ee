// Half precision as storage: conversions, and no arithmetic. On the device a sum of two halves is
// rounded to half; here it would silently be a float, so it does not compile. Convert first.
#pragma once

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};

namespace emulation {

// Rounds to nearest, ties to even.
inline unsigned short half_bits(double value) {
  const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  const double magnitude = std::fabs(value);
  // Half way between the largest half, 65504, and the value that would follow it.
  if (magnitude >= 65520.0) return static_cast<unsigned short>(sign | 0x7c00);
  if (magnitude == 0.0) return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent);                    // magnitude in [2^(exponent-1), 2^exponent)
  const int scale = std::max(exponent - 1, -14) - 10;  // exponent of the last place
  // nearbyint follows the rounding mode, which is ties to even unless someone changed it.
  const int significand = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -scale)));
  // The hidden bit of a normal number adds one to the exponent field; a carry does the same.
  return static_cast<unsigned short>(sign | (((scale + 24) << 10) + significand));
}

inline float half_value(unsigned short bits) {
  const int exponent = bits >> 10 & 0x1f;
  const int fraction = bits & 0x3ff;
  float value;
  if (exponent == 31)
    value = fraction == 0 ? __builtin_inff() : __builtin_nanf("");
  else if (exponent == 0)
    value = std::ldexp(static_cast<float>(fraction), -24);
  else
    value = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return (bits & 0x8000) != 0 ? -value : value;
}

}  // namespace emulation

struct alignas(2) __half {
  unsigned short __x;
  __half() = default;
  __half(float value) : __x(emulation::half_bits(value)) {}
  __half(double value) : __x(emulation::half_bits(value)) {}
  explicit __half(int value) : __x(emulation::half_bits(value)) {}
  __half(__half_raw raw) : __x(raw.x) {}
  operator float() const { return emulation::half_value(__x); }
};
using half = __half;
struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

__half operator+(__half, __half) = delete;
__half operator-(__half, __half) = delete;
__half operator*(__half, __half) = delete;
__half operator/(__half, __half) = delete;

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline __half __double2half(double value) { return __half(value); }
inline unsigned short __half_as_ushort(__half value) { return value.__x; }
inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline float2 __half22float2(__half2 value) { return {value.x, value.y}; }
