// Words of 4 bytes that are pairs of bf16, the even one in the low half, as products read them.
#pragma once

#include "vec.h"

namespace sortserve {

inline uint32_t pair_of(bf16 even, bf16 odd) {
  return even.bits | static_cast<uint32_t>(odd.bits) << 16;
}

// to[i] = even[i] and odd[i], rounded to bf16.
inline void store_pairs(uint32_t* to, const f32x16& even, const f32x16& odd) {
#if defined(__AVX512BF16__)
  const __m512i order =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)odd.part[0], (__m512)even.part[0]);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, (__m512i)halves));
#else
  bf16 evens[16], odds[16];
  store(evens, even);
  store(odds, odd);
  for (int i = 0; i < 16; ++i) to[i] = pair_of(evens[i], odds[i]);
#endif
}

// to[i * to_stride + j] = from[j * from_stride + i] for i, j < 16.
inline void transpose_words(const uint32_t* from, int64_t from_stride, uint32_t* to,
                            int64_t to_stride) {
#if defined(__AVX512F__)
  // Words of 2 rows side by side, then of 4: lane L of v[4 i + j] is column 4 L + j of rows 4 i to
  // 4 i + 3. Then lanes of all rows.
  __m512i v[16];
  const auto row = [&](int i) { return _mm512_loadu_si512(from + i * from_stride); };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i low = _mm512_unpacklo_epi32(row(i), row(i + 1));
    const __m512i high = _mm512_unpackhi_epi32(row(i), row(i + 1));
    const __m512i next_low = _mm512_unpacklo_epi32(row(i + 2), row(i + 3));
    const __m512i next_high = _mm512_unpackhi_epi32(row(i + 2), row(i + 3));
    v[i] = _mm512_unpacklo_epi64(low, next_low);
    v[i + 1] = _mm512_unpackhi_epi64(low, next_low);
    v[i + 2] = _mm512_unpacklo_epi64(high, next_high);
    v[i + 3] = _mm512_unpackhi_epi64(high, next_high);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const auto store_columns = [&](int column, const __m512i& above, const __m512i& below) {
      _mm512_storeu_si512(to + column * to_stride, _mm512_shuffle_i32x4(above, below, 0x88));
      _mm512_storeu_si512(to + (column + 8) * to_stride, _mm512_shuffle_i32x4(above, below, 0xdd));
    };
    store_columns(j, _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88),
                  _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88));
    store_columns(4 + j, _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd),
                  _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[i * to_stride + j] = from[j * from_stride + i];
#endif
}

}  // namespace sortserve
