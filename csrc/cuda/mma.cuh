// Tensor cores from one warp: D = A B + C for A of 16 rows and B of 8 columns, and what goes into
// them. Which numbers a lane holds is written down here once (PTX ISA, "Matrix fragments for
// mma.m16n8k8" and "... mma.m16n8k16"); the emulator has its own reading of that page.
#pragma once

#include <cuda_runtime.h>

#include "../core/portability.h"

#if !defined(__CUDACC__)
#include "emulated_mma.h"
#endif

namespace levelset::cuda {

// Four of the 16 x 8 numbers of D.
struct MmaSums {
  float at[4];
};

// Of A, 16 x 8 in TF32: one number each; 16 x 16 in bfloat16: two each, neighbours in k.
struct MmaRows {
  unsigned at[4];
};

// Of B, 8 x 8 or 16 x 8.
struct MmaColumns {
  unsigned at[2];
};

// Where the numbers of a lane are in the three matrices. For bfloat16 k is that of the first of two
// neighbours.
struct MmaLane {
  int group, place;

  LEVELSET_HD explicit MmaLane(int lane) : group(lane % 32 / 4), place(lane % 4) {}

  LEVELSET_HD int sum_row(int i) const { return group + i / 2 * 8; }
  LEVELSET_HD int sum_column(int i) const { return 2 * place + i % 2; }
  LEVELSET_HD int row(int i) const { return group + i % 2 * 8; }
  LEVELSET_HD int row_k(int i) const { return place + i / 2 * 4; }
  LEVELSET_HD int column() const { return group; }
  LEVELSET_HD int column_k(int i) const { return place + i * 4; }
  LEVELSET_HD int row_pair(int i) const { return 2 * place + i / 2 * 8; }
  LEVELSET_HD int column_pair(int i) const { return 2 * place + i * 8; }
};

#if defined(__CUDACC__)

// Compiles for devices without these instructions, on which nothing that needs them is launched.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define LEVELSET_TENSOR_ASM(...) __trap()
#else
#define LEVELSET_TENSOR_ASM(...) asm volatile(__VA_ARGS__)
#endif

// The nearest number of ten bits, ties away from zero.
__device__ __forceinline__ unsigned to_tf32(float x) {
  unsigned y = 0;
  LEVELSET_TENSOR_ASM("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Two numbers of seven bits, ties to even; `first` is the one in the lower half.
__device__ __forceinline__ unsigned to_bfloat16(float first, float second) {
  unsigned y = 0;
  LEVELSET_TENSOR_ASM("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}

__device__ __forceinline__ void mma_tf32(MmaSums& d, const MmaRows& a, const MmaColumns& b) {
  LEVELSET_TENSOR_ASM(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d.at[0]),
      "+f"(d.at[1]), "+f"(d.at[2]), "+f"(d.at[3]) : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]),
      "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]));
}

__device__ __forceinline__ void mma_bfloat16(MmaSums& d, const MmaRows& a, const MmaColumns& b) {
  LEVELSET_TENSOR_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d.at[0]),
      "+f"(d.at[1]), "+f"(d.at[2]), "+f"(d.at[3]) : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]),
      "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]));
}

// Begins to copy 16 bytes from global to shared memory, both at a multiple of 16. They are there
// for this thread after wait_for_copies, and for others after a barrier behind that.
__device__ __forceinline__ void copy_16_bytes(void* to, const void* from) {
  [[maybe_unused]] const unsigned shared = unsigned(__cvta_generic_to_shared(to));
  LEVELSET_TENSOR_ASM("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared),
                      "l"(from) : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
  LEVELSET_TENSOR_ASM("cp.async.wait_all;" :: : "memory");
}

#undef LEVELSET_TENSOR_ASM

// threadIdx.x, read here and now: what is computed from it is computed anew and not kept in
// registers from one use to the next.
__device__ __forceinline__ int thread_anew() {
  int thread = 0;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

#else

inline unsigned to_tf32(float x) { return emulation::to_tf32(x); }
inline unsigned to_bfloat16(float first, float second) {
  return emulation::to_bfloat16(first, second);
}
inline void mma_tf32(MmaSums& d, const MmaRows& a, const MmaColumns& b) {
  emulation::mma_m16n8k8_tf32(d.at, a.at, b.at);
}
inline void mma_bfloat16(MmaSums& d, const MmaRows& a, const MmaColumns& b) {
  emulation::mma_m16n8k16_bf16(d.at, a.at, b.at);
}
inline void copy_16_bytes(void* to, const void* from) { emulation::copy_16_bytes(to, from); }
inline void wait_for_copies() { emulation::wait_for_copies(); }
inline int thread_anew() { return int(threadIdx.x); }

#endif

// x as a sum of two TF32 numbers, to 2^-22 of it.
__device__ __forceinline__ void split_tf32(float x, unsigned& high, unsigned& low) {
  high = to_tf32(x);
  low = to_tf32(x - __uint_as_float(high));
}

}  // namespace levelset::cuda
