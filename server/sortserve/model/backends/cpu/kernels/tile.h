// The inner loop of all matrix products: M rows of x against one panel of 32 outputs.
//
// A panel of bf16 is [k / 2][32 outputs][2]: pairs of inputs lie side by side, as vdpbf16ps and AMX
// want them, and one shift or mask apart from fp32. A panel of fp32 is [k][32 outputs]. An output
// is one chain of sums over k, in the same order whatever M is; libraries choose another kernel, and
// so another order, for one row than for many.
//
// What an instruction set brings for a type of weights W: the type of x's elements (``RowOf<W>``),
// how many rows go together (``kMaxRows<W>``), and ``multiply_tile<M>``; AMX has multiply_by_amx for
// bf16 in place of the last.
#pragma once

#include <type_traits>

#include "rows.h"
#include "tile_amx.h"
#include "tile_bf16.h"
#include "tile_fma.h"

namespace sortserve {

#if defined(SORTSERVE_MULTIPLIES_BF16)
template <typename W>
using RowOf = W;
template <typename W>
constexpr int kMaxRows = std::is_same<W, bf16>::value ? kBf16Rows : kFmaRows;
#else
template <typename W>
using RowOf = float;
template <typename W>
constexpr int kMaxRows = kFmaRows;
#endif

// Whether rows of bf16 may lie in tiles: see Rows.
#if defined(SORTSERVE_HAS_AMX)
constexpr bool kReadsTiles = true;
#else
constexpr bool kReadsTiles = false;
#endif

// How many bytes of x go through all panels together, and of how many rows their number is a
// multiple if there are more.
#if defined(SORTSERVE_HAS_AMX)
template <typename W>
constexpr int64_t kBlockBytes = std::is_same<W, bf16>::value ? 512 << 10 : 256 << 10;
template <typename W>
constexpr int64_t kRowsOfBlocks = std::is_same<W, bf16>::value ? kBf16Rows : 1;
#else
template <typename W>
constexpr int64_t kBlockBytes = 256 << 10;
template <typename W>
constexpr int64_t kRowsOfBlocks = 1;
#endif

template <typename W, int M = kMaxRows<W>>
inline void multiply_any(int64_t num_rows, const RowOf<W>* x, int64_t x_stride, const W* panel,
                         int64_t num_inputs, float* outputs, const Ahead& ahead) {
  if constexpr (M > 1)
    if (num_rows != M)
      return multiply_any<W, M - 1>(num_rows, x, x_stride, panel, num_inputs, outputs, ahead);
  multiply_tile<M>(x, x_stride, panel, num_inputs, outputs, ahead);
}

// What tile ``tile`` of ``num_tiles`` brings near: ``next`` as a whole, or half each by the first two.
template <typename W>
Ahead ahead_of(int64_t tile, int64_t num_tiles, const W* panel, const W* next, int64_t num_inputs) {
  const int64_t panel_size = (num_inputs + kPack<W> - 1) / kPack<W> * kPack<W> * kPanel;
  if (num_tiles == 1) return {next, true};
  if (tile < 2) return {next + tile * panel_size / 2, false};
  return {panel, false};
}

template <typename W, typename Write>
inline void multiply_by_tiles(int64_t num_rows, const Rows<const RowOf<W>>& x, const W* panel,
                              int64_t num_inputs, const W* next, const Write& write) {
  const int64_t num_tiles = (num_rows + kMaxRows<W> - 1) / kMaxRows<W>;
  for (int64_t i = 0; i < num_tiles; ++i) {
    const int64_t first = i * num_rows / num_tiles, end = (i + 1) * num_rows / num_tiles;
    alignas(64) float outputs[kMaxRows<W> * kPanel];
    multiply_any<W>(end - first, x.at(first, 0), x.stride, panel, num_inputs, outputs,
                    ahead_of(i, num_tiles, panel, next, num_inputs));
    write(first, outputs, end - first);
  }
}

#if !defined(SORTSERVE_HAS_AMX)
struct Turn {};
#endif

// Any number of rows against one panel: write(m, sums [n, 32], n) for rows m to m + n - 1 and so for
// all, meanwhile panel ``next`` is brought near. Of an odd number of inputs the last is half of a pair,
// whose other half is zero in the panel, and must be finite in x.
template <typename W, typename Write>
inline void multiply_rows(Turn& turn, int64_t num_rows, const Rows<const RowOf<W>>& x,
                          const W* panel, int64_t num_inputs, const W* next, const Write& write) {
#if defined(SORTSERVE_HAS_AMX)
  if constexpr (std::is_same<W, bf16>::value)
    multiply_by_amx(turn, num_rows, x, panel, num_inputs, next, write);
  else
#endif
    multiply_by_tiles<W>(num_rows, x, panel, num_inputs, next, write);
}

}  // namespace sortserve
