// The inner loop of int8 matrix products: M rows of quantised x against one panel of 32 outputs.
//
// A panel is [blocks of 32 inputs] of 1088 bytes: [8][32 outputs][4 inputs] weights of a byte, then
// 32 scales in bf16, so that one stream of memory has both. Sums within a block are integers, hence
// exact in any order. Over blocks an output is one chain of fused multiply-adds, in the same order
// whatever M is.
//
// What an instruction set brings: ``Int8Tile`` with how many rows go together (kRows), what is added
// to a weight so that it is the byte that its instruction wants (kWeightOffset), ``add_block``, and
// what of a block its sums lack (``find_lacks``, where ``has_lacks``).
#pragma once

#include "panel.h"
#include "vec.h"

namespace sortserve {

constexpr int64_t kBlock = 32;
constexpr int64_t kBlockValueBytes = kBlock * kPanel;
constexpr int64_t kBlockBytes = kBlockValueBytes + kPanel * sizeof(bf16);

// Of 32 inputs of a row: x is about scale times its int8 values.
struct BlockScale {
  float scale;
  int32_t offset;  // minus the weight offset times the sum of the values
};

// The M rows of x of a tile, quantised. They lie together block by block, so that an instruction
// has the place of each in its address.
template <int M>
struct TileRows {
  const int8_t (*values)[M][kBlock];  // [blocks]
  const BlockScale (*scales)[M];      // [blocks]
};

// sums += the integers of a block, scaled; ``scales`` are the weights'.
inline void add_scaled(float* sums, lanes integers, lanes weight_scale, float x_scale) {
  store_lanes(sums, fma(integers, weight_scale * splat_lanes(x_scale), load_lanes(sums)));
}

#if defined(__AVX512VNNI__)

// vpdpbusd multiplies unsigned by signed bytes and sums four products: 512 products in a cycle on
// two pipes. Weights are the unsigned ones, so that what has to be taken off the sum depends on the
// row alone.
struct Int8Tile {
  static constexpr int kRows = 6;
  static constexpr int kWeightOffset = 128;

  static constexpr bool has_lacks(int64_t) { return false; }
  static void find_lacks(const uint8_t*, int16_t*) {}

  template <int M, bool kLacks>
  static void add_block(const int8_t (&x)[M][kBlock], const BlockScale (&x_scales)[M],
                        const uint8_t* block, const int16_t*, float (*sums)[kPanel]) {
    __m512i integers[M][2];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
      integers[m][0] = integers[m][1] = _mm512_set1_epi32(x_scales[m].offset);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i w0 = load_as<__m512i>(block + i * 128);
      const __m512i w1 = load_as<__m512i>(block + i * 128 + 64);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const __m512i four = _mm512_set1_epi32(load_as<int32_t>(x[m] + i * 4));
        integers[m][0] = _mm512_dpbusd_epi32(integers[m][0], w0, four);
        integers[m][1] = _mm512_dpbusd_epi32(integers[m][1], w1, four);
      }
    }
    const bf16* scales = reinterpret_cast<const bf16*>(block + kBlockValueBytes);
    const lanes scale0 = load_lanes(scales), scale1 = load_lanes(scales + kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const float x_scale = x_scales[m].scale;
      add_scaled(sums[m], (lanes)_mm512_cvtepi32_ps(integers[m][0]), scale0, x_scale);
      add_scaled(sums[m] + kLanes, (lanes)_mm512_cvtepi32_ps(integers[m][1]), scale1, x_scale);
    }
  }
};

#elif defined(__AVX2__)

// vpmaddubsw multiplies unsigned by signed bytes and sums two products in 16 bits: |w| by x with
// the sign of w. No sum overflows, as neither factor is beyond 127. vpsignb, which gives the sign,
// waits for the units that multiply. x ^ -1 does not, but is -x - 1: what it lacks is the sum of
// |w| of all negative w, which is found once for all tiles of a panel; for one tile that costs
// more than it brings, as the panel comes from memory then. The integers are the same either way.
struct Int8Tile {
  static constexpr int kRows = 8;
  static constexpr int kWeightOffset = 0;

  static constexpr bool has_lacks(int64_t num_rows) { return num_rows > kRows; }

  // lacks: [32], of a block.
  static void find_lacks(const uint8_t* block, int16_t* lacks) {
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi8(1);
    for (int first = 0; first < kPanel; first += 2 * kLanes) {
      __m256i sums[2] = {};
      for (int i = 0; i < 8; ++i)
        for (int v = 0; v < 2; ++v) {
          const auto w = load_as<__m256i>(block + (i * kPanel + first + v * kLanes) * 4);
          const __m256i pairs = _mm256_maddubs_epi16(one, _mm256_min_epi8(w, zero));
          sums[v] = _mm256_sub_epi16(sums[v], pairs);
        }
      for (int v = 0; v < 2; ++v) sums[v] = _mm256_madd_epi16(sums[v], _mm256_set1_epi16(1));
      const __m256i both = _mm256_packs_epi32(sums[0], sums[1]);
      const __m256i in_order = _mm256_permute4x64_epi64(both, 0xd8);
      std::memcpy(lacks + first, &in_order, sizeof(in_order));
    }
  }

  template <int M, bool kLacks>
  static void add_block(const int8_t (&x)[M][kBlock], const BlockScale (&x_scales)[M],
                        const uint8_t* block, const int16_t* lacks,
                        float (*sums)[kPanel]) {
    for (int first = 0; first < kPanel; first += kLanes)
      add_lanes<M, kLacks>(x, x_scales, block, lacks, first, sums);
  }

 private:
  template <int M, bool kLacks>
  static void add_lanes(const int8_t (&x)[M][kBlock], const BlockScale (&x_scales)[M],
                        const uint8_t* block, const int16_t* lacks, int first,
                        float (*sums)[kPanel]) {
    const __m256i ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
    const uint8_t* weights = block + first * 4;
    __m256i integers[M] = {};
    if constexpr (kLacks) {
      const __m256i lack = _mm256_cvtepi16_epi32(load_as<__m128i>(lacks + first));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) integers[m] = lack;
    }
#pragma GCC unroll 1
    for (int i = 0; i < 8; ++i) {
      const __m256i w = load_as<__m256i>(weights);
      const __m256i size = _mm256_abs_epi8(w), sign = _mm256_cmpgt_epi8(zero, w);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const __m256i four = _mm256_set1_epi32(load_as<int32_t>(x[m] + i * 4));
        const __m256i signed_four =
            kLacks ? _mm256_xor_si256(four, sign) : _mm256_sign_epi8(four, w);
        const __m256i pairs = _mm256_maddubs_epi16(size, signed_four);
        add_to(integers[m], _mm256_madd_epi16(pairs, ones));
      }
      weights += 4 * kPanel;
    }
    const bf16* scales = reinterpret_cast<const bf16*>(block + kBlockValueBytes);
    const lanes scale = load_lanes(scales + first);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      add_scaled(sums[m] + first, (lanes)_mm256_cvtepi32_ps(integers[m]), scale,
                 x_scales[m].scale);
  }

  // In the register that the sum has: GCC would move it about.
  static void add_to(__m256i& sum, __m256i v) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(v)); }
};

#elif defined(__SSE2__)

// pmaddwd multiplies numbers of 16 bits and sums two products: eight products at a time, where
// floats are four. An output's sum is two until the end of a block.
struct Int8Tile {
  static constexpr int kRows = 4;
  static constexpr int kWeightOffset = 0;

  static constexpr bool has_lacks(int64_t) { return false; }
  static void find_lacks(const uint8_t*, int16_t*) {}

  template <int M, bool kLacks>
  static void add_block(const int8_t (&x)[M][kBlock], const BlockScale (&x_scales)[M],
                        const uint8_t* block, const int16_t*, float (*sums)[kPanel]) {
    __m128i fours[M][kBlock / 4];  // four inputs of a row, for the weights of two outputs
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < kBlock / 4; ++i)
        fours[m][i] = widen(_mm_set1_epi32(load_as<int32_t>(x[m] + 4 * i))).front;
    for (int first = 0; first < kPanel; first += kLanes)
      add_outputs<M>(fours, x_scales, block, first, sums);
  }

 private:
  struct Words {
    __m128i front, back;
  };

  static Words widen(__m128i bytes) {
    const __m128i signs = _mm_cmpgt_epi8(_mm_setzero_si128(), bytes);
    return {_mm_unpacklo_epi8(bytes, signs), _mm_unpackhi_epi8(bytes, signs)};
  }

  template <int M>
  static void add_outputs(const __m128i (&fours)[M][kBlock / 4], const BlockScale (&x_scales)[M],
                          const uint8_t* block, int first, float (*sums)[kPanel]) {
    __m128i front[M] = {}, back[M] = {};
#pragma GCC unroll 8
    for (int i = 0; i < kBlock / 4; ++i) {
      const Words w = widen(load_as<__m128i>(block + (i * kPanel + first) * 4));
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        front[m] = _mm_add_epi32(front[m], _mm_madd_epi16(fours[m][i], w.front));
        back[m] = _mm_add_epi32(back[m], _mm_madd_epi16(fours[m][i], w.back));
      }
    }
    const bf16* scales = reinterpret_cast<const bf16*>(block + kBlockValueBytes);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const __m128 left = _mm_castsi128_ps(front[m]), right = _mm_castsi128_ps(back[m]);
      const __m128i even = _mm_castps_si128(_mm_shuffle_ps(left, right, 0x88));
      const __m128i odd = _mm_castps_si128(_mm_shuffle_ps(left, right, 0xdd));
      add_scaled(sums[m] + first, (lanes)_mm_cvtepi32_ps(_mm_add_epi32(even, odd)),
                 load_lanes(scales + first), x_scales[m].scale);
    }
  }
};

#else

// Integers in floats, which are exact up to 2^24 and which every machine multiplies at once.
struct Int8Tile {
  static constexpr int kRows = 4;
  static constexpr int kWeightOffset = 0;

  static constexpr bool has_lacks(int64_t) { return false; }
  static void find_lacks(const uint8_t*, int16_t*) {}

  template <int M, bool kLacks>
  static void add_block(const int8_t (&x)[M][kBlock], const BlockScale (&x_scales)[M],
                        const uint8_t* block, const int16_t*, float (*sums)[kPanel]) {
    const bf16* scales = reinterpret_cast<const bf16*>(block + kBlockValueBytes);
    float values[M][kBlock];
    for (int m = 0; m < M; ++m)
      for (int k = 0; k < kBlock; ++k) values[m][k] = x[m][k];
    for (int first = 0; first < kPanel; first += kLanes) {
      lanes integers[M] = {};
      for (int k = 0; k < kBlock; k += 4) {
        const i32_lanes fours = load_as<i32_lanes>(block + (k * kPanel / 4 + first) * 4);
        add_inputs<M, 24>(values, k, fours, integers);
        add_inputs<M, 16>(values, k + 1, fours, integers);
        add_inputs<M, 8>(values, k + 2, fours, integers);
        add_inputs<M, 0>(values, k + 3, fours, integers);
      }
      for (int m = 0; m < M; ++m)
        add_scaled(sums[m] + first, integers[m], load_lanes(scales + first),
                   x_scales[m].scale);
    }
  }

 private:
  // The byte of each four that ``shift`` brings to the top is the weight of that input.
  template <int M, int shift>
  static void add_inputs(const float (&values)[M][kBlock], int input, i32_lanes fours,
                         lanes (&integers)[M]) {
    const lanes weights = __builtin_convertvector(fours << shift >> 24, lanes);
    for (int m = 0; m < M; ++m) integers[m] += weights * splat_lanes(values[m][input]);
  }
};

#endif

// sums: [M, 32]; lacks: [blocks, 32] of the panel. Meanwhile as many bytes as the panel has are
// brought near from ``ahead``. Not inlined, so that the integers have the registers to themselves.
template <int M, bool kLacks>
__attribute__((noinline)) void multiply_int8_tile(TileRows<M> x, int64_t num_blocks,
                                                  const uint8_t* panel, const int16_t* lacks,
                                                  const uint8_t* ahead,
                                                  float (*sums)[kPanel]) {
  for (int m = 0; m < M; ++m) store(sums[m], f32x16(0)), store(sums[m] + 16, f32x16(0));
  for (int64_t b = 0; b < num_blocks; ++b) {
#pragma GCC unroll 17
    for (int64_t line = 0; line < kBlockBytes; line += 64)
      __builtin_prefetch(ahead + b * kBlockBytes + line, 0, 2);
    Int8Tile::add_block<M, kLacks>(x.values[b], x.scales[b], panel + b * kBlockBytes,
                                   lacks + b * kPanel, sums);
  }
}

}  // namespace sortserve
