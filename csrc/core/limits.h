// Limits and tolerances that both devices, the tests and Python share.
#pragma once

#include <cstdint>

namespace levelset {

// Largest number of network outputs l. One thread holds the l x l factorisation.
constexpr int kMaxOutputs = 8;

// Template argument of the row math for l > 2, where l is a run-time number; l = 1 and l = 2 have
// code of their own.
constexpr int kAnyOutputs = 0;

// Row k of D_xF counts as dependent on the rows before it when the part of it orthogonal to them is
// shorter than this fraction of the row itself. The rule compares a row with itself, so it does not
// change when an output is rescaled. A row shorter than the smallest normal number counts as zero.
template <typename T>
struct RankTolerance;
template <>
struct RankTolerance<float> {
  static constexpr float value = 7.62939453125e-6f;  // 2^-17 = 64 ulp
};
template <>
struct RankTolerance<double> {
  static constexpr double value =
      9.5367431640625e-7;  // 2^-20: a Gram pivot of tau^2 keeps 4 digits
};

template <typename T>
struct FloatRange;
template <>
struct FloatRange<float> {
  static constexpr float smallest_normal = 1.17549435e-38f;
  static constexpr float largest = 3.40282347e+38f;
  // A sum of squares inside (low, high) neither lost small terms to underflow nor overflowed.
  static constexpr float squares_low = 1.0e-26f;
  static constexpr float squares_high = 1.0e+37f;
};
template <>
struct FloatRange<double> {
  static constexpr double smallest_normal = 2.2250738585072014e-308;
  static constexpr double largest = 1.7976931348623157e+308;
  static constexpr double squares_low = 1.0e-280;
  static constexpr double squares_high = 1.0e+300;
};

}  // namespace levelset
