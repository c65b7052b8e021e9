// The inner loop of all matrix products: M rows of x against one panel of 32 outputs.
//
// A panel of bf16 is [k / 2][32 outputs][2]: pairs of inputs lie side by side, as vdpbf16ps and AMX
// want them, and one shift or mask apart from fp32. A panel of fp32 is [k][32 outputs]. An output
// is one chain of sums over k, in the same order whatever M is; libraries choose another kernel, and
// so another order, for one row than for many.
//
// What an instruction set brings for a type of weights W: the type of x's elements (``RowOf<W>``),
// how many rows go together (``kMaxRows<W>``), and ``multiply_tile<M>``; AMX takes any number of rows
// with the same instructions.
#pragma once

#include <type_traits>

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

template <typename W, int M = kMaxRows<W>>
inline void multiply_any(int64_t num_rows, const RowOf<W>* x, int64_t x_stride, const W* panel,
                         int64_t num_inputs, float* outputs, const Ahead& ahead) {
  if constexpr (M > 1)
    if (num_rows != M)
      return multiply_any<W, M - 1>(num_rows, x, x_stride, panel, num_inputs, outputs, ahead);
  multiply_tile<M>(x, x_stride, panel, num_inputs, outputs, ahead);
}

#if defined(SORTSERVE_HAS_AMX)
template <>
inline void multiply_any<bf16, kBf16Rows>(int64_t num_rows, const bf16* x, int64_t x_stride,
                                          const bf16* panel, int64_t num_inputs, float* outputs,
                                          const Ahead& ahead) {
  multiply_by_amx(num_rows, x, x_stride, panel, num_inputs, outputs, ahead);
}
#endif

// 1 <= num_rows <= kMaxRows<W>: write(m, outputs 0 to 15, outputs 16 to 31) for each row. Of an odd
// number of inputs the last is half of a pair, whose other half is zero in the panel, and must be
// finite in x.
template <typename W, typename Write>
inline void multiply_rows(int64_t num_rows, const RowOf<W>* x, int64_t x_stride, const W* panel,
                          int64_t num_inputs, const Write& write, const Ahead& ahead) {
  alignas(64) float outputs[kMaxRows<W> * kPanel];
  multiply_any<W>(num_rows, x, x_stride, panel, num_inputs, outputs, ahead);
  for (int64_t m = 0; m < num_rows; ++m)
    write(m, load(outputs + m * kPanel), load(outputs + m * kPanel + 16));
}

}  // namespace sortserve
