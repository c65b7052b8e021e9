// Whether all numbers that went by were numbers.
#pragma once

#include "vec.h"

namespace sortserve {

class Ordered {
 public:
  void see(const f32x16& a, const f32x16& b) {
    for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
      seen_ = _mm512_mask_cmp_ps_mask(seen_, (__m512)a.part[i], (__m512)b.part[i], _CMP_ORD_Q);
#else
      const i32_lanes is_number = (a.part[i] == a.part[i]) & (b.part[i] == b.part[i]);
      for (int j = 0; j < kLanes; ++j) seen_ &= is_number[j] != 0;
#endif
    }
  }
  bool all() const { return seen_ == kAll; }

 private:
#if defined(__AVX512F__)
  static constexpr __mmask16 kAll = 0xffff;
  __mmask16 seen_ = kAll;
#else
  static constexpr bool kAll = true;
  bool seen_ = kAll;
#endif
};

}  // namespace sortserve
