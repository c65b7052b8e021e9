// Scores of decode attention: dot products of one query with keys that lie one after another, as
// many keys at a time as a vector has lanes. Each keeps a vector of partial sums; the vectors are
// summed together at the end, so that no key pays for a sum of its own.
#pragma once

#include <algorithm>

#include "vec.h"

namespace sortserve {

// ---- lane i of the result: the sum of v[i]

#if defined(__AVX512F__)

inline lanes sums_of(lanes (&sums)[16]) {
  // Each round adds halves and interleaves two vectors: lane 4 i + j ends with v[i + 4 j].
  __m512 v[16];
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) v[p] = (__m512)sums[4 * (p % 4) + p / 4];
  for (int i = 0; i < 8; ++i)
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 8]), _mm512_unpackhi_ps(v[i], v[i + 8]));
  for (int i = 0; i < 4; ++i)
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 4]), _mm512_unpackhi_ps(v[i], v[i + 4]));
  const auto add_lanes = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return (lanes)add_lanes(add_lanes(v[0], v[1]), add_lanes(v[2], v[3]));
}

#elif defined(__AVX2__)

inline lanes sums_of(lanes (&sums)[8]) {
  // hadd adds neighbours; the two halves are added at the end.
  const auto sums_of_4 = [](const lanes* v) {
    return _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]),
                          _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
  };
  const __m256 low = sums_of_4(sums), high = sums_of_4(sums + 4);
  return (lanes)_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                              _mm256_permute2f128_ps(low, high, 0x31));
}

#else

inline lanes sums_of(lanes (&sums)[4]) {
  lanes result;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) result[i] = (sums[i][0] + sums[i][2]) + (sums[i][1] + sums[i][3]);
  return result;
}

#endif

// ---- elements that meet in one step: a vector of them, or a vector of pairs

template <typename T>
struct Elements {
  static constexpr int kCount = kLanes;
  lanes values;

  static Elements at(const T* p) { return {load_lanes(p)}; }
  lanes multiply_add(const Elements& other, lanes sum) const {
    return fma(values, other.values, sum);
  }
};

template <>
struct Elements<bf16> {
  static constexpr int kCount = 2 * kLanes;
  u32_lanes pairs;

  static Elements at(const bf16* p) { return {load_as<u32_lanes>(p)}; }
  lanes multiply_add(const Elements& other, lanes sum) const {
#if defined(__AVX512BF16__)
    return (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)other.pairs);
#else
    return fma(odd_of(pairs), odd_of(other.pairs), fma(even_of(pairs), even_of(other.pairs), sum));
#endif
  }
};

// The first n elements; the others are zero.
template <typename T>
inline Elements<T> first_elements(const T* p, int64_t n) {
  T padded[Elements<T>::kCount] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return Elements<T>::at(padded);
}

// Keys at a stride of ``dim``; those from n on, if n < kLanes, count as the first.
template <bool all, typename T>
inline lanes dots_of_keys(const T* query, const T* keys, int64_t dim, int64_t n) {
  constexpr int kCount = Elements<T>::kCount;
  const auto key_at = [&](int64_t key) { return keys + (all || key < n ? key : 0) * dim; };
  lanes sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kCount <= dim; i += kCount) {
    const auto q = Elements<T>::at(query + i);
#pragma GCC unroll 16
    for (int key = 0; key < kLanes; ++key)
      sums[key] = q.multiply_add(Elements<T>::at(key_at(key) + i), sums[key]);
  }
  if (i < dim) {
    const auto q = first_elements(query + i, dim - i);
#pragma GCC unroll 16
    for (int key = 0; key < kLanes; ++key)
      sums[key] = q.multiply_add(first_elements(key_at(key) + i, dim - i), sums[key]);
  }
  return sums_of(sums);
}

// scores[j] = query . key j for j < n; what follows, up to the next multiple of kLanes, is written.
template <typename T>
inline void dots(const T* query, const T* keys, int64_t dim, int64_t n, float* scores) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    store_lanes(scores + j, dots_of_keys<true>(query, keys + j * dim, dim, kLanes));
  if (j < n) store_lanes(scores + j, dots_of_keys<false>(query, keys + j * dim, dim, n - j));
}

}  // namespace sortserve
