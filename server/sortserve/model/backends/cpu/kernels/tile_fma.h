// Tiles by fp32 multiply-adds, on any CPU: weights in fp32, or in bf16 and widened in registers.
#pragma once

#include "panel.h"
#include "tile_ahead.h"
#include "vec.h"

namespace sortserve {

// Inputs that lie side by side in a panel.
template <typename W>
constexpr int kPack = 4 / sizeof(W);

// Weights of one input (``which`` of those that are packed) and of kLanes outputs.
template <int which>
inline lanes weights_of(const float* at) {
  return load_lanes(at);
}
template <int which>
inline lanes weights_of(const bf16* at) {
  const u32_lanes pairs = load_as<u32_lanes>(at);
  return which == 0 ? even_of(pairs) : odd_of(pairs);
}

// Rows and vectors of outputs that fit the registers: with one of x and those of the weights, 27 of
// 32, 15 of 16.
#if defined(__AVX512F__)
constexpr int kFmaRows = 12;
constexpr int vectors_of(int) { return 2; }
#elif defined(__aarch64__)
constexpr int kFmaRows = 6;
constexpr int vectors_of(int) { return 4; }
#elif defined(__AVX2__)
constexpr int kFmaRows = 6;
constexpr int vectors_of(int rows) { return rows <= 2 ? 4 : 2; }
#else
constexpr int kFmaRows = 4;
constexpr int vectors_of(int rows) { return rows <= 2 ? 4 : 2; }
#endif

// sums += x times the weights of input ``which`` of a pack, for V vectors of outputs.
template <int which, int M, int V, typename W>
inline void multiply_input(const float* x, int64_t x_stride, const W* at, lanes (&sums)[M][V]) {
  lanes w[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) w[v] = weights_of<which>(at + v * kLanes * kPack<W>);
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    const lanes both = splat_lanes(x[m * x_stride + which]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) accumulate(sums[m][v], both, w[v]);
  }
}

// outputs: [M, 32]. Not inlined, so that the sums have the registers to themselves.
template <int M, typename W>
__attribute__((noinline)) void multiply_tile_by_fma(const float* x, int64_t x_stride,
                                                    const W* panel, int64_t num_inputs,
                                                    float* outputs, Ahead ahead) {
  constexpr int V = vectors_of(M), kPasses = kPanel / (V * kLanes);
  const int64_t steps = (num_inputs + kPack<W> - 1) / kPack<W>;
  for (int pass = 0; pass < kPasses; ++pass) {
    lanes sums[M][V] = {};
    const W* at = panel + pass * V * kLanes * kPack<W>;
    const char* near = ahead.first(pass, kPasses, steps);
    for (int64_t k = 0; k < steps; ++k) {
      __builtin_prefetch(near, 0, 2);
      if constexpr (kPasses == 1) __builtin_prefetch(near + 64, 0, 2);
      multiply_input<0>(x + k * kPack<W>, x_stride, at, sums);
      if constexpr (kPack<W> == 2) multiply_input<1>(x + k * kPack<W>, x_stride, at, sums);
      at += kPanel * kPack<W>;
      near += kPasses == 1 ? 128 : 64;
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        store_lanes(outputs + m * kPanel + (pass * V + v) * kLanes, sums[m][v]);
  }
}

template <int M>
inline void multiply_tile(const float* x, int64_t x_stride, const float* panel, int64_t num_inputs,
                          float* outputs, const Ahead& ahead) {
  multiply_tile_by_fma<M>(x, x_stride, panel, num_inputs, outputs, ahead);
}

#if !defined(SORTSERVE_MULTIPLIES_BF16)

template <int M>
inline void multiply_tile(const float* x, int64_t x_stride, const bf16* panel, int64_t num_inputs,
                          float* outputs, const Ahead& ahead) {
  multiply_tile_by_fma<M>(x, x_stride, panel, num_inputs, outputs, ahead);
}

#endif

}  // namespace sortserve
