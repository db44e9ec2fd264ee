// What happened to one row. Python reads these names and values from the compiled module; nothing
// is copied by hand.
#pragma once

#include <cstdint>

namespace levelset {

enum class RowStatus : std::int8_t {
  kConverged = 0,      // max_j |F_j - c_j| <= tol at the returned point
  kRunning = 1,        // moved by the last update, not yet known to be on the level set
  kMaxIterations = 2,  // the iteration budget ended first
  kRankDeficient = 3,  // D_xF lost rank (see RankTolerance), or the step it asks for overflows
  kNonFinite = 4,      // NaN or infinity in F, the level or the point, or in D_xF of a row to move
  kNotBracketed = 5,   // false position: F - c has one sign at both ends of the segment
  kStalled = 6,  // the next point equals this one: the dtype or the box allows no closer point
};

}  // namespace levelset
