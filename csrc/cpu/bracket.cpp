#include "bracket.h"

#include "../core/bracket_row.h"
#include "../core/dispatch.h"
#include "vector_kernels.h"

namespace levelset::cpu {

namespace {

// The same as the kernels' move_on_segment, for segments of a few columns. The near end and the far
// one are told apart by their addresses: at random as they are, a jump would be guessed wrong.
template <typename S, typename Columns>
inline unsigned move_short(const SegmentParams<S>& p, Columns d) {
  const bool from_end = p.at > 0.5;
  const double weight = from_end ? 1 - p.at : p.at;
  const S* near = from_end ? p.end : p.start;
  const S* far = from_end ? p.start : p.end;
  const SegmentPoint<S> first(p.ends[0]), second(p.ends[1]);
  bool finite = true;
  unsigned leaves = 0;
  for (std::int64_t j = 0; j < d; ++j) {
    const double a = near[j], b = far[j];
    const S x = weight == 0 ? near[j] : S(a + weight * (b - a));
    p.point[j] = x;
    finite &= x - x == 0;
    if (leaves == kLeavesBoth) continue;
    leaves |= x != first(p.start[j], p.end[j]) ? kLeavesFirst : 0;
    leaves |= x != second(p.start[j], p.end[j]) ? kLeavesSecond : 0;
  }
  return leaves | (finite ? kFinite : 0);
}

// `row` takes the values in place i.
template <typename S, typename Columns>
inline void update_row(const BracketParams<S>& p, const VectorKernels<S>& kernels, std::int64_t i,
                       std::int64_t row, Columns d) {
  RowStatus status;
  BracketSearch search = bracket_learn(p, i, row, status);
  const BracketRow& now = search.row();
  const SegmentParams<S> segment{d,
                                 p.start + row * d,
                                 p.end + row * d,
                                 now.at,
                                 {now.newest.at, now.contra.at},
                                 p.points + row * d};
  const bool is_short = d < kernels.lanes;
  const unsigned moved = is_short ? move_short(segment, d) : kernels.move_on_segment(segment);
  const unsigned wanted = status == RowStatus::kRunning ? kFinite | kLeavesBoth : kFinite;
  if ((moved & wanted) != wanted) {
    status = bracket_move<S, S>(SerialTeam{}, p, row, search, status, d);
  }
  p.bracket[row] = search.row();
  p.status[row] = std::int8_t(status);
}

template <typename S, typename Columns>
inline void update_rows(const BracketParams<S>& params, std::int64_t begin, std::int64_t end,
                        Columns d) {
  const BracketParams<S> p = params;  // a copy, see rows.cpp
  const VectorKernels<S>& kernels = vector_kernels<S>();
  if (p.begins && !p.last && p.index == nullptr && (d == 2 || d == 3)) {
    if (!kernels.begin_searches(p, begin, end)) return;
    for (std::int64_t i = begin; i < end; ++i) {
      if (p.status[i] == kIrregularRow) update_row(p, kernels, i, i, d);
    }
    return;
  }
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t row = bracket_row_of(p, i);
    if (row >= 0) update_row(p, kernels, i, row, d);
  }
}

}  // namespace

template <typename S>
void bracket_update(const BracketParams<S>& p, std::int64_t begin, std::int64_t end) {
  with_columns(p.columns, [&](auto d) { update_rows(p, begin, end, d); });
}

template void bracket_update(const BracketParams<float>&, std::int64_t, std::int64_t);
template void bracket_update(const BracketParams<double>&, std::int64_t, std::int64_t);

}  // namespace levelset::cpu
