// What the kernels write in PTX, for the emulator: conversions, the two tensor-core instructions
// and asynchronous copies. The fragments are read as the PTX ISA describes them, register by
// register, and not through the kernels' own header.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "engine.h"

namespace emulation {

inline unsigned to_tf32(float x) {
  if (!std::isfinite(x)) return std::isnan(x) ? 0x7fffffffu : __float_as_uint(x);
  return (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
}

inline unsigned to_bfloat16(float first, float second) {
  const auto half = [](float x) {
    const unsigned bits = __float_as_uint(x);
    return std::isnan(x) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  };
  return half(first) | half(second) << 16;
}

// The device aligns all terms of a sum and cuts off what is below the last place; so does this,
// with the sum in double cut off to a float.
inline float cut_off(double sum) {
  const float nearest = static_cast<float>(sum);
  if (!std::isfinite(nearest) || std::fabs(static_cast<double>(nearest)) <= std::fabs(sum)) {
    return nearest;
  }
  return std::nextafter(nearest, 0.0f);
}

// What a lane brings to an instruction. Of every thread there are two by turns: a lane that has
// gone on to the next instruction does not write where others still read, and none can be two
// ahead.
struct MmaOperands {
  unsigned a[4], b[2];
};

// D += A B with A (16, K) and B (K, 8). a_of(row, k) and b_of(k, column) return where a number is:
// which groupID and threadID_in_group has it, and as which element of its fragment.
struct MmaElement {
  int groupID, threadID_in_group, element;
};
template <int K, class A, class B, class Number>
void multiply_fragments(const char* name, float (&d)[4], const unsigned (&a)[4],
                        const unsigned (&b)[2], Site site, A a_of, B b_of, Number number) {
  static MmaOperands operands[2][1024];
  static unsigned char turns[1024];
  const unsigned thread = threadIdx.x;
  MmaOperands* const turn = operands[turns[thread] ^= 1];
  std::copy(a, a + 4, turn[thread].a);
  std::copy(b, b + 2, turn[thread].b);
  engine().exchange(name, 0, 0xffffffffu, 0, site);
  const MmaOperands* const warp = turn + thread / warp_size * warp_size;
  const int groupID = static_cast<int>(lane() / 4),
            threadID_in_group = static_cast<int>(lane() % 4);
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? groupID : groupID + 8;
    const int column = threadID_in_group * 2 + (i & 1);
    double sum = static_cast<double>(d[i]);
    for (int k = 0; k < K; ++k) {
      const MmaElement x = a_of(row, k), y = b_of(k, column);
      sum += number(warp[x.groupID * 4 + x.threadID_in_group].a, x.element) *
             number(warp[y.groupID * 4 + y.threadID_in_group].b, y.element);
    }
    d[i] = cut_off(sum);
  }
}

inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                             EMULATION_SITE) {
  multiply_fragments<8>(
      "mma.m16n8k8.tf32", d, a, b, site_,
      // row = groupID for a0 and a2, groupID + 8 for a1 and a3; col = threadID_in_group for a0 and
      // a1, threadID_in_group + 4 for a2 and a3.
      [](int row, int col) {
        return MmaElement{row % 8, col % 4, (row < 8 ? 0 : 1) + (col < 4 ? 0 : 2)};
      },
      // row = threadID_in_group for b0, threadID_in_group + 4 for b1; col = groupID.
      [](int row, int col) { return MmaElement{col, row % 4, row < 4 ? 0 : 1}; },
      // The instruction ignores the last 13 bits.
      [](const unsigned* registers, int i) {
        return static_cast<double>(__uint_as_float(registers[i] & 0xffffe000u));
      });
}

inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                              EMULATION_SITE) {
  multiply_fragments<16>(
      "mma.m16n8k16.bf16", d, a, b, site_,
      // row = groupID for ai with i < 2 or 4 <= i < 6, else groupID + 8;
      // col = threadID_in_group * 2 + (i & 1), and 8 more where i >= 4.
      [](int row, int col) {
        return MmaElement{row % 8, col % 8 / 2, col % 2 + (row < 8 ? 0 : 2) + (col < 8 ? 0 : 4)};
      },
      // row = threadID_in_group * 2 + (i & 1), and 8 more where i >= 2; col = groupID.
      [](int row, int col) { return MmaElement{col, row % 8 / 2, row % 2 + (row < 8 ? 0 : 2)}; },
      // Element i of a fragment is half i % 2 of register i / 2.
      [](const unsigned* registers, int i) {
        return static_cast<double>(__uint_as_float(registers[i / 2] >> 16 * (i % 2) << 16));
      });
}

// Copies that a thread has begun. They happen when it waits for them: what is read before is old.
struct PendingCopy {
  void* to;
  const void* from;
};
inline std::vector<PendingCopy>& pending_copies() {
  static std::vector<PendingCopy> pending[1024];
  return pending[threadIdx.x];
}
inline void copy_16_bytes(void* to, const void* from, EMULATION_SITE) {
  if (reinterpret_cast<std::uintptr_t>(to) % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    engine().trap("copy_16_bytes: a place that is no multiple of 16", site_);
  }
  pending_copies().push_back({to, from});
}
inline void wait_for_copies() {
  for (const PendingCopy& copy : pending_copies()) std::memcpy(copy.to, copy.from, 16);
  pending_copies().clear();
}

}  // namespace emulation
