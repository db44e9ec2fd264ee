#include "mlp.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../core/newton_row.h"
#include "../core/params.h"
#include "../core/status.h"
#include "rows.h"

namespace levelset::cpu {

namespace {

// The nearest bfloat16 number, as the processor rounds: ties to even, NaN stays NaN.
std::uint32_t to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return (bits >> 16) | 0x40;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Pairs of rows that a coarse matrix of so many rows has.
std::int64_t coarse_depth(std::int64_t rows) { return padded((rows + 1) / 2, kCoarseDepth); }

// Panels of at most two vectors of columns, see MlpNet. element(k, c) is row k, column c.
template <typename T, typename Element>
void pack(std::int64_t lanes, std::int64_t rows, std::int64_t columns, T* to, Element element) {
  for (std::int64_t first = 0; first < columns; first += 2 * lanes) {
    const std::int64_t width = first + lanes < columns ? 2 * lanes : lanes;
    const std::int64_t real = std::min(width, columns - first);
    for (std::int64_t k = 0; k < rows; ++k) {
      for (std::int64_t c = 0; c < real; ++c) to[c] = element(k, first + c);
      for (std::int64_t c = real; c < width; ++c) to[c] = T(0);
      to += width;
    }
  }
}

}  // namespace

template <typename S>
std::int64_t mlp_place(MlpLayer& layer, std::int64_t at) {
  const std::int64_t lanes = vector_kernels<S>().lanes;
  const std::int64_t columns = layer.hidden + layer.inputs;
  layer.bias_at = at;
  layer.forward_at = layer.bias_at + padded(layer.outputs, 2 * lanes);
  layer.backward_at = layer.forward_at + columns * padded(layer.outputs, lanes);
  return layer.backward_at + padded(layer.outputs * padded(columns, lanes), lanes);
}

template <typename S>
void mlp_pack(const MlpLayer& layer, Matrix<S> hidden, Matrix<S> inputs, const S* bias,
              std::int64_t bias_stride, S* packed) {
  const std::int64_t lanes = vector_kernels<S>().lanes;
  S* const to = packed + layer.bias_at;
  std::fill(to, packed + layer.forward_at, S(0));
  if (bias != nullptr) {
    for (std::int64_t i = 0; i < layer.outputs; ++i) to[i] = bias[i * bias_stride];
  }
  const auto at = [](const Matrix<S>& m, std::int64_t row, std::int64_t column) {
    return m.at[row * m.row_stride + column * m.column_stride];
  };
  // Forward the point's columns come first, as `multiply` reads them; backward they come last.
  pack(lanes, layer.inputs + layer.hidden, layer.outputs, packed + layer.forward_at,
       [&](std::int64_t k, std::int64_t c) {
         return k < layer.inputs ? at(inputs, c, k) : at(hidden, c, k - layer.inputs);
       });
  pack(lanes, layer.outputs, layer.hidden + layer.inputs, packed + layer.backward_at,
       [&](std::int64_t k, std::int64_t c) {
         return c < layer.hidden ? at(hidden, k, c) : at(inputs, k, c - layer.hidden);
       });
}

std::int64_t mlp_place_coarse(MlpLayer& layer, std::int64_t at) {
  const std::int64_t lanes = vector_kernels<float>().lanes;
  layer.coarse_forward_at = at;
  layer.coarse_backward_at = at + coarse_depth(layer.hidden) * padded(layer.outputs, lanes);
  return layer.coarse_backward_at +
         coarse_depth(layer.outputs) * padded(layer.hidden + layer.inputs, lanes);
}

void mlp_pack_coarse(const MlpLayer& layer, Matrix<float> hidden, Matrix<float> inputs,
                     std::uint32_t* coarse) {
  const std::int64_t lanes = vector_kernels<float>().lanes;
  const auto at = [](const Matrix<float>& m, std::int64_t row, std::int64_t column) {
    return to_bfloat16(m.at[row * m.row_stride + column * m.column_stride]);
  };
  const auto pair = [](std::uint32_t low, std::uint32_t high) { return low | high << 16; };
  pack(lanes, coarse_depth(layer.hidden), layer.outputs, coarse + layer.coarse_forward_at,
       [&](std::int64_t k, std::int64_t c) {
         const auto number = [&](std::int64_t row) {
           return row < layer.hidden ? at(hidden, c, row) : std::uint32_t(0);
         };
         return pair(number(2 * k), number(2 * k + 1));
       });
  pack(lanes, coarse_depth(layer.outputs), layer.hidden + layer.inputs,
       coarse + layer.coarse_backward_at, [&](std::int64_t k, std::int64_t c) {
         const auto number = [&](std::int64_t row) {
           if (row >= layer.outputs) return std::uint32_t(0);
           return c < layer.hidden ? at(hidden, row, c) : at(inputs, row, c - layer.hidden);
         };
         return pair(number(2 * k), number(2 * k + 1));
       });
}

template <typename S>
std::int64_t mlp_tile_rows(std::int64_t rows, std::int64_t threads) {
  // Eight blocks of rows: the weights of a layer are then read often enough from the second cache.
  const std::int64_t block = vector_kernels<S>().block_rows;
  const std::int64_t share = (rows + threads - 1) / std::max<std::int64_t>(1, threads);
  return std::min(8 * block, padded(std::max<std::int64_t>(1, share), block));
}

template <typename S>
MlpWorkspace<S>::MlpWorkspace(const MlpNet<S>& net, std::int64_t capacity, bool with_deltas,
                              bool keep_deltas)
    : capacity_(capacity) {
  const std::int64_t lanes = vector_kernels<S>().lanes, d = net.dimension;
  const auto take = [&](std::int64_t numbers) {
    const std::int64_t at = numbers_;
    numbers_ += padded(numbers, 16);
    return at;
  };
  // A stride that is a power of two would put the same column of all rows into one set of the
  // cache.
  const auto room = [&](std::int64_t columns) { return padded(columns, 2 * lanes) + 16; };
  points_at_ = take(capacity * d);
  values_at_ = take(capacity * net.outputs);
  jacobian_at_ = take(capacity * net.outputs * d);
  std::int64_t widest = std::max<std::int64_t>(net.outputs, d), last = 0;
  const int hidden_layers = net.count - 1;
  for (int k = 0; k < hidden_layers; ++k) {
    stride_.push_back(room(net.layers[k].outputs + d));
    last = std::max(last, stride_.back());
    hidden_at_.push_back(take(capacity * stride_.back()));
    const bool has_slopes = net.layers[k].activation > Activation::kRelu;
    slopes_at_.push_back(has_slopes ? take(capacity * stride_.back()) : hidden_at_.back());
  }
  for (int k = 0; k < hidden_layers; ++k) {
    widest = std::max(widest, net.layers[k].hidden > 0 ? std::int64_t(0) : d);
  }
  scratch_stride_ = room(widest);
  scratch_at_ = take(capacity * scratch_stride_);
  if (net.coarse != nullptr) {
    std::int64_t factor = 0;
    for (int k = 0; k < hidden_layers; ++k) factor = std::max(factor, net.layers[k].outputs);
    pair_stride_ = coarse_depth(factor) + 16;
    pairs_at_ = take(padded(capacity, kCoarseRows) * pair_stride_);
  }
  if (!with_deltas) {
    deltas_at_.assign(std::size_t(net.outputs * hidden_layers), scratch_at_);
  } else if (keep_deltas) {
    for (int o = 0; o < net.outputs; ++o) {
      for (int k = 0; k < hidden_layers; ++k) deltas_at_.push_back(take(capacity * stride_[k]));
    }
  } else {
    const std::int64_t turns[] = {take(capacity * last), take(capacity * last)};
    for (int o = 0; o < net.outputs; ++o) {
      for (int k = 0; k < hidden_layers; ++k) deltas_at_.push_back(turns[k % 2]);
    }
  }
}

template <typename S>
MlpTile<S> MlpWorkspace<S>::tile(S* memory) {
  const auto places = [&](const std::vector<std::int64_t>& at, std::vector<S*>& to) {
    to.clear();
    for (const std::int64_t place : at) to.push_back(memory + place);
    return to.data();
  };
  return {capacity_,
          memory + points_at_,
          memory + values_at_,
          memory + jacobian_at_,
          memory + scratch_at_,
          scratch_stride_,
          places(hidden_at_, hidden_),
          places(slopes_at_, slopes_),
          places(deltas_at_, deltas_),
          stride_.data(),
          pairs_at_ < 0 ? nullptr : reinterpret_cast<std::uint32_t*>(memory + pairs_at_),
          pair_stride_};
}

namespace {

// What a tile remembers of its rows. Exact: the next evaluation is not to be coarse.
template <typename S>
struct Slots {
  std::vector<std::int64_t> row;
  std::vector<std::int32_t> iterations;
  std::vector<std::int8_t> status, exact;
  std::vector<S> level, before;
  std::int64_t outputs, columns;

  Slots(std::int64_t capacity, std::int64_t l, std::int64_t d)
      : row(capacity),
        iterations(capacity),
        status(capacity),
        exact(capacity),
        level(capacity * l),
        before(capacity * d),
        outputs(l),
        columns(d) {}

  S* level_of(std::int64_t i) { return level.data() + i * outputs; }
  S* before_of(std::int64_t i) { return before.data() + i * columns; }
};

// The rows of a tile from `first` on, as a tile.
template <typename S>
class TileView {
 public:
  TileView(const MlpNet<S>& net, const MlpTile<S>& tile, std::int64_t first) : view_(tile) {
    const int layers = net.count - 1;
    for (int k = 0; k < layers; ++k) {
      hidden_.push_back(tile.hidden[k] + first * tile.stride[k]);
      slopes_.push_back(tile.slopes[k] + first * tile.stride[k]);
    }
    for (int k = 0; k < layers * net.outputs; ++k) {
      deltas_.push_back(tile.deltas[k] + first * tile.stride[k % layers]);
    }
    view_.capacity -= first;
    view_.points += first * net.dimension;
    view_.values += first * net.outputs;
    view_.jacobian += first * net.outputs * net.dimension;
    view_.hidden = hidden_.data();
    view_.slopes = slopes_.data();
    view_.deltas = deltas_.data();
  }
  operator const MlpTile<S>&() const { return view_; }

 private:
  std::vector<S*> hidden_, slopes_, deltas_;
  MlpTile<S> view_;
};

// Exchanges two rows after `forward`.
template <typename S>
void exchange(const MlpNet<S>& net, const MlpTile<S>& tile, Slots<S>& slots, std::int64_t i,
              std::int64_t j) {
  const std::int64_t d = net.dimension, l = net.outputs;
  std::swap_ranges(tile.points + i * d, tile.points + (i + 1) * d, tile.points + j * d);
  std::swap_ranges(tile.values + i * l, tile.values + (i + 1) * l, tile.values + j * l);
  for (int k = 0; k + 1 < net.count; ++k) {
    const std::int64_t width = net.layers[k].outputs, stride = tile.stride[k];
    const auto rows = [&](S* at) {
      std::swap_ranges(at + i * stride, at + i * stride + width, at + j * stride);
    };
    rows(tile.hidden[k]);
    if (tile.slopes[k] != tile.hidden[k]) rows(tile.slopes[k]);
  }
  std::swap(slots.row[i], slots.row[j]);
  std::swap(slots.iterations[i], slots.iterations[j]);
  std::swap(slots.exact[i], slots.exact[j]);
  std::swap_ranges(slots.level_of(i), slots.level_of(i) + l, slots.level_of(j));
}

// Copies what a finished row leaves behind.
template <typename S>
void hand_over(const MlpProjectParams<S>& p, const MlpTile<S>& tile, std::int64_t slot,
               std::int64_t row) {
  const std::int64_t d = p.net.dimension, l = p.net.outputs;
  std::copy_n(tile.points + slot * d, d, p.points + row * d);
  std::copy_n(tile.values + slot * l, l, p.values + row * l);
  std::copy_n(tile.jacobian + slot * l * d, l * d, p.jacobian + row * l * d);
  if (p.hidden == nullptr) return;
  // Sums over rows give a bad row the factor 0, which would still make NaN of what is not finite.
  bool finite = true;
  for (std::int64_t j = 0; j < l * d; ++j) finite &= std::isfinite(p.jacobian[row * l * d + j]);
  for (std::int64_t j = 0; j < l; ++j) finite &= std::isfinite(p.values[row * l + j]);
  for (std::int64_t j = 0; j < d; ++j) finite &= std::isfinite(p.points[row * d + j]);
  const auto copy = [&](const S* from, std::int64_t width, S* to) {
    finite ? std::copy_n(from, width, to) : std::fill_n(to, width, S(0));
  };
  S *hidden = p.hidden, *deltas = p.deltas;
  const int layers = p.net.count - 1;
  for (int k = 0; k < layers; ++k) {
    const std::int64_t width = p.net.layers[k].outputs;
    copy(tile.hidden[k] + slot * tile.stride[k], width, hidden + row * width);
    hidden += p.rows * width;
    for (std::int64_t o = 0; o < l; ++o) {
      copy(tile.deltas[o * layers + k] + slot * tile.stride[k], width, deltas + row * width);
      deltas += p.rows * width;
    }
  }
}

}  // namespace

namespace {

// F and D_xF of the first `taken` rows; those from `fresh` on have been nowhere yet. Returns how
// many rows, the first ones, have exact numbers.
template <typename S>
std::int64_t evaluate(const MlpProjectParams<S>& p, const MlpTile<S>& tile, Slots<S>& slots,
                      std::int64_t fresh, std::int64_t taken) {
  const VectorKernels<S>& kernels = vector_kernels<S>();
  const int l = p.net.outputs;
  if constexpr (sizeof(S) == sizeof(float)) {
    if (p.net.coarse != nullptr && p.max_iters > 0) {
      const CoarseKernels& coarse = *coarse_kernels();
      if (fresh > 0) kernels.forward(p.net, tile, fresh);
      if (fresh < taken) coarse.forward(p.net, TileView<S>(p.net, tile, fresh), taken - fresh);
      // Rows that end here need an exact Jacobian: they go first.
      std::int64_t ends = 0;
      for (std::int64_t i = 0; i < fresh; ++i) {
        const RowStatus verdict = last_verdict(tile.values + i * l, slots.level_of(i), l,
                                               tile.points + i * p.net.dimension, 0, p.tol);
        if (verdict == RowStatus::kMaxIterations && slots.iterations[i] < p.max_iters &&
            !slots.exact[i]) {
          continue;
        }
        if (i != ends) exchange(p.net, tile, slots, i, ends);
        ++ends;
      }
      for (int o = 0; o < l; ++o) {
        if (ends > 0) kernels.backward(p.net, tile, ends, o);
        if (ends < taken) {
          coarse.backward(p.net, TileView<S>(p.net, tile, ends), taken - ends, o);
        }
      }
      return ends;
    }
  }
  kernels.forward(p.net, tile, taken);
  for (int o = 0; o < l; ++o) kernels.backward(p.net, tile, taken, o);
  return taken;
}

}  // namespace

template <typename S>
void mlp_project(const MlpProjectParams<S>& p, const MlpTile<S>& tile,
                 std::atomic<std::int64_t>& next) {
  const std::int64_t d = p.net.dimension, l = p.net.outputs, capacity = tile.capacity;
  Slots<S> slots(capacity, l, d);
  std::int64_t taken = 0;
  bool waiting = true;
  while (true) {
    const std::int64_t fresh = taken;
    while (waiting && taken < capacity) {
      const std::int64_t wanted = capacity - taken, first = next.fetch_add(wanted);
      const std::int64_t last = std::min(first + wanted, p.rows);
      waiting = last == first + wanted;
      for (std::int64_t row = first; row < last; ++row, ++taken) {
        slots.row[taken] = row;
        slots.iterations[taken] = 0;
        slots.exact[taken] = 0;
        std::copy_n(p.start + row * d, d, tile.points + taken * d);
        std::copy_n(p.level + row * p.level_stride, l, slots.level_of(taken));
      }
    }
    if (taken == 0) return;
    const std::int64_t exact = evaluate(p, tile, slots, fresh, taken);

    // A row that has no update left keeps its point and its RUNNING.
    for (std::int64_t i = 0; i < taken; ++i) {
      slots.status[i] = std::int8_t(slots.iterations[i] < p.max_iters ? RowStatus::kRunning
                                                                      : RowStatus::kMaxIterations);
    }
    std::copy_n(tile.points + exact * d, (taken - exact) * d, slots.before_of(exact));
    NewtonParams<S> update{};
    update.rows = update.point_rows = taken;
    update.columns = d;
    update.outputs = int(l);
    update.points = update.next = tile.points;
    update.values = tile.values;
    update.jacobian = tile.jacobian;
    update.level = slots.level.data();
    update.level_stride = l;
    update.running = update.status = slots.status.data();
    update.lower = p.lower;
    update.upper = p.upper;
    update.tol = p.tol;
    update.max_step = p.max_step;
    newton_update(update, 0, exact);
    update.tol = -1;  // coarse numbers end no row
    newton_update(update, exact, taken);

    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < taken; ++i) {
      const std::int64_t row = slots.row[i];
      RowStatus status = RowStatus(slots.status[i]);
      const bool moved = status == RowStatus::kRunning;
      if (moved || i >= exact) {
        // A coarse step that failed is not taken; the row is looked at again, exactly.
        slots.exact[kept] = i >= exact && !moved;
        slots.row[kept] = row;
        slots.iterations[kept] = slots.iterations[i] + moved;
        if (!moved) {
          std::copy_n(slots.before_of(i), d, tile.points + kept * d);
        } else if (kept != i) {
          std::copy_n(tile.points + i * d, d, tile.points + kept * d);
        }
        if (kept != i) std::copy_n(slots.level_of(i), l, slots.level_of(kept));
        ++kept;
        continue;
      }
      if (status == RowStatus::kMaxIterations) {
        status = last_verdict(tile.values + i * l, slots.level_of(i), int(l), tile.points + i * d,
                              d, p.tol);
      }
      hand_over(p, tile, i, row);
      p.status[row] = std::int8_t(status);
      p.iterations[row] = slots.iterations[i];
    }
    taken = kept;
  }
}

template <typename S>
void mlp_values(const MlpNet<S>& net, const S* points, S* values, const MlpTile<S>& tile,
                std::int64_t begin, std::int64_t end) {
  const std::int64_t d = net.dimension, l = net.outputs;
  for (std::int64_t first = begin; first < end; first += tile.capacity) {
    const std::int64_t rows = std::min(tile.capacity, end - first);
    std::copy_n(points + first * d, rows * d, tile.points);
    vector_kernels<S>().forward(net, tile, rows);
    std::copy_n(tile.values, rows * l, values + first * l);
  }
}

#define LEVELSET_INSTANTIATE(S)                                                              \
  template std::int64_t mlp_place<S>(MlpLayer&, std::int64_t);                               \
  template void mlp_pack(const MlpLayer&, Matrix<S>, Matrix<S>, const S*, std::int64_t, S*); \
  template class MlpWorkspace<S>;                                                            \
  template std::int64_t mlp_tile_rows<S>(std::int64_t, std::int64_t);                        \
  template void mlp_project(const MlpProjectParams<S>&, const MlpTile<S>&,                   \
                            std::atomic<std::int64_t>&);                                     \
  template void mlp_values(const MlpNet<S>&, const S*, S*, const MlpTile<S>&, std::int64_t,  \
                           std::int64_t);
LEVELSET_INSTANTIATE(float)
LEVELSET_INSTANTIATE(double)
#undef LEVELSET_INSTANTIATE

}  // namespace levelset::cpu
