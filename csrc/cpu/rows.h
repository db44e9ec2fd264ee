// CPU launchers: each walks the rows [begin, end) of its op on the calling thread. Instantiated for
// float and double. Rows do not share anything, so any split over threads gives the same bits.
#pragma once

#include "../core/params.h"

namespace levelset::cpu {

template <typename S>
void pinv_apply(const PinvParams<S>& params, std::int64_t begin, std::int64_t end);

template <typename S>
void pinv_adjoint(const PinvParams<S>& params, std::int64_t begin, std::int64_t end);

template <typename S>
void newton_update(const NewtonParams<S>& params, std::int64_t begin, std::int64_t end);

}  // namespace levelset::cpu
