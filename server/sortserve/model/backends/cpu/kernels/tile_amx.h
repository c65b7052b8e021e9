// Tiles by AMX: up to 32 rows of x in bf16 against one panel, 32 inputs at a time.
//
// All products of bf16 go this way, one row's, too: the instructions of AVX-512 sum in another order,
// and a row's bits may not depend on the rows beside it.
#pragma once

#include "panel.h"
#include "rows.h"
#include "vec.h"

#if defined(__AMX_BF16__) || defined(SORTSERVE_EMULATE_AMX)
#define SORTSERVE_MULTIPLIES_BF16 1
#define SORTSERVE_HAS_AMX 1

#include <algorithm>

#include "amx.h"
#include "lines.h"

namespace sortserve {

constexpr int kBf16Rows = 2 * amx::kTileRows;

namespace amx_tile {

// Which register is what: sums of 16 rows and 16 outputs each, rows of x, weights of 16 outputs.
constexpr int kTopLeft = 0, kTopRight = 1, kBottomLeft = 2, kBottomRight = 3;
constexpr int kTop = 4, kBottom = 5, kLeft = 6, kRight = 7;
constexpr int kBlock = 32;                           // inputs of a register
constexpr int64_t kPanelLine = 2 * amx::kTileBytes;  // bytes of a pair of inputs and 32 outputs

// The shape of a thread's registers, for as long as this lives: to set it costs as much as several
// multiplications.
class Shape {
 public:
  Shape() = default;
  Shape(const Shape&) = delete;
  ~Shape() {
    if (num_rows_ > 0) amx::release();
  }

  // 1 <= num_rows <= kBf16Rows.
  void set(int64_t num_rows) {
    if (num_rows == num_rows_) return;
    num_rows_ = num_rows;
    const int num_top = static_cast<int>(std::min<int64_t>(num_rows, amx::kTileRows));
    // A register of no rows is not allowed: one that is not used has one.
    const int num_bottom = std::max(static_cast<int>(num_rows) - num_top, 1);
    amx::Config config;
    for (int tile : {kTopLeft, kTopRight, kTop}) config.shape(tile, num_top);
    for (int tile : {kBottomLeft, kBottomRight, kBottom}) config.shape(tile, num_bottom);
    for (int tile : {kLeft, kRight}) config.shape(tile, amx::kTileRows);
    amx::configure(config);
  }

 private:
  int64_t num_rows_ = 0;
};

// Where a block of inputs begins: in 16 rows and in the 16 below, whose lines are ``line`` elements
// apart, and in a panel.
struct Block {
  const bf16 *top, *bottom, *panel;
  int64_t line;
};

template <bool has_bottom>
inline void load_block(const Block& block) {
  amx::load<kLeft>(block.panel, kPanelLine);
  amx::load<kRight>(block.panel + kPanel, kPanelLine);
  amx::load_once<kTop>(block.top, block.line * sizeof(bf16));
  if constexpr (has_bottom) amx::load_once<kBottom>(block.bottom, block.line * sizeof(bf16));
}

// Of the block that is loaded.
template <bool has_bottom>
inline void multiply_loaded() {
  amx::multiply_bf16<kTopLeft, kTop, kLeft>();
  if constexpr (has_bottom) amx::multiply_bf16<kBottomLeft, kBottom, kLeft>();
  amx::multiply_bf16<kTopRight, kTop, kRight>();
  if constexpr (has_bottom) amx::multiply_bf16<kBottomRight, kBottom, kRight>();
}

// The same, and each register is loaded with the next block as soon as it is free: the earlier a
// load stands in the program, the less it is held up by what goes on beside.
template <bool has_bottom>
inline void multiply_and_load(const Block& next) {
  amx::multiply_bf16<kTopLeft, kTop, kLeft>();
  if constexpr (has_bottom) amx::multiply_bf16<kBottomLeft, kBottom, kLeft>();
  amx::load<kLeft>(next.panel, kPanelLine);
  amx::multiply_bf16<kTopRight, kTop, kRight>();
  amx::load_once<kTop>(next.top, next.line * sizeof(bf16));
  if constexpr (has_bottom) amx::multiply_bf16<kBottomRight, kBottom, kRight>();
  amx::load<kRight>(next.panel + kPanel, kPanelLine);
  if constexpr (has_bottom) amx::load_once<kBottom>(next.bottom, next.line * sizeof(bf16));
}

// The last inputs, fewer than a block: filled up with zeros on both sides, so that what lies behind
// them in memory is neither read nor counted.
template <bool has_bottom>
inline void multiply_rest(int64_t num_rows, const bf16* x, int64_t x_stride, const bf16* panel,
                          int64_t num_inputs) {
  alignas(64) bf16 rows[kBf16Rows * kBlock] = {};
  alignas(64) bf16 weights[kBlock * kPanel] = {};
  for (int64_t m = 0; m < num_rows; ++m)
    std::memcpy(rows + m * kBlock, x + m * x_stride, num_inputs * sizeof(bf16));
  std::memcpy(weights, panel, (num_inputs + 1) / 2 * kPanelLine);
  load_block<has_bottom>({rows, rows + amx::kTileRows * kBlock, weights, kBlock});
  multiply_loaded<has_bottom>();
}

// Sums lie as [rows up to a whole register, 32].
constexpr int64_t kSumsLine = kPanel * sizeof(float);
constexpr int kBottomSums = amx::kTileRows * kPanel;

inline void zero_sums() {
  amx::zero<kTopLeft>();
  amx::zero<kTopRight>();
  amx::zero<kBottomLeft>();
  amx::zero<kBottomRight>();
}

template <bool has_bottom>
inline void load_sums(const float* sums) {
  amx::load<kTopLeft>(sums, kSumsLine);
  amx::load<kTopRight>(sums + 16, kSumsLine);
  if constexpr (has_bottom) {
    amx::load<kBottomLeft>(sums + kBottomSums, kSumsLine);
    amx::load<kBottomRight>(sums + kBottomSums + 16, kSumsLine);
  }
}

template <bool has_bottom>
inline void store_sums(float* sums) {
  amx::store<kTopLeft>(sums, kSumsLine);
  amx::store<kTopRight>(sums + 16, kSumsLine);
  if constexpr (has_bottom) {
    amx::store<kBottomLeft>(sums + kBottomSums, kSumsLine);
    amx::store<kBottomRight>(sums + kBottomSums + 16, kSumsLine);
  }
}

// Inputs [begin, end): their sums are added to those of the inputs before. beside() is called with
// every block: what it does goes on while tiles are multiplied. finish() is called before ``sums``
// are written.
template <bool has_bottom, typename Beside, typename Finish>
inline void multiply_tile(int64_t num_rows, const Rows<const bf16>& x, const bf16* panel,
                          int64_t begin, int64_t end, float* sums, const Beside& beside,
                          const Finish& finish) {
  begin == 0 ? zero_sums() : load_sums<has_bottom>(sums);
  const int64_t num_blocks = (end - begin) / kBlock;
  Block at = {x.at(0, begin), x.at(0, begin) + amx::kTileRows * x.stride, panel + begin * kPanel,
              x.line()};
  if (num_blocks > 0) load_block<has_bottom>(at);
  for (int64_t i = 0; i < num_blocks; ++i) {
    at.top += x.step(), at.bottom += x.step(), at.panel += kBlock * kPanel;
    i + 1 < num_blocks ? multiply_and_load<has_bottom>(at) : multiply_loaded<has_bottom>();
    beside();
  }
  const int64_t num_left = end - begin - num_blocks * kBlock;
  if (num_left > 0) multiply_rest<has_bottom>(num_rows, at.top, at.line, at.panel, num_left);
  finish();
  store_sums<has_bottom>(sums);
}

// Rows whose sums are known and which are not written yet.
template <typename Write>
struct Unwritten {
  const Write& write;
  const float* sums = nullptr;
  int64_t first = 0, next = 0, size = 0;

  void write_some(int64_t count) {
    count = std::min(count, size - next);
    if (count <= 0) return;
    write(first + next, sums + next * kPanel, count);
    next += count;
  }
};

// Lines of 64 bytes that are brought near, a few at a time.
struct Near {
  const char *next, *end;

  void fetch(int64_t num_lines) {
    for (; num_lines > 0 && next < end; --num_lines, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// How the inputs of a panel are cut: of a long one the first cache holds a part, which all rows go
// through before the next.
class Slices {
 public:
  Slices(int64_t num_inputs, int64_t num_tiles)
      : num_inputs_(num_inputs), num_blocks_(std::max<int64_t>(num_inputs / kBlock, 1)) {
    constexpr int64_t kMostBlocks = 20, kFewTiles = 3;
    if (num_blocks_ > kMostBlocks && num_tiles > kFewTiles) count_ = (num_blocks_ + 15) / 16;
  }
  int64_t count() const { return count_; }
  int64_t num_blocks() const { return num_blocks_; }
  int64_t begin(int64_t slice) const { return slice * num_blocks_ / count_ * kBlock; }
  int64_t end(int64_t slice) const { return slice + 1 < count_ ? begin(slice + 1) : num_inputs_; }

 private:
  int64_t num_inputs_, num_blocks_, count_ = 1;
};

}  // namespace amx_tile

// What a thread keeps from one call of multiply_rows to the next.
using Turn = amx_tile::Shape;

// Any number of rows against one panel: write(m, sums [n, 32], n) for all rows, some at a time,
// those of a tile while the next tile is multiplied. ``next`` is the panel to bring near.
template <typename Write>
inline void multiply_by_amx(Turn& turn, int64_t num_rows, const Rows<const bf16>& x,
                            const bf16* panel, int64_t num_inputs, const bf16* next,
                            const Write& write) {
  using namespace amx_tile;
  const int64_t num_tiles = (num_rows + kBf16Rows - 1) / kBf16Rows;
  const Slices slices(num_inputs, num_tiles);
  const int64_t num_steps = num_tiles * slices.num_blocks();
  const int64_t num_sums = slices.count() > 1 ? num_tiles : 1;
  thread_local Lines<float> buffer;
  float* const all_sums = buffer.reserve(num_sums * kBf16Rows * kPanel);
  const char* near_bytes = reinterpret_cast<const char*>(next);
  const int64_t panel_lines = num_inputs + num_inputs % 2;
  Near near = {near_bytes, near_bytes + panel_lines * 64};
  const int64_t lines_at_once = (panel_lines + num_steps - 1) / num_steps;
  Unwritten<Write> unwritten = {write};
  const int64_t blocks_of_slice = std::max<int64_t>(slices.num_blocks() / slices.count(), 1);
  const int64_t rows_at_once = (kBf16Rows + blocks_of_slice - 1) / blocks_of_slice;
  const auto beside = [&] {
    near.fetch(lines_at_once);
    unwritten.write_some(rows_at_once);
  };
  const auto finish = [&] { unwritten.write_some(kBf16Rows); };
  for (int64_t index = 0; index < slices.count() * num_tiles; ++index) {
    const int64_t slice = index / num_tiles, tile = index % num_tiles;
    const int64_t first = tile * kBf16Rows, size = std::min<int64_t>(kBf16Rows, num_rows - first);
    const int64_t begin = slices.begin(slice), end = slices.end(slice);
    turn.set(size);
    float* sums = all_sums + tile % num_sums * kBf16Rows * kPanel;
    if (size > amx::kTileRows)
      multiply_tile<true>(size, x.from(first), panel, begin, end, sums, beside, finish);
    else
      multiply_tile<false>(size, x.from(first), panel, begin, end, sums, beside, finish);
    if (slice + 1 < slices.count()) continue;
    unwritten.sums = sums, unwritten.first = first, unwritten.next = 0, unwritten.size = size;
  }
  finish();
}

}  // namespace sortserve

#endif
