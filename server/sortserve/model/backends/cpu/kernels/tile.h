// The inner loop of all bf16 matrix products: M rows of x against one panel of 32 outputs.
//
// A panel is [k / 2][32 outputs][2], the order in which vdpbf16ps wants its operand: each vector of
// weights is loaded once for M rows. An output is summed over k in the same order whatever M is.
#pragma once

#include "vec.h"

namespace sortserve {

constexpr int kPanel = 32;

#if defined(__AVX512BF16__)
#define SORTSERVE_HAS_TILE 1

constexpr int kMaxRows = 12;  // 24 accumulators of 32 registers

// write(m, outputs 0 to 15, outputs 16 to 31) for each row. Meanwhile the 64 * pairs bytes at
// ``ahead`` are brought near.
template <int M, typename Write>
inline void multiply_tile(const bf16* x, int64_t x_stride, const bf16* panel, int64_t pairs,
                          const bf16* ahead, const Write& write) {
  __m512 sums[M][2] = {};
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel + k * 2 * kPanel);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(panel + k * 2 * kPanel + kPanel);
    _mm_prefetch(ahead + k * kPanel, _MM_HINT_T1);
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, x + m * x_stride + 2 * k, sizeof(pair));
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      sums[m][0] = _mm512_dpbf16_ps(sums[m][0], w0, both);
      sums[m][1] = _mm512_dpbf16_ps(sums[m][1], w1, both);
    }
  }
  for (int m = 0; m < M; ++m) write(m, (f32x16)sums[m][0], (f32x16)sums[m][1]);
}

// The same with 1 <= num_rows <= kMaxRows; ``ahead`` may be null.
template <typename Write>
inline void multiply_rows(int64_t num_rows, const bf16* x, int64_t x_stride, const bf16* panel,
                          int64_t pairs, const Write& write, const bf16* ahead = nullptr) {
  if (ahead == nullptr) ahead = panel;  // in the cache already
  switch (num_rows) {
    case 1: return multiply_tile<1>(x, x_stride, panel, pairs, ahead, write);
    case 2: return multiply_tile<2>(x, x_stride, panel, pairs, ahead, write);
    case 3: return multiply_tile<3>(x, x_stride, panel, pairs, ahead, write);
    case 4: return multiply_tile<4>(x, x_stride, panel, pairs, ahead, write);
    case 5: return multiply_tile<5>(x, x_stride, panel, pairs, ahead, write);
    case 6: return multiply_tile<6>(x, x_stride, panel, pairs, ahead, write);
    case 7: return multiply_tile<7>(x, x_stride, panel, pairs, ahead, write);
    case 8: return multiply_tile<8>(x, x_stride, panel, pairs, ahead, write);
    case 9: return multiply_tile<9>(x, x_stride, panel, pairs, ahead, write);
    case 10: return multiply_tile<10>(x, x_stride, panel, pairs, ahead, write);
    case 11: return multiply_tile<11>(x, x_stride, panel, pairs, ahead, write);
    case 12: return multiply_tile<12>(x, x_stride, panel, pairs, ahead, write);
  }
}

#endif

}  // namespace sortserve
