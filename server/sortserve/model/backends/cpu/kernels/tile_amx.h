// Tiles by AMX: up to 32 rows of x in bf16 against one panel, 32 inputs at a time.
//
// All products of bf16 go this way, one row's, too: the instructions of AVX-512 sum in another order,
// and a row's bits may not depend on the rows beside it.
#pragma once

#include "panel.h"
#include "tile_ahead.h"
#include "vec.h"

#if defined(__AMX_BF16__) || defined(SORTSERVE_EMULATE_AMX)
#define SORTSERVE_MULTIPLIES_BF16 1
#define SORTSERVE_HAS_AMX 1

#include <algorithm>

#include "amx.h"

namespace sortserve {

constexpr int kBf16Rows = 2 * amx::kTileRows;

namespace amx_tile {

// Which register is what: sums of 16 rows and 16 outputs each, rows of x, weights of 16 outputs.
constexpr int kTopLeft = 0, kTopRight = 1, kBottomLeft = 2, kBottomRight = 3;
constexpr int kTop = 4, kBottom = 5, kLeft = 6, kRight = 7;
constexpr int kBlock = 32;                           // inputs of a register
constexpr int64_t kPanelLine = 2 * amx::kTileBytes;  // bytes of a pair of inputs and 32 outputs

inline amx::Config config_of(int num_top, int num_bottom) {
  amx::Config config;
  for (int tile : {kTopLeft, kTopRight, kTop}) config.shape(tile, num_top);
  for (int tile : {kBottomLeft, kBottomRight, kBottom}) config.shape(tile, num_bottom);
  for (int tile : {kLeft, kRight}) config.shape(tile, amx::kTileRows);
  return config;
}

// One block of inputs; ``panel`` points at its first pair, ``x`` at its first input.
inline void multiply_block(const bf16* x, int64_t x_stride, const bf16* panel, bool has_bottom) {
  amx::load<kLeft>(panel, kPanelLine);
  amx::load<kRight>(panel + kPanel, kPanelLine);
  amx::load<kTop>(x, x_stride * sizeof(bf16));
  amx::multiply_bf16<kTopLeft, kTop, kLeft>();
  amx::multiply_bf16<kTopRight, kTop, kRight>();
  if (!has_bottom) return;
  amx::load<kBottom>(x + amx::kTileRows * x_stride, x_stride * sizeof(bf16));
  amx::multiply_bf16<kBottomLeft, kBottom, kLeft>();
  amx::multiply_bf16<kBottomRight, kBottom, kRight>();
}

// The last inputs, fewer than a block: filled up with zeros on both sides, so that what lies behind
// them in memory is neither read nor counted.
inline void multiply_rest(int64_t num_rows, const bf16* x, int64_t x_stride, const bf16* panel,
                          int64_t num_inputs) {
  alignas(64) bf16 rows[kBf16Rows * kBlock] = {};
  alignas(64) bf16 weights[kBlock * kPanel] = {};
  for (int64_t m = 0; m < num_rows; ++m)
    std::memcpy(rows + m * kBlock, x + m * x_stride, num_inputs * sizeof(bf16));
  std::memcpy(weights, panel, (num_inputs + 1) / 2 * kPanelLine);
  multiply_block(rows, kBlock, weights, num_rows > amx::kTileRows);
}

}  // namespace amx_tile

// 1 <= num_rows <= kBf16Rows; outputs: [num_rows up to a whole register, 32].
inline void multiply_by_amx(int64_t num_rows, const bf16* x, int64_t x_stride, const bf16* panel,
                            int64_t num_inputs, float* outputs, Ahead ahead) {
  using namespace amx_tile;
  const int num_top = static_cast<int>(std::min<int64_t>(num_rows, amx::kTileRows));
  const int num_bottom = static_cast<int>(num_rows) - num_top;
  // A register of no rows is not allowed: one that is not used has one.
  amx::configure(config_of(num_top, std::max(num_bottom, 1)));
  amx::zero<kTopLeft>();
  amx::zero<kTopRight>();
  amx::zero<kBottomLeft>();
  amx::zero<kBottomRight>();
  const int64_t line = ahead.whole ? 128 : 64;
  const char* near = ahead.first(0, 1, (num_inputs + 1) / 2);
  int64_t k = 0;
  for (; k + kBlock <= num_inputs; k += kBlock) {
    for (int64_t byte = 0; byte < kBlock / 2 * line; byte += 64) __builtin_prefetch(near + byte, 0, 2);
    near += kBlock / 2 * line;
    multiply_block(x + k, x_stride, panel + k * kPanel, num_bottom > 0);
  }
  if (k < num_inputs) multiply_rest(num_rows, x + k, x_stride, panel + k * kPanel, num_inputs - k);

  constexpr int64_t kStride = kPanel * sizeof(float);
  amx::store<kTopLeft>(outputs, kStride);
  amx::store<kTopRight>(outputs + 16, kStride);
  if (num_bottom > 0) {
    amx::store<kBottomLeft>(outputs + amx::kTileRows * kPanel, kStride);
    amx::store<kBottomRight>(outputs + amx::kTileRows * kPanel + 16, kStride);
  }
  amx::release();
}

}  // namespace sortserve

#endif
