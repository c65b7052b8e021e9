// Tiles by instructions that multiply pairs of bf16 and add to fp32: AVX-512 BF16.
#pragma once

#include "panel.h"
#include "tile_ahead.h"
#include "vec.h"

#if defined(__AVX512BF16__) && !defined(SORTSERVE_HAS_AMX)
#define SORTSERVE_MULTIPLIES_BF16 1

namespace sortserve {

constexpr int kBf16Rows = 12;  // 24 accumulators of 32 registers

// outputs: [M, 32]. Each vector of weights is loaded once for M rows.
template <int M>
__attribute__((noinline)) void multiply_tile(const bf16* x, int64_t x_stride, const bf16* panel,
                                             int64_t num_inputs, float* outputs, Ahead ahead) {
  __m512 sums[M][2] = {};
  const int64_t pairs = (num_inputs + 1) / 2;
  const char* near = ahead.first(0, 1, pairs);
  const int64_t line = ahead.whole ? 128 : 64;
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel + k * 2 * kPanel);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(panel + (k * 2 + 1) * kPanel);
    _mm_prefetch(near + k * line, _MM_HINT_T1);
    _mm_prefetch(near + k * line + line - 64, _MM_HINT_T1);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, x + m * x_stride + 2 * k, sizeof(pair));
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      sums[m][0] = _mm512_dpbf16_ps(sums[m][0], w0, both);
      sums[m][1] = _mm512_dpbf16_ps(sums[m][1], w1, both);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(outputs + m * kPanel + v * 16, sums[m][v]);
}

}  // namespace sortserve

#endif
