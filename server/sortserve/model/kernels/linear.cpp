// y = x W^T + b in bf16 with fp32 accumulation, for CPUs with AVX-512 BF16.
//
// Weights are packed in panels of 32 outputs: [panel][k / 2][32 outputs][2], which is the order in
// which vdpbf16ps wants them, so that a step over few tokens streams them once, in order. Up to 12
// tokens share each load. Every output is summed over k in the same order whatever the number of
// tokens: a token's result does not depend on the tokens beside it.

#include "parallel.h"
#include "vec.h"

namespace sortserve {

enum Output : int64_t { kBf16 = 0, kFp32 = 1, kSiluMul = 2 };

struct LinearCall {
  const bf16* x;       // [num_tokens, num_inputs]
  const bf16* packed;  // [panels, num_inputs / 2, 32, 2]
  const float* bias;   // [panels * 32], or null
  void* y;             // [num_tokens, num_outputs]
  int64_t num_tokens, num_inputs, num_outputs;
  int64_t output;  // an Output; kSiluMul: a panel is 16 gates, then the same 16 ups
  int64_t num_threads;
};

#if defined(__AVX512BF16__)

constexpr int kPanel = 32;
constexpr int kMaxTokens = 12;  // 24 accumulators of 32 registers

static void write(const LinearCall& call, int64_t token, int64_t panel, f32x16 a, f32x16 b) {
  if (call.bias != nullptr) {
    a += load(call.bias + panel * kPanel);
    b += load(call.bias + panel * kPanel + 16);
  }
  if (call.output == kSiluMul) {
    bf16* y = static_cast<bf16*>(call.y) + token * call.num_outputs + panel * 16;
    return store(y, silu(a) * b, call.num_outputs - panel * 16);
  }
  const int64_t left = call.num_outputs - panel * kPanel;
  const int64_t offset = token * call.num_outputs + panel * kPanel;
  const auto both = [&](auto* y) {
    store(y, a, left);
    if (left > 16) store(y + 16, b, left - 16);
  };
  call.output == kFp32 ? both(static_cast<float*>(call.y) + offset)
                       : both(static_cast<bf16*>(call.y) + offset);
}

template <int M>
static void tile(const LinearCall& call, int64_t panel, int64_t token) {
  const int64_t pairs = call.num_inputs / 2;
  const bf16* weights = call.packed + panel * pairs * (2 * kPanel);
  const bf16* x = call.x + token * call.num_inputs;
  __m512 sums[M][2] = {};
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(weights + k * 2 * kPanel);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(weights + k * 2 * kPanel + kPanel);
    for (int m = 0; m < M; ++m) {
      int32_t pair;
      std::memcpy(&pair, x + m * call.num_inputs + 2 * k, sizeof(pair));
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      sums[m][0] = _mm512_dpbf16_ps(sums[m][0], w0, both);
      sums[m][1] = _mm512_dpbf16_ps(sums[m][1], w1, both);
    }
  }
  for (int m = 0; m < M; ++m)
    write(call, token + m, panel, (f32x16)sums[m][0], (f32x16)sums[m][1]);
}

using Tile = void (*)(const LinearCall&, int64_t, int64_t);
constexpr Tile kTiles[kMaxTokens + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>,
                                         tile<5>, tile<6>, tile<7>, tile<8>, tile<9>,
                                         tile<10>, tile<11>, tile<12>};

extern "C" int64_t sortserve_has_bf16_linear() { return 1; }

extern "C" void sortserve_linear(const LinearCall* call_ptr) {
  const LinearCall& call = *call_ptr;
  const int64_t width = call.output == kSiluMul ? kPanel / 2 : kPanel;
  const int64_t num_panels = (call.num_outputs + width - 1) / width;
  const int64_t num_tiles = (call.num_tokens + kMaxTokens - 1) / kMaxTokens;
  const int64_t grain = std::max<int64_t>(1, num_panels / (call.num_threads * 8));
  parallel_for(num_panels, grain, call.num_threads, [&](int64_t panel) {
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t first = i * call.num_tokens / num_tiles;
      const int64_t last = (i + 1) * call.num_tokens / num_tiles;
      kTiles[last - first](call, panel, first);
    }
  });
}

#else

extern "C" int64_t sortserve_has_bf16_linear() { return 0; }
extern "C" void sortserve_linear(const LinearCall*) {}

#endif

}  // namespace sortserve
