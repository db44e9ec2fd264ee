// CPU launcher of the bracketing root search: walks the rows [begin, end) on the calling thread.
// Instantiated for float and double.
#pragma once

#include "../core/params.h"

namespace levelset::cpu {

template <typename S>
void bracket_update(const BracketParams<S>& params, std::int64_t begin, std::int64_t end);

}  // namespace levelset::cpu
