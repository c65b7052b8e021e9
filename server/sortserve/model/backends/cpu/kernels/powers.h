// Powers of two as pairs of bf16, for probabilities that are to be multiplied in bf16.
//
// An exponent is rounded to a 128th. Its integer part is the exponent of the result, and a table has
// the seven bits of the mantissa for each of 128 fractions: no polynomial, and one look-up for 32
// numbers.
#pragma once

#include <cmath>

#include "words.h"

namespace sortserve {

// The mantissas of 2^(i / 128) for 0 <= i < 128, to the nearest.
struct Mantissas {
  alignas(64) uint8_t bits[128];

  Mantissas() {
    for (int i = 0; i < 128; ++i)
      bits[i] = static_cast<uint8_t>(std::lround(128 * (std::exp2(i / 128.0) - 1)));
  }
};
inline const Mantissas kMantissas;

// 2^(x * scale - largest) to 0.7 % of itself and without a bias, 0 where that is below 2^-126.
// ``largest`` are integers, and x * scale is less than 127 above them.
class Powers {
 public:
  Powers(float scale, const f32x16& largest)
      : factor_(scale * kOne), offset_((127.0f - largest) * kOne + kZero) {}

  // to[i] = the powers of even[i] and odd[i]; both are added to total[i].
  void store(uint32_t* to, const f32x16& even, const f32x16& odd, f32x16& total) const {
    total = f32x16::of_parts([&](int i) {
      return store_part(to + i * kLanes, fixed(even, i), fixed(odd, i), total.part[i]);
    });
  }

 private:
  // A float of this size has no fraction: its last bits are an integer, here of 128ths. The bias of
  // the exponent is added already.
  static constexpr float kOne = 128, kZero = 12582912;  // 1.5 * 2^23

  i32_lanes fixed(const f32x16& x, int i) const {
    const lanes sum = fma(x.part[i], factor_.part[i], offset_.part[i]), zero = splat_lanes(kZero);
#if defined(__AVX512F__)
    return (i32_lanes)_mm512_castps_si512(_mm512_max_ps((__m512)sum, (__m512)zero));
#else
    return bit_cast<i32_lanes>(sum > zero ? sum : zero);
#endif
  }

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
  static lanes store_part(uint32_t* to, i32_lanes even, i32_lanes odd, lanes total) {
    const __m512i low = load_as<__m512i>(kMantissas.bits);
    const __m512i high = load_as<__m512i>(kMantissas.bits + 64);
    const __m512i both =
        _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)even, _mm512_slli_epi32((__m512i)odd, 16));
    const __m512i mantissas = _mm512_permutex2var_epi8(low, both, high);  // of the low bytes
    const __m512i words =  // which of two the first says
        _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x7f), mantissas, both, 0xca);
    _mm512_storeu_si512(to, words);
    const __m512i ones = _mm512_set1_epi16(0x3f80);
    return (lanes)_mm512_dpbf16_ps((__m512)total, (__m512bh)words, (__m512bh)ones);
  }
#else
  static lanes store_part(uint32_t* to, i32_lanes even, i32_lanes odd, lanes total) {
    const auto power = [](int32_t fixed) {
      return bf16{static_cast<uint16_t>((fixed & 0xff80) | kMantissas.bits[fixed & 0x7f])};
    };
    for (int i = 0; i < kLanes; ++i) to[i] = pair_of(power(even[i]), power(odd[i]));
    const u32_lanes pairs = load_as<u32_lanes>(to);
    return total + (even_of(pairs) + odd_of(pairs));
  }
#endif

  f32x16 factor_, offset_;
};

}  // namespace sortserve
