// Attention of prefill chunks, as matrix products in bf16 with fp32 accumulation.
//
// Keys and values of a chunk's row are first copied from their pages into panels (tile.h), once per
// key/value head. Then each turn takes some (token, query head) pairs of one key/value head through
// scores, softmax and values. Queries and probabilities are rows of a tile, so they are bf16 where
// bf16 is multiplied, else fp32. A chunk's result does not depend on the rows beside it.

#include <vector>

#include "kernels.h"
#include "tile.h"

namespace sortserve {
namespace {

using Row = RowOf<bf16>;

constexpr int64_t kTileRows = 2 * kMaxRows<bf16>;

// One key/value head of one chunk.
struct Panels {
  int64_t kv_head, first_token, num_tokens, context_len;
  const int32_t* table;
  bf16* keys;    // [context / 32 panels, H / 2, 32 tokens, 2]
  bf16* values;  // [H / 32 panels, context / 2, 32 columns, 2]
};

int64_t padded_context(const Panels& panels) { return round_up(panels.context_len, kPanel); }

uint32_t pair_of(bf16 even, bf16 odd) { return even.bits | static_cast<uint32_t>(odd.bits) << 16; }

// Copies 32 cached tokens; tokens past the end of the context become zero.
void pack_tokens(const Step& step, const AttentionCall& call, const Panels& panels,
                 int64_t first) {
  const int64_t dim = step.head_dim, padded_dim = round_up(dim, kPanel);
  thread_local std::vector<bf16> zeros;
  zeros.resize(padded_dim);
  const auto cached = [&](const void* tokens, int64_t position) {
    if (position >= panels.context_len) return static_cast<const bf16*>(zeros.data());
    return static_cast<const bf16*>(tokens) +
           cached_at(step, panels.table, panels.kv_head, position);
  };
  uint32_t* key_pairs = reinterpret_cast<uint32_t*>(panels.keys + first * dim);
  for (int64_t j = 0; j < kPanel; ++j) {
    const bf16* key = cached(call.keys, first + j);
    for (int64_t i = 0; i < dim / 2; ++i)
      key_pairs[i * kPanel + j] = pair_of(key[2 * i], key[2 * i + 1]);
  }
  const int64_t pairs = padded_context(panels) / 2;
  for (int64_t j = 0; j < kPanel; j += 2) {
    const bf16 *even = cached(call.values, first + j), *odd = cached(call.values, first + j + 1);
    for (int64_t column = 0; column < padded_dim; column += kPanel) {
      uint32_t* value_pairs = reinterpret_cast<uint32_t*>(panels.values) +
                              (column / kPanel * pairs + (first + j) / 2) * kPanel;
      const int64_t n = std::min<int64_t>(kPanel, dim - column);
      for (int64_t i = 0; i < n; ++i) value_pairs[i] = pair_of(even[column + i], odd[column + i]);
      for (int64_t i = n; i < kPanel; ++i) value_pairs[i] = 0;
    }
  }
}

struct TileScratch {
  std::vector<Row> queries, probabilities;
  std::vector<float> scores;
};

// The same rows as elements of a tile: rounded, or where they lie.
const bf16* tile_rows(const float* from, std::vector<bf16>& to, int64_t size) {
  if (static_cast<int64_t>(to.size()) < size) to.resize(size);
  for (int64_t i = 0; i < size; i += 16) store(to.data() + i, load(from + i));
  return to.data();
}
const float* tile_rows(const float* from, std::vector<float>&, int64_t) { return from; }

// multiply_rows for any number of rows.
template <typename Write>
void multiply_all(int64_t num_rows, const Row* x, int64_t x_stride, const bf16* panel,
                  int64_t num_inputs, const Write& write) {
  for (int64_t first = 0; first < num_rows; first += kMaxRows<bf16>)
    multiply_rows<bf16>(std::min<int64_t>(kMaxRows<bf16>, num_rows - first), x + first * x_stride,
                        x_stride, panel, num_inputs,
                        [&](int64_t m, const f32x16& a, const f32x16& b) { write(first + m, a, b); },
                        {panel, false});
}

// Rows [first, first + num_rows) of the chunk's tokens x query heads of one key/value head.
void attend_tile(const Step& step, const AttentionCall& call, const Panels& panels,
                 int64_t first, int64_t num_rows, TileScratch& scratch) {
  const int64_t dim = step.head_dim, group = step.num_heads / step.num_kv_heads;
  const int64_t row_width = (step.num_heads + 2 * step.num_kv_heads) * dim;
  const int64_t start = panels.context_len - panels.num_tokens;
  const int64_t last_token = (first + num_rows - 1) / group;
  const int64_t visible = round_up(start + last_token + 1, kPanel);
  const auto token_of = [&](int64_t m) { return panels.first_token + (first + m) / group; };
  const auto head_of = [&](int64_t m) { return panels.kv_head * group + (first + m) % group; };

  scratch.queries.resize(kTileRows * dim);
  if (static_cast<int64_t>(scratch.scores.size()) < kTileRows * visible)
    scratch.scores.resize(kTileRows * visible);
  Row* queries = scratch.queries.data();
  float* scores = scratch.scores.data();

  for (int64_t m = 0; m < num_rows; ++m) {
    const bf16* query =
        static_cast<const bf16*>(call.qkv) + token_of(m) * row_width + head_of(m) * dim;
    for (int64_t i = 0; i < dim; i += 16)
      store(queries + m * dim + i, load(query + i, dim - i), dim - i);
  }
  for (int64_t key = 0; key < visible; key += kPanel)
    multiply_all(num_rows, queries, dim, panels.keys + key * dim, dim,
                 [&](int64_t m, const f32x16& a, const f32x16& b) {
                   store(scores + m * visible + key, a);
                   store(scores + m * visible + key + 16, b);
                 });

  float totals[kTileRows];
  for (int64_t m = 0; m < num_rows; ++m) {
    float* row = scores + m * visible;
    float largest;
    const int64_t num_visible = start + (first + m) / group + 1;
    softmax(row, num_visible, static_cast<float>(step.scale), &largest, &totals[m]);
    std::fill(row + round_up(num_visible, 16), row + visible, 0.0f);
  }

  const Row* probabilities = tile_rows(scores, scratch.probabilities, num_rows * visible);
  const int64_t pairs = padded_context(panels) / 2;
  for (int64_t column = 0; column < dim; column += kPanel)
    multiply_all(num_rows, probabilities, visible, panels.values + column * 2 * pairs, visible,
                 [&](int64_t m, const f32x16& a, const f32x16& b) {
                   bf16* out = static_cast<bf16*>(call.out) +
                               (token_of(m) * step.num_heads + head_of(m)) * dim + column;
                   store(out, a / totals[m], dim - column);
                   if (dim - column > 16) store(out + 16, b / totals[m], dim - column - 16);
                 });
}

}  // namespace

void attend_chunks(Team& team, const Step& step, const AttentionCall& call) {
  const int64_t dim = step.head_dim, padded_dim = round_up(dim, kPanel);
  const int64_t group = step.num_heads / step.num_kv_heads;
  struct Turn {
    int64_t panels, first;
  };
  std::vector<Panels> all;
  std::vector<Turn> packs, tiles;
  int64_t num_elements = 0;
  for (int64_t c = 0; c < step.num_chunks; ++c) {
    const int64_t* chunk = step.chunks + 3 * c;
    for (int64_t head = 0; head < step.num_kv_heads; ++head) {
      const int64_t index = all.size();
      all.push_back({head, chunk[1], chunk[2] - chunk[1], step.positions[chunk[2] - 1] + 1,
                     table_of(step, chunk[0]), nullptr, nullptr});
      num_elements += padded_context(all.back()) * (dim + padded_dim);
      for (int64_t i = 0; i < all.back().context_len; i += kPanel) packs.push_back({index, i});
      for (int64_t i = 0; i < all.back().num_tokens * group; i += kTileRows)
        tiles.push_back({index, i});
    }
  }
  thread_local std::vector<bf16> buffer;
  buffer.resize(num_elements);
  bf16* free = buffer.data();
  for (Panels& panels : all) {
    panels.keys = free;
    panels.values = free + padded_context(panels) * dim;
    free = panels.values + padded_context(panels) * padded_dim;
  }
  team.parallel_for(packs.size(), 1, [&](int64_t i) {
    pack_tokens(step, call, all[packs[i].panels], packs[i].first);
  });
  team.parallel_for(tiles.size(), 2, [&](int64_t i) {
    thread_local TileScratch scratch;
    const Panels& panels = all[tiles[i].panels];
    const int64_t left = panels.num_tokens * group - tiles[i].first;
    attend_tile(step, call, panels, tiles[i].first, std::min<int64_t>(kTileRows, left), scratch);
  });
}

}  // namespace sortserve
