// Attention of prefill chunks by products of any kind: (token, query head) pairs are the rows of a
// tile, so queries and probabilities are bf16 where bf16 is multiplied, else fp32.
#pragma once

#include <vector>

#include "prefill.h"
#include "tile.h"

namespace sortserve {

constexpr int64_t kQueriesTogether = 2 * kMaxRows<bf16>;

// Elements of a head's keys, [context / 32 panels, H / 2, 32 tokens, 2], and of its values,
// [H / 32 panels, context / 2, 32 columns, 2].
inline int64_t keys_size(const Step& step, const Panels& panels) {
  return panels.padded_context() * step.head_dim;
}
inline int64_t values_size(const Step& step, const Panels& panels) {
  return panels.padded_context() * round_up(step.head_dim, kPanel);
}

// Copies 32 cached tokens; tokens past the end of the context become zero.
inline void pack_tokens(const Step& step, const AttentionCall& call, const Panels& panels,
                        int64_t first) {
  const int64_t dim = step.head_dim, padded_dim = round_up(dim, kPanel);
  thread_local std::vector<bf16> zeros;
  zeros.resize(padded_dim);
  const auto cached = [&](const void* tokens, int64_t position) {
    return cached_token(step, panels, tokens, position, zeros.data());
  };
  uint32_t* key_pairs = reinterpret_cast<uint32_t*>(panels.keys + first * dim);
  for (int64_t j = 0; j < kPanel; ++j) {
    const bf16* key = cached(call.keys, first + j);
    for (int64_t i = 0; i < dim / 2; ++i)
      key_pairs[i * kPanel + j] = pair_of(key[2 * i], key[2 * i + 1]);
  }
  const int64_t pairs = panels.padded_context() / 2;
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
  std::vector<RowOf<bf16>> queries, probabilities;
  std::vector<float> scores;
};

// The same rows as elements of a tile: rounded, or where they lie.
inline const bf16* tile_rows(const float* from, std::vector<bf16>& to, int64_t size) {
  if (static_cast<int64_t>(to.size()) < size) to.resize(size);
  for (int64_t i = 0; i < size; i += 16) store(to.data() + i, load(from + i));
  return to.data();
}
inline const float* tile_rows(const float* from, std::vector<float>&, int64_t) { return from; }

// Results of pairs [first, first + num_rows).
inline void attend_tile(const QueryHeads& heads, int64_t first, int64_t num_rows) {
  thread_local TileScratch scratch;
  const Panels& panels = heads.panels;
  const int64_t dim = heads.step.head_dim;
  const int64_t visible = round_up(heads.position(first + num_rows - 1) + 1, kPanel);
  scratch.queries.resize(kQueriesTogether * dim);
  if (static_cast<int64_t>(scratch.scores.size()) < kQueriesTogether * visible)
    scratch.scores.resize(kQueriesTogether * visible);
  RowOf<bf16>* queries = scratch.queries.data();
  float* scores = scratch.scores.data();
  Turn turn;

  for (int64_t m = 0; m < num_rows; ++m)
    for (int64_t i = 0; i < dim; i += 16)
      store(queries + m * dim + i, load(heads.query(first + m) + i, dim - i), dim - i);
  for (int64_t key = 0; key < visible; key += kPanel) {
    const bf16* panel = panels.keys + key * dim;
    multiply_rows(turn, num_rows, {queries, dim}, panel, dim, panel,
                  [&](int64_t m, const float* sums, int64_t count) {
                    for (const int64_t end = m + count; m < end; ++m, sums += kPanel)
                      std::copy_n(sums, kPanel, scores + m * visible + key);
                  });
  }

  float totals[kQueriesTogether];
  for (int64_t m = 0; m < num_rows; ++m) {
    float* row = scores + m * visible;
    float largest;
    const int64_t num_visible = heads.position(first + m) + 1;
    softmax(row, num_visible, static_cast<float>(heads.step.scale), &largest, &totals[m]);
    std::fill(row + round_up(num_visible, 16), row + visible, 0.0f);
  }

  const RowOf<bf16>* probabilities = tile_rows(scores, scratch.probabilities, num_rows * visible);
  for (int64_t column = 0; column < dim; column += kPanel) {
    const bf16* panel = panels.values + column * panels.padded_context();
    multiply_rows(turn, num_rows, {probabilities, visible}, panel, visible, panel,
                  [&](int64_t m, const float* sums, int64_t count) {
                    for (const int64_t end = m + count; m < end; ++m, sums += kPanel) {
                      bf16* out = heads.out(first + m) + column;
                      store(out, load(sums) / totals[m], dim - column);
                      if (dim - column > 16)
                        store(out + 16, load(sums + 16) / totals[m], dim - column - 16);
                    }
                  });
  }
}

}  // namespace sortserve
