// Products by AMX of many rows, 16 at a time, with up to 64 inputs of 32 columns, which stay in
// registers from one time to the next: they are loaded once, and rows leave the first cache alone.
#pragma once

#include "tile_amx.h"

namespace sortserve {
namespace held {

// Which register is what: sums of 16 rows, rows of the first and of the last 32 inputs, and columns.
constexpr int kLeftSums = 0, kRightSums = 1, kFirst = 2, kLast = 3;
constexpr int kFirstLeft = 4, kFirstRight = 5, kLastLeft = 6, kLastRight = 7;

// ``pairs``: [inputs / 2, 32 columns, 2].
inline void load_columns(const void* pairs, bool has_last) {
  const bf16 *first = static_cast<const bf16*>(pairs), *last = first + amx_tile::kBlock * kPanel;
  amx::load<kFirstLeft>(first, amx_tile::kPanelLine);
  amx::load<kFirstRight>(first + kPanel, amx_tile::kPanelLine);
  if (!has_last) return;
  amx::load<kLastLeft>(last, amx_tile::kPanelLine);
  amx::load<kLastRight>(last + kPanel, amx_tile::kPanelLine);
}

inline void zero_sums() {
  amx::zero<kLeftSums>();
  amx::zero<kRightSums>();
}

// Sums lie as [rows, 32].
inline void load_sums(const float* sums) {
  amx::load<kLeftSums>(sums, amx_tile::kSumsLine);
  amx::load<kRightSums>(sums + 16, amx_tile::kSumsLine);
}
inline void store_sums(float* sums) {
  amx::store<kLeftSums>(sums, amx_tile::kSumsLine);
  amx::store<kRightSums>(sums + 16, amx_tile::kSumsLine);
}

// ``first`` and ``last``: 16 rows of 32 inputs each, ``line`` elements apart.
inline void multiply(const bf16* first, const bf16* last, int64_t line, bool has_last) {
  amx::load_once<kFirst>(first, line * sizeof(bf16));
  amx::multiply_bf16<kLeftSums, kFirst, kFirstLeft>();
  amx::multiply_bf16<kRightSums, kFirst, kFirstRight>();
  if (!has_last) return;
  amx::load_once<kLast>(last, line * sizeof(bf16));
  amx::multiply_bf16<kLeftSums, kLast, kLastLeft>();
  amx::multiply_bf16<kRightSums, kLast, kLastRight>();
}

}  // namespace held
}  // namespace sortserve
