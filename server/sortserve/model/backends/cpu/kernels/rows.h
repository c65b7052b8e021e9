// How rows lie that products read and write.
#pragma once

#include <cstdint>

namespace sortserve {

// One row after another, ``stride`` elements apart; or in tiles, each 16 rows by 32 elements in one
// piece, a row of it 32 elements. Tiles go along the rows, ``stride`` / 32 of them, then down.
//
// AMX reads a tile at a time. Where rows lie one after another its 16 lines of the cache are as far
// apart as rows are wide, and fall into few sets of the first cache; so they do when they are written.
template <typename T>
struct Rows {
  static constexpr int64_t kTileRows = 16, kTileWidth = 32, kTileSize = kTileRows * kTileWidth;

  T* data;
  int64_t stride;  // in tiles: a multiple of kTileWidth
  bool in_tiles = false;

  T* at(int64_t row, int64_t column) const {
    const int64_t row_of_tile = row & (kTileRows - 1), column_of_tile = column & (kTileWidth - 1);
    const int64_t first_row = (row - row_of_tile) * stride, in_line = row_of_tile * line();
    const int64_t first_column = (column - column_of_tile) * (in_tiles ? kTileRows : 1);
    return data + first_row + in_line + first_column + column_of_tile;
  }

  // Those that begin with ``row``; in tiles: one that a tile begins with.
  Rows from(int64_t row) const { return {data + row * stride, stride, in_tiles}; }

  // From a row to the next within a tile, and from a tile to the next, in elements.
  int64_t line() const { return in_tiles ? kTileWidth : stride; }
  int64_t step() const { return in_tiles ? kTileSize : kTileWidth; }
};

}  // namespace sortserve
