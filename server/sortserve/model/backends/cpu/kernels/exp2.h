// 2^x, as near as bf16 needs it.
#pragma once

#include "vec.h"

namespace sortserve {

// To 3e-6 of itself, for x below 128; 0 far below -126.
inline lanes exp2_roughly(lanes x) {
#if defined(__AVX512F__)
  const lanes r = (lanes)_mm512_reduce_ps((__m512)x, 1);  // x less the integer below
#else
  const i32_lanes live = x > splat_lanes(-126.0f);
  x = bit_cast<lanes>(bit_cast<i32_lanes>(x) & live);
  // Adding 1.5 * 2^23 rounds to an integer.
  const lanes shifted = (x - splat_lanes(0.5f)) + splat_lanes(12582912.0f);
  const lanes r = x - (shifted - splat_lanes(12582912.0f));
#endif
  lanes p = splat_lanes(1.35341671e-2f);  // minimax for 0 <= r <= 1
  for (const float c : {5.20114622e-2f, 2.41442756e-1f, 6.93003835e-1f, 1.00000259f})
    p = fma(p, r, splat_lanes(c));
#if defined(__AVX512F__)
  return (lanes)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  const i32_lanes exponent = (bit_cast<i32_lanes>(shifted) - 0x4b400000 + 127) << 23;
  return bit_cast<lanes>(bit_cast<i32_lanes>(p * bit_cast<lanes>(exponent)) & live);
#endif
}

inline f32x16 exp2_roughly(const f32x16& x) {
  return f32x16::of_parts([&](int i) { return exp2_roughly(x.part[i]); });
}

}  // namespace sortserve
