// What happens to a panel's sums: bias, activation, rounding.
#pragma once

#include "kernels.h"
#include "panel.h"
#include "silu.h"

namespace sortserve {

// Rows of one panel, from ``row`` on: sums [count, 32] to y, rows of num_outputs in T (kFp32: in
// float). None of these is inlined: the same instructions for all tiles.

template <typename T>
__attribute__((noinline)) static void write_gated(const Rows<T>& y, int64_t row, int64_t column,
                                                  const float* sums, int64_t count) {
  for (const int64_t end = row + count; row < end; ++row, sums += kPanel)
    store(y.at(row, column), silu<T>(load(sums)) * load(sums + 16));
}

template <typename T>
__attribute__((noinline)) static void write_plain(const Rows<T>& y, int64_t row, int64_t column,
                                                  const float* sums, int64_t count) {
  for (const int64_t end = row + count; row < end; ++row, sums += kPanel)
    store_two(y.at(row, column), load(sums), load(sums + 16));
}

// With a bias, or where outputs end within the panel.
template <typename T>
__attribute__((noinline)) static void write_any(const Matrix& matrix, const Rows<T>& y, int64_t row,
                                                int64_t panel, const float* sums, int64_t count) {
  const float none[kPanel] = {};
  const float* bias = matrix.bias == nullptr ? none : matrix.bias + panel * kPanel;
  const bool is_gated = matrix.output == kSiluMul;
  const int64_t column = panel * (is_gated ? kPanel / 2 : kPanel);
  const int64_t left = matrix.num_outputs - column;
  for (const int64_t end = row + count; row < end; ++row, sums += kPanel) {
    const f32x16 a = load(sums) + load(bias), b = load(sums + 16) + load(bias + 16);
    T* out = y.at(row, column);
    store(out, is_gated ? silu<T>(a) * b : a, left);
    if (!is_gated && left > 16) store(out + 16, b, left - 16);
  }
}

template <typename T>
inline void write_outputs_as(const Matrix& matrix, const Results& y, int64_t row, int64_t panel,
                             const float* sums, int64_t count) {
  const Rows<T> rows = {static_cast<T*>(y.data), matrix.num_outputs, y.in_tiles};
  const int64_t width = matrix.output == kSiluMul ? kPanel / 2 : kPanel, column = panel * width;
  if (matrix.bias != nullptr || column + width > matrix.num_outputs)
    write_any(matrix, rows, row, panel, sums, count);
  else if (matrix.output == kSiluMul)
    write_gated(rows, row, column, sums, count);
  else
    write_plain(rows, row, column, sums, count);
}

template <typename T>
inline void write_outputs(const Matrix& matrix, const Results& y, int64_t row, int64_t panel,
                          const float* sums, int64_t count) {
  if (matrix.output == kFp32)
    write_outputs_as<float>(matrix, y, row, panel, sums, count);
  else
    write_outputs_as<T>(matrix, y, row, panel, sums, count);
}

}  // namespace sortserve
