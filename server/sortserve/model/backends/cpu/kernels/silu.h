// The gate of an MLP: x / (1 + e^-x).
#pragma once

#include <type_traits>

#include "exp2.h"

namespace sortserve {

// 1 / x for 1 <= x <= 2^126, to 2^-14 of itself or better.
inline lanes reciprocal_roughly(lanes x) {
#if defined(__AVX512F__)
  return (lanes)_mm512_rcp14_ps((__m512)x);
#else
  return 1.0f / x;
#endif
}

// To 7e-5 of itself, a fiftieth of a step of bf16. Below -86 it goes on as x / 2^125, which is next
// to nothing, and takes -inf to -inf.
inline lanes silu_roughly(lanes x) {
  const lanes exponent = x * splat_lanes(-1.44269504f), limit = splat_lanes(125.0f);
  const lanes power = exp2_roughly(exponent < limit ? exponent : limit);
  return x * reciprocal_roughly(1.0f + power);
}

// As exact as a result of type T can say.
template <typename T>
inline f32x16 silu(const f32x16& x) {
  if constexpr (std::is_same<T, bf16>::value)
    return f32x16::of_parts([&](int i) { return silu_roughly(x.part[i]); });
  else
    return x / (1.0f + exp(-x));
}

}  // namespace sortserve
