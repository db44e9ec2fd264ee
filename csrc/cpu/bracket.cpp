#include "bracket.h"

#include "../core/bracket_row.h"
#include "../core/dispatch.h"

namespace levelset::cpu {

template <typename S>
void bracket_update(const BracketParams<S>& p, std::int64_t begin, std::int64_t end) {
  with_columns(p.columns, [&](auto d) {
    for (std::int64_t i = begin; i < end; ++i) bracket_update_row<S, S>(SerialTeam{}, p, i, d);
  });
}

template void bracket_update(const BracketParams<float>&, std::int64_t, std::int64_t);
template void bracket_update(const BracketParams<double>&, std::int64_t, std::int64_t);

}  // namespace levelset::cpu
