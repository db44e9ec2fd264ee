// Calls the project's CUDA launchers for a test problem. Emulated device memory is host memory.
#pragma once

#include <gtest/gtest.h>

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/storage.cuh"
#include "problems.h"

namespace launchers {

using levelset::cuda::RowTeam;

inline const char* name(RowTeam team) {
  switch (team) {
    case RowTeam::kThread: return "thread";
    case RowTeam::kWarp: return "warp";
    case RowTeam::kBlock: return "block";
    default: return "auto";
  }
}

template <typename S>
void run(problems::Pinv<S>& p, RowTeam team) {
  ASSERT_EQ(p.adjoint ? levelset::cuda::pinv_adjoint(p.params(), team, nullptr)
                      : levelset::cuda::pinv_apply(p.params(), team, nullptr),
            cudaSuccess);
}

template <typename S>
void run(problems::Newton<S>& p, RowTeam team) {
  ASSERT_EQ(levelset::cuda::newton_update(p.params(), team, nullptr), cudaSuccess);
}

// Distance from 1 to the next number, for the storage type and for the arithmetic behind it.
template <typename S>
constexpr double storage_epsilon() {
  if constexpr (std::is_same_v<S, __half>) return 0x1p-10;
  if constexpr (std::is_same_v<S, __nv_bfloat16>) return 0x1p-7;
  return std::is_same_v<S, double> ? 0x1p-52 : 0x1p-23;
}

template <typename S>
constexpr double arithmetic_epsilon() {
  return std::is_same_v<S, double> ? 0x1p-52 : 0x1p-23;
}

}  // namespace launchers
