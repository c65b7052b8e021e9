// The inner loop of int8 matrix products: M rows of quantised x against one panel of 32 outputs.
//
// A panel is [blocks of 32 inputs] of 1088 bytes: [8][32 outputs][4 inputs] weights of a byte, then
// 32 scales in bf16, so that one stream of memory has both. Sums within a block are integers, hence
// exact in any order. Over blocks an output is one chain of fused multiply-adds, in the same order
// whatever M is.
//
// What an instruction set brings: ``Int8Tile`` with how many rows go together (kRows), what is added
// to a weight so that it is the byte that its instruction wants (kWeightOffset), and ``add_block``.
#pragma once

#include "vec.h"

namespace sortserve {

constexpr int64_t kBlock = 32, kPanelOutputs = 32;
constexpr int64_t kBlockValueBytes = kBlock * kPanelOutputs;
constexpr int64_t kBlockBytes = kBlockValueBytes + kPanelOutputs * sizeof(bf16);

// Of 32 inputs of a row: x is about scale times its int8 values.
struct BlockScale {
  float scale;
  int32_t offset;  // minus the weight offset times the sum of the values
};

// Rows of x, quantised; a row is num_blocks blocks.
struct QuantizedRows {
  const int8_t* values;
  const BlockScale* scales;
  int64_t num_blocks;

  QuantizedRows from(int64_t row) const {
    return {values + row * num_blocks * kBlock, scales + row * num_blocks, num_blocks};
  }
  const int8_t* block_values(int64_t row, int64_t block) const {
    return values + (row * num_blocks + block) * kBlock;
  }
  const BlockScale& block_scale(int64_t row, int64_t block) const {
    return scales[row * num_blocks + block];
  }
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

  template <int M>
  static void add_block(const QuantizedRows& x, int64_t b, const uint8_t* block,
                        float (*sums)[kPanelOutputs]) {
    __m512i integers[M][2];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
      integers[m][0] = integers[m][1] = _mm512_set1_epi32(x.block_scale(m, b).offset);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512i w0 = load_as<__m512i>(block + i * 128);
      const __m512i w1 = load_as<__m512i>(block + i * 128 + 64);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const __m512i four = _mm512_set1_epi32(load_as<int32_t>(x.block_values(m, b) + i * 4));
        integers[m][0] = _mm512_dpbusd_epi32(integers[m][0], w0, four);
        integers[m][1] = _mm512_dpbusd_epi32(integers[m][1], w1, four);
      }
    }
    const bf16* scales = reinterpret_cast<const bf16*>(block + kBlockValueBytes);
    const lanes scale0 = load_lanes(scales), scale1 = load_lanes(scales + kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const float x_scale = x.block_scale(m, b).scale;
      add_scaled(sums[m], (lanes)_mm512_cvtepi32_ps(integers[m][0]), scale0, x_scale);
      add_scaled(sums[m] + kLanes, (lanes)_mm512_cvtepi32_ps(integers[m][1]), scale1, x_scale);
    }
  }
};

#elif defined(__AVX2__)

// vpmaddubsw multiplies unsigned by signed bytes and sums two products in 16 bits: |w| by x with
// the sign of w. No sum overflows, as neither factor is beyond 127.
struct Int8Tile {
  static constexpr int kRows = 4;
  static constexpr int kWeightOffset = 0;

  template <int M>
  static void add_block(const QuantizedRows& x, int64_t b, const uint8_t* block,
                        float (*sums)[kPanelOutputs]) {
    const bf16* scales = reinterpret_cast<const bf16*>(block + kBlockValueBytes);
    for (int first = 0; first < kPanelOutputs; first += 2 * kLanes)
      add_half<M>(x, b, block + first * 4, scales + first, first, sums);
  }

 private:
  template <int M>
  static void add_half(const QuantizedRows& x, int64_t b, const uint8_t* weights,
                       const bf16* scales, int first, float (*sums)[kPanelOutputs]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i integers[M][2] = {};
    const int8_t* values = x.block_values(0, b);
#pragma GCC unroll 1
    for (int i = 0; i < 8; ++i) {
      const __m256i w0 = load_as<__m256i>(weights), w1 = load_as<__m256i>(weights + 32);
      const __m256i size0 = _mm256_abs_epi8(w0), size1 = _mm256_abs_epi8(w1);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m256i four =
            _mm256_set1_epi32(load_as<int32_t>(values + m * x.num_blocks * kBlock));
        const __m256i pairs0 = _mm256_maddubs_epi16(size0, _mm256_sign_epi8(four, w0));
        const __m256i pairs1 = _mm256_maddubs_epi16(size1, _mm256_sign_epi8(four, w1));
        integers[m][0] = _mm256_add_epi32(integers[m][0], _mm256_madd_epi16(pairs0, ones));
        integers[m][1] = _mm256_add_epi32(integers[m][1], _mm256_madd_epi16(pairs1, ones));
      }
      weights += 4 * kPanelOutputs;
      values += 4;
    }
    const lanes scale0 = load_lanes(scales), scale1 = load_lanes(scales + kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const float x_scale = x.block_scale(m, b).scale;
      float* at = sums[m] + first;
      add_scaled(at, (lanes)_mm256_cvtepi32_ps(integers[m][0]), scale0, x_scale);
      add_scaled(at + kLanes, (lanes)_mm256_cvtepi32_ps(integers[m][1]), scale1, x_scale);
    }
  }
};

#else

// Integers in floats, which are exact up to 2^24 and which every machine multiplies at once.
struct Int8Tile {
  static constexpr int kRows = 4;
  static constexpr int kWeightOffset = 0;

  template <int M>
  static void add_block(const QuantizedRows& x, int64_t b, const uint8_t* block,
                        float (*sums)[kPanelOutputs]) {
    const bf16* scales = reinterpret_cast<const bf16*>(block + kBlockValueBytes);
    float values[M][kBlock];
    for (int m = 0; m < M; ++m)
      for (int k = 0; k < kBlock; ++k) values[m][k] = x.block_values(m, b)[k];
    for (int first = 0; first < kPanelOutputs; first += kLanes) {
      lanes integers[M] = {};
      for (int k = 0; k < kBlock; k += 4) {
        const i32_lanes fours = load_as<i32_lanes>(block + (k * kPanelOutputs / 4 + first) * 4);
        add_inputs<M, 24>(values, k, fours, integers);
        add_inputs<M, 16>(values, k + 1, fours, integers);
        add_inputs<M, 8>(values, k + 2, fours, integers);
        add_inputs<M, 0>(values, k + 3, fours, integers);
      }
      for (int m = 0; m < M; ++m)
        add_scaled(sums[m] + first, integers[m], load_lanes(scales + first),
                   x.block_scale(m, b).scale);
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

// sums: [M, 32]. Meanwhile as many bytes as the panel has are brought near from ``ahead``. Not
// inlined, so that the integers have the registers to themselves.
template <int M>
__attribute__((noinline)) void multiply_int8_tile(const QuantizedRows& x, const uint8_t* panel,
                                                  const uint8_t* ahead,
                                                  float (*sums)[kPanelOutputs]) {
  for (int m = 0; m < M; ++m) store(sums[m], f32x16(0)), store(sums[m] + 16, f32x16(0));
  for (int64_t b = 0; b < x.num_blocks; ++b) {
#pragma GCC unroll 17
    for (int64_t line = 0; line < kBlockBytes; line += 64)
      __builtin_prefetch(ahead + b * kBlockBytes + line, 0, 2);
    Int8Tile::add_block<M>(x, b, panel + b * kBlockBytes, sums);
  }
}

// The same with 1 <= num_rows <= Int8Tile::kRows.
template <int M = Int8Tile::kRows>
inline void multiply_int8_rows(int64_t num_rows, const QuantizedRows& x, const uint8_t* panel,
                               const uint8_t* ahead, float (*sums)[kPanelOutputs]) {
  if constexpr (M > 1)
    if (num_rows != M) return multiply_int8_rows<M - 1>(num_rows, x, panel, ahead, sums);
  multiply_int8_tile<M>(x, panel, ahead, sums);
}

}  // namespace sortserve
