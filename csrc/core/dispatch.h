// From the run-time number of outputs to the template argument of the row math.
#pragma once

#include <type_traits>

#include "limits.h"
#include "team.h"

namespace levelset {

// Calls run(std::integral_constant<int, L>{}) with L = 1, 2 or kAnyOutputs and returns its result.
template <typename Run>
auto with_outputs(int l, Run run) {
  if (l == 1) return run(std::integral_constant<int, 1>{});
  if (l == 2) return run(std::integral_constant<int, 2>{});
  return run(std::integral_constant<int, kAnyOutputs>{});
}

// Calls run(columns) with columns known to the compiler for points in the plane and in space.
template <typename Run>
void with_columns(std::int64_t d, Run run) {
  if (d == 2) return run(FixedColumns<2>{});
  if (d == 3) return run(FixedColumns<3>{});
  run(d);
}

}  // namespace levelset
