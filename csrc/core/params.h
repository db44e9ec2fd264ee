// One parameter struct per op. All tensors are contiguous and row-major; pointers marked "or null" are
// optional. S is the storage type; arithmetic runs in float for 16-bit storage and in S otherwise.
#pragma once

#include <cstdint>

namespace levelset {

template <typename S>
struct PinvParams {
  std::int64_t rows;     // n
  std::int64_t columns;  // d
  int outputs;           // l, 1 <= l <= kMaxOutputs
  const S* jacobian;     // (n, l, d)
  const S* input;        // apply: r (n, l); adjoint: g (n, d)
  S* output;             // apply: J^T (J J^T)^-1 r, (n, d); adjoint: (J J^T)^-1 J g, (n, l)
  std::int8_t* status;   // (n,): kConverged, kRankDeficient or kNonFinite; bad rows are written as zero
};

template <typename S>
struct NewtonParams {
  std::int64_t rows;           // m, the rows of values and jacobian
  std::int64_t point_rows;     // n, the rows of points
  std::int64_t columns;        // d
  int outputs;                 // l
  const S* points;           // (n, d), read; may be the same memory as next
  const S* values;           // F at the points, (m, l)
  const S* jacobian;         // D_xF at the points, (m, l, d)
  const S* level;            // c, (n, l), or (1, l) with level_stride 0
  std::int64_t level_stride; // l or 0
  const std::int64_t* index; // (m,) or null: row i updates point index[i]; null means i
  const std::int8_t* running; // (n,) or null: only points with kRunning here move, others keep point and status
  const S* lower;            // (d,) or null: box clamp of the next point
  const S* upper;            // (d,) or null
  double tol;                // on max_j |F_j - c_j|, >= 0
  double max_step;           // largest L2 length of one step; infinity for none
  S* next;                   // (n, d)
  std::int8_t* status;       // (n,); may be the same memory as running
};

template <typename S>
struct NearestParams {
  std::int64_t queries;      // n
  std::int64_t cloud_size;   // m >= 1
  std::int64_t dimension;    // d
  const S* query;            // (n, d)
  const S* cloud;            // (m, d)
  std::int64_t splits;       // parts the cloud is cut into, each reduced on its own
  S* partial_distance;       // (splits, n) scratch, squared distances
  std::int64_t* partial_index;  // (splits, n) scratch
  S* distance;               // (n,)
  std::int64_t* index;       // (n,): the smallest index among equal distances
};

}  // namespace levelset
