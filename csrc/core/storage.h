// Between the storage type of a tensor and the type arithmetic runs in. The CUDA floor specialises
// this for its 16-bit types, which compute in float.
#pragma once

#include "portability.h"

namespace levelset {

template <typename S>
struct Storage {
  using Arithmetic = S;
  static LEVELSET_HD S load(S x) { return x; }
  static LEVELSET_HD S store(S x) { return x; }
};

template <typename S>
LEVELSET_HD typename Storage<S>::Arithmetic load(S x) {
  return Storage<S>::load(x);
}

template <typename S>
LEVELSET_HD S store(typename Storage<S>::Arithmetic x) {
  return Storage<S>::store(x);
}

}  // namespace levelset
