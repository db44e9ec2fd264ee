// Inner loops written in vectors, once for every vector instruction set that the compiler can be
// asked for; the best one that this processor has is chosen at run time.
#pragma once

#include "../core/limits.h"
#include "../core/mlp_net.h"
#include "../core/params.h"
#include "../core/status.h"

namespace levelset::cpu {

// One point of a segment; see core/bracket_row.h.
template <typename S>
struct SegmentParams {
  std::int64_t columns;  // d
  const S* start;        // (d,), s = 0
  const S* end;          // (d,), s = 1
  double at;             // s, in (0, 1)
  double ends[2];        // s of the two ends of the bracket
  S* point;              // (d,)
};

// What is true of that point, added up.
constexpr unsigned kFinite = 1;        // all columns
constexpr unsigned kLeavesFirst = 2;   // a column differs from that at ends[0]
constexpr unsigned kLeavesSecond = 4;  // a column differs from that at ends[1]
constexpr unsigned kLeavesBoth = kLeavesFirst | kLeavesSecond;

template <typename S>
struct VectorKernels {
  std::int64_t lanes;       // numbers in a vector
  std::int64_t block_rows;  // rows that share the registers; tiles are best a multiple of it
  // F, h_k and a_k' of the first `rows` points of the tile.
  void (*forward)(const MlpNet<S>& net, const MlpTile<S>& tile, std::int64_t rows);
  // D_xF of one output, after `forward`.
  void (*backward)(const MlpNet<S>& net, const MlpTile<S>& tile, std::int64_t rows, int output);
  // Panels [begin, end) of two vectors of columns of dL/dW. `room` holds gradient_room() numbers.
  void (*weight_gradient)(const WeightGradientParams<S>& params, std::int64_t begin,
                          std::int64_t end, S* room);
  // Whether the three row ops below take rows of this shape.
  bool (*covers)(int outputs, std::int64_t columns);
  // The rows [begin, end) of an op. Returns whether rows were left alone, and marked with
  // kIrregularRow in the status.
  bool (*newton_update)(const NewtonParams<S>& params, std::int64_t begin, std::int64_t end);
  bool (*pinv_apply)(const PinvParams<S>& params, std::int64_t begin, std::int64_t end);
  bool (*pinv_adjoint)(const PinvParams<S>& params, std::int64_t begin, std::int64_t end);
  // Writes the point of a segment at p.at, and compares it with those at p.ends, to the bit as
  // core/bracket_row.h does. Returns what is true of it.
  unsigned (*move_on_segment)(const SegmentParams<S>& p);
  // The first pass of root searches of the rows [begin, end) with two or three columns, no index
  // and another pass to come, to the bit as the row math has it. As above, rows may be marked.
  bool (*begin_searches)(const BracketParams<S>& params, std::int64_t begin, std::int64_t end);
};

constexpr std::int8_t kIrregularRow = -128;  // nothing a caller would take for a status
constexpr std::int64_t kGradientRows = 256;  // rows summed before the registers are written back

// The same products with factors rounded to bfloat16 and sums in float32: about three digits, at
// twice the rate and more. Points and biases stay float32. Matrices are packed for 16 lanes.
struct CoarseKernels {
  const char* name;
  void (*forward)(const MlpNet<float>& net, const MlpTile<float>& tile, std::int64_t rows);
  void (*backward)(const MlpNet<float>& net, const MlpTile<float>& tile, std::int64_t rows,
                   int output);
};

constexpr std::int64_t kCoarseRows = 16;   // what a tile's rows are padded to, in `pairs`
constexpr std::int64_t kCoarseDepth = 16;  // and the pairs of rows of a matrix, with zeros

// Null where this build or this processor has none.
const CoarseKernels* coarse_kernels_amx();
const CoarseKernels* coarse_kernels_bf16();

// The best of them that goes with vector_kernels<float>(), null where none is worth it.
// LEVELSET_ISA avx512 asks for those of pairs (AVX512-BF16).
const CoarseKernels* coarse_kernels();

// Null where this build or this processor has no such instructions.
template <typename S>
const VectorKernels<S>* vector_kernels_avx512();
template <typename S>
const VectorKernels<S>* vector_kernels_avx2();
template <typename S>
const VectorKernels<S>* vector_kernels_portable();

// The best of them; the environment variable LEVELSET_ISA (avx512, avx2, portable) asks for
// another.
template <typename S>
const VectorKernels<S>& vector_kernels();

// Columns of a packed matrix, padded to whole vectors.
constexpr std::int64_t padded(std::int64_t columns, std::int64_t lanes) {
  return (columns + lanes - 1) / lanes * lanes;
}

// Numbers of scratch memory that weight_gradient wants.
constexpr std::int64_t gradient_room(std::int64_t outputs, std::int64_t lanes,
                                     std::int64_t block_rows) {
  return kGradientRows * (2 * lanes + padded(outputs, block_rows));
}

}  // namespace levelset::cpu
