// Sums of decode attention: values that lie one after another, weighted by the probabilities of the
// query heads of a group. A value is loaded and widened once for as many heads as the registers have
// sums for.
#pragma once

#include "vec.h"

namespace sortserve {

// sums[g] += probabilities[g] * values, over n values and V vectors of columns; as many bytes are
// brought near from ``ahead``. Not inlined, so that the sums have the registers to themselves.
template <typename T, int G, int V>
__attribute__((noinline)) void add_values(const float* probabilities, int64_t stride,
                                          const T* values, int64_t dim, int64_t n, int64_t column,
                                          const T* ahead, float* sums, int64_t sums_stride) {
  lanes acc[G][V];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      acc[g][v] = load_lanes(sums + g * sums_stride + column + v * kLanes);
  for (int64_t j = 0; j < n; ++j) {
    const T* row = values + j * dim + column;
#pragma GCC unroll 8
    for (int i = 0; i < V * kLanes; i += 64 / sizeof(T))
      __builtin_prefetch(ahead + j * dim + column + i, 0, 2);
    lanes p[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) p[g] = splat_lanes(probabilities[g * stride + j]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const lanes value = load_lanes(row + v * kLanes, V > 1 ? kLanes : dim - column);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) accumulate(acc[g][v], p[g], value);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      store_lanes(sums + g * sums_stride + column + v * kLanes, acc[g][v]);
}

// All columns: as many at a time as the registers hold sums of, the rest a vector at a time (the
// last may be part of one).
template <int G, typename T>
inline void add_all_values(const float* probabilities, int64_t stride, const T* values,
                           int64_t dim, int64_t n, const T* ahead, float* sums,
                           int64_t sums_stride) {
  constexpr int kSums = kRegisters * 3 / 4 / G;
  constexpr int V = kSums >= 8 && kLanes < 16 ? 8 : kSums >= 4 ? 4 : 2;
  int64_t column = 0;
  for (; column + V * kLanes <= dim; column += V * kLanes)
    add_values<T, G, V>(probabilities, stride, values, dim, n, column, ahead, sums, sums_stride);
  for (; column < dim; column += kLanes)
    add_values<T, G, 1>(probabilities, stride, values, dim, n, column, ahead, sums, sums_stride);
}

}  // namespace sortserve
