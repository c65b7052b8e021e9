// Int8 tiles by AMX: up to 16 rows of quantised x against one panel.
//
// A multiplication makes the sums of one block for 16 rows and 16 outputs. They go through memory, as
// registers of tiles have no other way out, and vectors scale them. Integers are exact and blocks are
// summed in the order of other tiles, so the bits are the same as theirs.
//
// Scaling takes most of the time: while tiles are in use, a core multiplies floats with half of its
// units. So tile instructions lie among those of vectors, each for a block of its own: one is loaded
// while the one before it is multiplied, the one before that stored, and the first scaled.
#pragma once

#include "tile_int8.h"

#if defined(__AMX_INT8__) || defined(SORTSERVE_EMULATE_AMX)
#define SORTSERVE_HAS_AMX_INT8 1

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "amx.h"

namespace sortserve {

constexpr int kInt8AmxRows = amx::kTileRows;

namespace amx_int8 {

// Which register is what: sums of 16 rows and 16 outputs, a block of rows of x, a block of weights,
// each twice as blocks take turns, and what is taken off each of the weights.
constexpr int kSums = 0, kRows = 2, kWeights = 4, kMinusOffsets = 6;
constexpr int kOutputs = 16;
constexpr bool kHasOffset = Int8Tile::kWeightOffset != 0;

// The integers of a block.
using Integers = int32_t[amx::kTileRows][kOutputs];

// Blocks of M rows and of 16 outputs, in turn. After the last it comes again, for nothing.
template <int M>
struct Blocks {
  const int8_t *x, *last_x;  // [M rows, 32] of each; the rows behind the last are read, too
  const uint8_t *weights, *last_weights;

  Blocks(const int8_t* x, const uint8_t* weights, int64_t num_blocks)
      : x(x),
        last_x(x + (num_blocks - 1) * M * kBlock),
        weights(weights),
        last_weights(weights + (num_blocks - 1) * kBlockBytes) {}

  template <int turn>
  void load_rows() {
    amx::load<kRows + turn>(x, kBlock);
    x = std::min(x + M * kBlock, last_x);
  }
  template <int turn>
  void load_weights() {
    amx::load<kWeights + turn>(weights, 4 * kPanel);
    weights = std::min(weights + kBlockBytes, last_weights);
  }
  template <int turn>
  void multiply() const {
    amx::zero<kSums + turn>();
    if constexpr (kHasOffset)
      amx::multiply_int8<kSums + turn, kRows + turn, kMinusOffsets, false>();
    amx::multiply_int8<kSums + turn, kRows + turn, kWeights + turn, kHasOffset>();
  }
  template <int turn>
  void store(Integers& integers) const {
    amx::store<kSums + turn>(integers, sizeof(integers[0]));
  }
};

// sums += the integers of rows first to end of a block, scaled.
template <int first, int end>
inline void add_rows(const Integers& integers, const BlockScale* x_scales, const f32x16& scale,
                     f32x16* sums) {
#pragma GCC unroll 4
  for (int m = first; m < end; ++m) {
    const lanes x_scale = splat_lanes(x_scales[m].scale);
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      const i32_lanes sum = load_as<i32_lanes>(integers[m] + i * kLanes);
      lanes& to = sums[m].part[i];
      to = fma(__builtin_convertvector(sum, lanes), scale.part[i] * x_scale, to);
    }
  }
}

}  // namespace amx_int8

// What a thread's registers are for, as long as this lives, if they are used at all: to set them
// takes as long as a tile of few rows.
class Int8Registers {
 public:
  explicit Int8Registers(bool are_used) : are_used_(are_used) {
    using namespace amx_int8;
    if (!are_used) return;
    amx::Config config;
    for (int turn : {0, 1}) {
      config.shape(kSums + turn, amx::kTileRows);
      config.shape(kRows + turn, amx::kTileRows, kBlock);
      config.shape(kWeights + turn, kBlock / 4);
    }
    config.shape(kMinusOffsets, kBlock / 4);
    amx::configure(config);
    if constexpr (!kHasOffset) return;
    alignas(64) int8_t line[amx::kTileBytes];
    std::fill(std::begin(line), std::end(line), static_cast<int8_t>(-Int8Tile::kWeightOffset));
    amx::load<kMinusOffsets>(line, 0);
  }
  Int8Registers(const Int8Registers&) = delete;
  ~Int8Registers() {
    if (are_used_) amx::release();
  }

 private:
  bool are_used_;
};

// sums: [M, 16 of 32] of half a panel, whose weights and scales are given. Half of each block of
// what begins at ``ahead`` is brought near. Not inlined, so that the sums have the registers to
// themselves.
template <int M>
__attribute__((noinline)) void multiply_int8_half(TileRows<M> x, int64_t num_blocks,
                                                  const uint8_t* weights, const uint8_t* scales,
                                                  const uint8_t* ahead, float (*sums)[kPanel]) {
  using namespace amx_int8;
  alignas(64) Integers integers[2];
  f32x16 totals[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) totals[m] = f32x16(0);
  Blocks<M> blocks(x.values[0][0], weights, num_blocks);
  blocks.template load_rows<0>();
  blocks.template load_weights<0>();
  blocks.template multiply<0>();
  blocks.template load_rows<1>();
  blocks.template load_weights<1>();
  blocks.template store<0>(integers[0]);
  blocks.template multiply<1>();
  blocks.template load_rows<0>();
  blocks.template load_weights<0>();
  // Block b, whose turn it is, while the next is stored, the second after it multiplied, and the
  // third loaded.
  const auto scale_block = [&](auto turn_of_block, int64_t b) __attribute__((always_inline)) {
    constexpr int turn = turn_of_block(), other = 1 - turn;
    const Integers& ready = integers[turn];
    const BlockScale* x_scales = x.scales[b];
    const f32x16 scale = load(reinterpret_cast<const bf16*>(scales));
    blocks.template store<other>(integers[other]);
    add_rows<0, M / 4>(ready, x_scales, scale, totals);
    blocks.template multiply<turn>();
    add_rows<M / 4, M / 2>(ready, x_scales, scale, totals);
    blocks.template load_rows<other>();
    add_rows<M / 2, 3 * M / 4>(ready, x_scales, scale, totals);
    blocks.template load_weights<other>();
    add_rows<3 * M / 4, M>(ready, x_scales, scale, totals);
#pragma GCC unroll 9
    for (int64_t line = 0; line < kBlockBytes / 2; line += 64)
      __builtin_prefetch(ahead + line, 0, 2);
    scales += kBlockBytes;
    ahead += kBlockBytes;
  };
  for (int64_t b = 0; b + 1 < num_blocks; b += 2) {
    scale_block(std::integral_constant<int, 0>(), b);
    scale_block(std::integral_constant<int, 1>(), b + 1);
  }
  if (num_blocks % 2 == 1) scale_block(std::integral_constant<int, 0>(), num_blocks - 1);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) store(sums[m], totals[m]);
}

// As multiply_int8_tile, while Int8Registers live. All 16 rows are read, also where M is less.
template <int M>
inline void multiply_int8_by_amx(TileRows<M> x, int64_t num_blocks, const uint8_t* panel,
                                 const uint8_t* ahead, float (*sums)[kPanel]) {
  const uint8_t* scales = panel + kBlockValueBytes;
  for (int64_t first = 0; first < kPanel; first += amx_int8::kOutputs)
    multiply_int8_half<M>(x, num_blocks, panel + 4 * first, scales + first * sizeof(bf16),
                          ahead + first * (kBlockBytes / kPanel),
                          reinterpret_cast<float(*)[kPanel]>(sums[0] + first));
}

}  // namespace sortserve

#endif
