// One parameter struct per op. All tensors are contiguous and row-major; pointers marked "or null"
// are optional. S is the storage type; arithmetic runs in float for 16-bit storage and in S
// otherwise.
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
  // (n,): kConverged, kRankDeficient or kNonFinite. Bad rows are written as zero.
  std::int8_t* status;
};

template <typename S>
struct NewtonParams {
  std::int64_t rows;          // m, the rows of values and jacobian
  std::int64_t point_rows;    // n, the rows of points
  std::int64_t columns;       // d
  int outputs;                // l
  const S* points;            // (n, d), read; may be the same memory as next
  const S* values;            // F at the points, (m, l)
  const S* jacobian;          // D_xF at the points, (m, l, d)
  const S* level;             // c, (n, l), or (1, l) with level_stride 0
  std::int64_t level_stride;  // l or 0
  const std::int64_t* index;  // (m,) or null: row i updates point index[i]; null means i
  // (n,) or null: only points with kRunning here move, others keep point and status.
  const std::int8_t* running;
  const S* lower;       // (d,) or null: box clamp of the next point
  const S* upper;       // (d,) or null
  double tol;           // on max_j |F_j - c_j|, >= 0
  double max_step;      // largest L2 length of one step; infinity for none
  S* next;              // (n, d)
  std::int8_t* status;  // (n,); may be the same memory as running
};

template <typename S>
struct NearestParams {
  std::int64_t queries;         // n
  std::int64_t cloud_size;      // m >= 1
  std::int64_t dimension;       // d
  const S* query;               // (n, d)
  const S* cloud;               // (m, d)
  std::int64_t splits;          // parts the cloud is cut into, each reduced on its own
  S* partial_distance;          // (splits, n) scratch, squared distances
  std::int64_t* partial_index;  // (splits, n) scratch
  S* distance;                  // (n,)
  std::int64_t* index;          // (n,): the smallest index among equal distances
};

// How the next place is chosen between the two ends of a bracket; see bracket_row.h.
enum class BracketVariant : int {
  kRegulaFalsi = 0,
  kBisection = 1,
  kIllinois = 2,
  kChandrupatla = 3,
  kAndersonBjorck = 4,
};
constexpr int kBracketVariants = 5;

// A place on the segment, s = 0 at its start and 1 at its end, and F there.
struct BracketPlace {
  double at;
  double value;
};

// What a search remembers of one row. As a tensor it is kBracketColumns numbers of float64.
struct BracketRow {
  double at;  // s of the row's point, where F is asked for; of a row that is done, its answer
  BracketPlace newest;    // the end evaluated last; of a row that is done, its answer
  BracketPlace contra;    // the other end
  BracketPlace previous;  // the end that newest replaced (Chandrupatla)
  double scale;           // factor on the value of contra (Illinois, Anderson-Bjorck)
  double floor;           // residuals below are a few ulp of c, or of F at both first ends
  double fruitless;       // evaluations below the floor that came no closer
  double width;           // of the bracket when it had last halved (Anderson-Bjorck)
  double slow;            // evaluations since then
};
constexpr int kBracketColumns = sizeof(BracketRow) / sizeof(double);

template <typename S>
struct BracketParams {
  std::int64_t rows;        // m, the rows of values
  std::int64_t point_rows;  // n, the rows of all others
  std::int64_t columns;     // d
  const S* start;           // (n, d), s = 0
  const S* end;             // (n, d), s = 1
  const S* values;          // (m,): F at the points; where the search begins (m, 2): F at both ends
  bool begins;              // whether bracket is written without being read
  bool last;                // rows that would go on end here, at the better end
  const S* level;           // c, (n,), or (1,) with level_stride 0
  std::int64_t level_stride;  // 1 or 0
  const std::int64_t* index;  // (m,) or null: row i of values belongs to row index[i]; null means i
  double tol;                 // on |F - c|, >= 0
  double rounding;            // a few ulp of 1 in the dtype S
  BracketVariant variant;
  S* points;            // (n, d): where to evaluate F next, or the answer
  std::int8_t* status;  // (n,): only rows with kRunning take part
  BracketRow* bracket;  // (n,)
};

}  // namespace levelset
