// Scores of decode attention: dot products of the query heads of a group with keys that lie one after
// another. Some heads and some keys go together: every pair of them has a vector of partial sums, so
// that a key is loaded and widened once for these heads. The vectors are summed together at the end,
// so that no key pays for a sum of its own.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace sortserve {

// Heads and keys that go together: as many as the registers have sums for. AVX-512 widens nothing
// and sums sixteen vectors at a time, so that a head goes alone.
constexpr int kHeadsTogether = kLanes == 16 ? 1 : 3;
constexpr int keys_together(int heads) { return heads == 1 ? kLanes : 4; }

// fn(constant G, first head) for heads [first, num_heads), as many at a time as kMost, else fewer.
template <int kMost, typename Fn>
inline void for_heads(int64_t first, int64_t num_heads, const Fn& fn) {
  for (; first + kMost <= num_heads; first += kMost)
    fn(std::integral_constant<int, kMost>{}, first);
  if constexpr (kMost > 1) for_heads<kMost - 1>(first, num_heads, fn);
}

// ---- to[i] = the sum of sums[i]

#if defined(__AVX512F__)

inline void store_sums(float* to, lanes (&sums)[16]) {
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
  store_lanes(to, (lanes)add_lanes(add_lanes(v[0], v[1]), add_lanes(v[2], v[3])));
}

#elif defined(__AVX2__)

// Four sums at a time: hadd adds neighbours, and the two halves are added at the end.
template <int N>
inline void store_sums(float* to, lanes (&sums)[N]) {
#pragma GCC unroll 2
  for (int i = 0; i < N; i += 4) {
    const __m256 low = _mm256_hadd_ps((__m256)sums[i], (__m256)sums[i + 1]);
    const __m256 high = _mm256_hadd_ps((__m256)sums[i + 2], (__m256)sums[i + 3]);
    const __m256 halves = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(to + i,
                  _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }
}

#else

inline void store_sums(float* to, lanes (&sums)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) to[i] = (sums[i][0] + sums[i][2]) + (sums[i][1] + sums[i][3]);
}

#endif

// ---- a run: the elements of a key that one load brings, as kVectors vectors

template <typename T>
struct Run {
  using Vector = lanes;
  static constexpr int kVectors = 1, kCount = kLanes;

  template <int>
  static lanes vector_of(const T* run) {
    return load_lanes(run);
  }
  static void multiply_add(lanes& sum, lanes query, lanes key) { accumulate(sum, query, key); }
};

#if defined(__AVX512BF16__)

template <>
struct Run<bf16> {
  using Vector = u32_lanes;  // pairs
  static constexpr int kVectors = 1, kCount = 2 * kLanes;

  template <int>
  static u32_lanes vector_of(const bf16* run) {
    return load_as<u32_lanes>(run);
  }
  static void multiply_add(lanes& sum, u32_lanes query, u32_lanes key) {
    sum = (lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)query, (__m512bh)key);
  }
};

#else

template <>
struct Run<bf16> {
  using Vector = lanes;
  static constexpr int kVectors = 2, kCount = 2 * kLanes;  // the even ones, and the odd ones

  template <int which>
  static lanes vector_of(const bf16* run) {
    const u32_lanes pairs = load_as<u32_lanes>(run);
    return which == 0 ? even_of(pairs) : odd_of(pairs);
  }
  static void multiply_add(lanes& sum, lanes query, lanes key) { accumulate(sum, query, key); }
};

#endif

// ---- queries, made into the vectors that they are multiplied as: once for all keys

template <typename T>
inline int64_t query_size(int64_t dim) {
  return (dim + Run<T>::kCount - 1) / Run<T>::kCount * Run<T>::kVectors * kLanes;
}

// to: [query_size]; elements past the end are zero.
template <typename T>
inline void prepare_query(const T* query, int64_t dim, float* to) {
  using R = Run<T>;
  for (int64_t i = 0; i < dim; i += R::kCount) {
    T run[R::kCount] = {};
    std::memcpy(run, query + i, std::min<int64_t>(R::kCount, dim - i) * sizeof(T));
    const auto append = [&](typename R::Vector v) {
      std::memcpy(to, &v, sizeof(v));
      to += kLanes;
    };
    append(R::template vector_of<0>(run));
    if constexpr (R::kVectors == 2) append(R::template vector_of<1>(run));
  }
}

// ---- dot products

// Adds vector ``which`` of a run of each key.
template <typename T, int which, int G, int N>
inline void add_run(const float* queries, int64_t size, const T* keys, int64_t key_stride,
                    lanes (&sums)[G][N]) {
  using Vector = typename Run<T>::Vector;
  Vector query[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) query[g] = load_as<Vector>(queries + g * size + which * kLanes);
#pragma GCC unroll 16
  for (int key = 0; key < N; ++key) {
    const Vector v = Run<T>::template vector_of<which>(keys + key * key_stride);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) Run<T>::multiply_add(sums[g][key], query[g], v);
  }
}

// Keys of a whole number of runs, as many as go together; as many bytes are brought near from
// ``ahead``. Not inlined, so that the sums have the registers to themselves.
template <int G, typename T>
__attribute__((noinline)) void dots_of_keys(const float* queries, int64_t size, const T* keys,
                                            int64_t key_stride, const T* ahead, float* scores,
                                            int64_t stride) {
  using R = Run<T>;
  constexpr int N = keys_together(G);
  lanes sums[G][N] = {};
  for (int64_t i = 0; i < size; i += R::kVectors * kLanes) {
#pragma GCC unroll 16
    for (int j = 0; j < N * R::kCount; j += 64 / sizeof(T)) __builtin_prefetch(ahead + j, 0, 2);
    ahead += N * R::kCount;
    add_run<T, 0>(queries + i, size, keys, key_stride, sums);
    if constexpr (R::kVectors == 2) add_run<T, 1>(queries + i, size, keys, key_stride, sums);
    keys += R::kCount;
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) store_sums(scores + g * stride, sums[g]);
}

// scores[g * stride + j] = query g . key j for g < G and j < n; up to 15 more of each are written.
// Meanwhile as many bytes as the keys have are brought near from ``ahead``.
template <int G, typename T>
inline void dots(const float* queries, const T* keys, int64_t dim, int64_t n, const T* ahead,
                 float* scores, int64_t stride) {
  constexpr int N = keys_together(G);
  const int64_t size = query_size<T>(dim);
  const int64_t padded_dim = size / (Run<T>::kVectors * kLanes) * Run<T>::kCount;
  for (int64_t j = 0; j < n; j += N) {
    if (j + N <= n && dim == padded_dim) {
      dots_of_keys<G>(queries, size, keys + j * dim, dim, ahead + j * dim, scores + j, stride);
      continue;
    }
    thread_local std::vector<T> padded;
    padded.assign(N * padded_dim, T{});
    for (int64_t key = 0; key < std::min<int64_t>(N, n - j); ++key)
      std::memcpy(padded.data() + key * padded_dim, keys + (j + key) * dim, dim * sizeof(T));
    dots_of_keys<G>(queries, size, padded.data(), padded_dim, ahead + j * dim, scores + j,
                    stride);
  }
}

// The query heads of one group, for as many keys as are asked for.
template <typename T>
class GroupQueries {
 public:
  GroupQueries(const T* queries, int64_t group, int64_t dim) : group_(group), dim_(dim) {
    thread_local std::vector<float> vectors;
    vectors.resize(group * query_size<T>(dim));
    vectors_ = vectors.data();
    for (int64_t g = 0; g < group; ++g)
      prepare_query(queries + g * dim, dim, vectors_ + g * query_size<T>(dim));
  }

  // scores[g * stride + j] = query g . key j for all g and j < n; up to 15 more of each are written.
  // Meanwhile as many bytes as the keys have are brought near from ``ahead``.
  void score(const T* keys, int64_t n, int64_t, const T* ahead, float* scores,
             int64_t stride) const {
    for_heads<kHeadsTogether>(0, group_, [&](auto heads, int64_t g) {
      dots<decltype(heads)::value>(vectors_ + g * query_size<T>(dim_), keys, dim_, n, ahead,
                                   scores + g * stride, stride);
    });
  }

 private:
  const int64_t group_, dim_;
  float* vectors_;  // [group, query_size]
};

}  // namespace sortserve
