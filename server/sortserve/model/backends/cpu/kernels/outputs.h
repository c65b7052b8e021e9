// What happens to a panel's sums: bias, activation, rounding.
#pragma once

#include "kernels.h"
#include "panel.h"
#include "silu.h"

namespace sortserve {

// One row of one panel: outputs 0 to 15 (a) and 16 to 31 (b) to y, rows of num_outputs in T (kFp32:
// in float). Not inlined: the same instructions for all tiles.
template <typename T>
__attribute__((noinline)) void write_outputs(const Matrix& matrix, const Results& y, int64_t token,
                                             int64_t panel, f32x16 a, f32x16 b) {
  if (matrix.bias != nullptr) {
    a += load(matrix.bias + panel * kPanel);
    b += load(matrix.bias + panel * kPanel + 16);
  }
  if (matrix.output == kSiluMul) {
    const int64_t first = panel * kPanel / 2;
    const Rows<T> rows = {static_cast<T*>(y.data), matrix.num_outputs, y.in_tiles};
    return store(rows.at(token, first), silu<T>(a) * b, matrix.num_outputs - first);
  }
  const int64_t first = panel * kPanel, left = matrix.num_outputs - first;
  const auto both = [&](auto* data) {
    const Rows<std::remove_pointer_t<decltype(data)>> rows = {data, matrix.num_outputs, y.in_tiles};
    auto* out = rows.at(token, first);
    store(out, a, left);
    if (left > 16) store(out + 16, b, left - 16);
  };
  matrix.output == kFp32 ? both(static_cast<float*>(y.data)) : both(static_cast<T*>(y.data));
}

}  // namespace sortserve
