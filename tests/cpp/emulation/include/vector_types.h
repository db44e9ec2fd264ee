// The built-in vector types, with the alignment CUDA gives them: UndefinedBehaviorSanitizer then
// sees a misaligned vector load.
#pragma once

#include "../engine.h"

#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)

#define EMULATION_VECTORS(name, T, align2, align4)                     \
  struct name##1 { T x; };                                             \
  struct __align__(align2) name##2 { T x, y; };                        \
  struct __align__(align4) name##4 { T x, y, z, w; };                  \
  inline constexpr name##1 make_##name##1(T x) { return {x}; }         \
  inline constexpr name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define EMULATION_VECTORS_3(name, T) \
  struct name##3 { T x, y, z; };     \
  inline constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }
EMULATION_VECTORS(uchar, unsigned char, 2, 4)
EMULATION_VECTORS(short, short, 4, 8)
EMULATION_VECTORS(ushort, unsigned short, 4, 8)
EMULATION_VECTORS(int, int, 8, 16)
EMULATION_VECTORS(uint, unsigned, 8, 16)
EMULATION_VECTORS(longlong, long long, 16, 16)
EMULATION_VECTORS(ulonglong, unsigned long long, 16, 16)
EMULATION_VECTORS(float, float, 8, 16)
EMULATION_VECTORS(double, double, 16, 16)
EMULATION_VECTORS_3(int, int)
EMULATION_VECTORS_3(float, float)
EMULATION_VECTORS_3(double, double)
#undef EMULATION_VECTORS
#undef EMULATION_VECTORS_3
inline constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
