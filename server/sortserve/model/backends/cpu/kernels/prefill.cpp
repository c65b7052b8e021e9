// Attention of prefill chunks, as matrix products in bf16 (probabilities are rounded to bf16).
//
// Keys and values of a chunk's row are first copied from their pages into panels (tile.h), once per
// key/value head. Then each turn takes 12 (token, query head) pairs of one key/value head through
// scores, softmax and values. A chunk's result does not depend on the rows beside it.

#include <vector>

#include "kernels.h"
#include "tile.h"

namespace sortserve {

#if defined(SORTSERVE_HAS_TILE)

// One key/value head of one chunk.
struct Panels {
  int64_t kv_head, first_token, num_tokens, context_len;
  const int32_t* table;
  bf16* keys;    // [context / 32 panels, H / 2, 32 tokens, 2]
  bf16* values;  // [H / 32 panels, context / 2, 32 columns, 2]
};

static int64_t padded_context(const Panels& panels) { return round_up(panels.context_len, kPanel); }

// Copies 32 cached tokens; tokens past the end of the context become zero.
static void pack_tokens(const Step& step, const AttentionCall& call, const Panels& panels,
                        int64_t first) {
  const int64_t dim = step.head_dim, padded_dim = round_up(dim, kPanel);
  const int64_t pairs = padded_context(panels) / 2;
  bf16* key_panel = panels.keys + first * dim;
  for (int64_t j = 0; j < kPanel; ++j) {
    const int64_t position = first + j;
    const bool exists = position < panels.context_len;
    const int64_t at =
        exists ? cached_at(step, panels.table, panels.kv_head, position) : 0;
    const bf16* key = static_cast<const bf16*>(call.keys) + at;
    const bf16* value = static_cast<const bf16*>(call.values) + at;
    for (int64_t i = 0; i < dim; ++i)
      key_panel[(i / 2 * kPanel + j) * 2 + i % 2] = exists ? key[i] : bf16{0};
    for (int64_t i = 0; i < padded_dim; ++i) {
      const int64_t row = i / kPanel * pairs + position / 2;
      panels.values[(row * kPanel + i % kPanel) * 2 + position % 2] =
          exists && i < dim ? value[i] : bf16{0};
    }
  }
}

struct TileScratch {
  std::vector<bf16> queries, probabilities;
  std::vector<float> scores;
};

// Rows [first, first + num_rows) of the chunk's tokens x query heads of one key/value head.
static void attend_tile(const Step& step, const AttentionCall& call, const Panels& panels,
                        int64_t first, int64_t num_rows, TileScratch& scratch) {
  const int64_t dim = step.head_dim, group = step.num_heads / step.num_kv_heads;
  const int64_t row_width = (step.num_heads + 2 * step.num_kv_heads) * dim;
  const int64_t start = panels.context_len - panels.num_tokens;
  const int64_t last_token = (first + num_rows - 1) / group;
  const int64_t visible = round_up(start + last_token + 1, kPanel);
  const auto token_of = [&](int64_t m) { return panels.first_token + (first + m) / group; };
  const auto head_of = [&](int64_t m) { return panels.kv_head * group + (first + m) % group; };

  scratch.queries.resize(kMaxRows * dim);
  scratch.scores.resize(kMaxRows * visible);
  scratch.probabilities.resize(kMaxRows * visible);
  float* scores = scratch.scores.data();
  bf16* probabilities = scratch.probabilities.data();

  for (int64_t m = 0; m < num_rows; ++m)
    std::memcpy(scratch.queries.data() + m * dim,
                static_cast<const bf16*>(call.qkv) + token_of(m) * row_width + head_of(m) * dim,
                dim * sizeof(bf16));
  for (int64_t key = 0; key < visible; key += kPanel)
    multiply_rows(num_rows, scratch.queries.data(), dim, panels.keys + key * dim, dim / 2,
                  [&](int64_t m, f32x16 a, f32x16 b) {
                    store(scores + m * visible + key, a);
                    store(scores + m * visible + key + 16, b);
                  });

  float totals[kMaxRows];
  for (int64_t m = 0; m < num_rows; ++m) {
    float largest;
    const int64_t num_visible = start + (first + m) / group + 1;
    softmax(scores + m * visible, num_visible, static_cast<float>(step.scale), &largest,
            &totals[m]);
    for (int64_t i = 0; i < visible; i += 16)
      store(probabilities + m * visible + i,
            i < num_visible ? load(scores + m * visible + i) : f32x16{});
  }

  const int64_t pairs = padded_context(panels) / 2;
  for (int64_t column = 0; column < dim; column += kPanel)
    multiply_rows(num_rows, probabilities, visible, panels.values + column * 2 * pairs,
                  visible / 2, [&](int64_t m, f32x16 a, f32x16 b) {
                    bf16* out = static_cast<bf16*>(call.out) +
                                (token_of(m) * step.num_heads + head_of(m)) * dim + column;
                    store(out, a / totals[m], dim - column);
                    if (dim - column > 16) store(out + 16, b / totals[m], dim - column - 16);
                  });
}

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
      for (int64_t i = 0; i < all.back().num_tokens * group; i += kMaxRows)
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
  team.parallel_for(tiles.size(), 4, [&](int64_t i) {
    thread_local TileScratch scratch;
    const Panels& panels = all[tiles[i].panels];
    const int64_t left = panels.num_tokens * group - tiles[i].first;
    attend_tile(step, call, panels, tiles[i].first, std::min<int64_t>(kMaxRows, left), scratch);
  });
}

#else

void attend_chunks(Team&, const Step&, const AttentionCall&) {}

#endif

}  // namespace sortserve
