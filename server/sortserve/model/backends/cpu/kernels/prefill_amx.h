// Attention of prefill chunks by AMX. Scores are made with a key's in a row and a query's in a column,
// so that softmax goes down columns, 16 queries at a time, and sums no vector across.
//
// Keys come in blocks that begin at multiples of kKeysTogether, whatever the chunk. A query's results
// are scaled by a power of two that is above the largest score so far, or less than 2^8 below it: to
// scale anew for every little step costs more than it gains.
#pragma once

#include <algorithm>
#include <vector>

#include "exp2.h"
#include "held_amx.h"
#include "lines.h"
#include "ordered.h"
#include "powers.h"
#include "prefill.h"
#include "tile_amx.h"

namespace sortserve {

constexpr int64_t kQueriesTogether = kPanel, kKeysTogether = 64;  // as many as Adding holds
constexpr float kUnseen = -1e30f;  // a score, whose probability is 0
constexpr float kLog2Slack = 8;
constexpr float kMostLog2 = 1 << 28;  // scores beyond it have no differences that count: NaN

// Elements of a head's keys, [context / 32, 32 tokens, H up to 32s], and of its values,
// [context / 32, H up to 32s, 32 tokens].
inline int64_t keys_size(const Step& step, const Panels& panels) {
  return panels.padded_context() * round_up(step.head_dim, kPanel);
}
inline int64_t values_size(const Step& step, const Panels& panels) {
  return keys_size(step, panels);
}

// Copies 32 cached tokens; tokens past the end of the context become zero.
inline void pack_tokens(const Step& step, const AttentionCall& call, const Panels& panels,
                        int64_t first) {
  const int64_t dim = step.head_dim, padded_dim = round_up(dim, kPanel);
  thread_local std::vector<bf16> zeros;
  thread_local std::vector<uint32_t> pairs;  // [16, H]: of a value and the next token's
  zeros.resize(dim);
  pairs.resize(kPanel / 2 * padded_dim);
  const auto cached = [&](const void* tokens, int64_t j) {
    return cached_token(step, panels, tokens, first + j, zeros.data());
  };
  for (int64_t j = 0; j < kPanel; ++j) {
    bf16* key = panels.keys + (first + j) * padded_dim;
    std::copy_n(cached(call.keys, j), dim, key);
    std::fill(key + dim, key + padded_dim, bf16{0});
  }
  for (int64_t j = 0; j < kPanel; j += 2) {
    const bf16 *even = cached(call.values, j), *odd = cached(call.values, j + 1);
    uint32_t* of_tokens = pairs.data() + j / 2 * padded_dim;
    for (int64_t i = 0; i < dim; ++i) of_tokens[i] = pair_of(even[i], odd[i]);
    std::fill(of_tokens + dim, of_tokens + padded_dim, 0);
  }
  uint32_t* values = reinterpret_cast<uint32_t*>(panels.values + first * padded_dim);
  for (int64_t i = 0; i < padded_dim; i += 16)
    transpose_words(pairs.data() + i, padded_dim, values + i * 16, 16);
}

// What a thread has of 32 queries: 16 of them in each half.
class ChunkTile {
 public:
  ChunkTile(const QueryHeads& heads, int64_t first, int64_t num_queries)
      : heads_(heads),
        first_(first),
        num_queries_(num_queries),
        first_position_(heads.position(first)),
        last_position_(heads.position(first + num_queries - 1)),
        padded_dim_(round_up(heads.step.head_dim, kPanel)),
        log2_scale_(static_cast<float>(heads.step.scale * 1.4426950408889634)) {
    turn_.set(kPanel);
    thread_local Lines<uint32_t> words;
    thread_local Lines<float> sums;
    queries_ = words.reserve(padded_dim_ * kPanel);
    rows_ = queries_ + padded_dim_ / 2 * kPanel;
    sums_ = sums.reserve(padded_dim_ * kPanel);
    std::fill_n(sums_, padded_dim_ * kPanel, 0.0f);
    load_queries();
  }

  void attend() {
    int64_t key = 0, which = 0;
    run(Scoring(*this, key, which));
    raise(tops(key, which, [] {}));
    for (;;) {
      // Tiles of the next block are multiplied while this one is weighed, and while the next one's
      // largest scores are looked for, this one's values are added.
      const int64_t next = key + kKeysTogether;
      Scoring scoring(*this, next, 1 - which);
      weigh(key, which, [&] { scoring.step(); });
      run(scoring);
      Adding adding(*this, key);
      const Tops tops_of_next = tops(next, 1 - which, [&] { adding.step(); });
      run(adding);
      if (num_keys(next) == 0) break;
      raise(tops_of_next);
      key = next, which = 1 - which;
    }
    write();
  }

 private:
  int64_t position(int64_t query) const { return heads_.position(first_ + query); }

  // Words of rows [32, H / 2] to columns.
  void load_queries() {
    const int64_t row_words = padded_dim_ / 2;
    std::fill_n(rows_, padded_dim_ / 2 * kPanel, 0);
    for (int64_t m = 0; m < num_queries_; ++m)
      std::memcpy(rows_ + m * row_words, heads_.query(first_ + m),
                  heads_.step.head_dim * sizeof(bf16));
    for (int64_t m = 0; m < kPanel; m += 16)
      for (int64_t i = 0; i < row_words; i += 16)
        transpose_words(rows_ + m * row_words + i, row_words,
                        queries_ + i * kPanel + m, kPanel);
    for (int64_t m = 0; m < kPanel; ++m)
      positions_[m] = static_cast<float>(position(std::min(m, num_queries_ - 1)));
  }

  // Keys of the block that begins at ``key``.
  int64_t num_keys(int64_t key) const {
    return std::clamp<int64_t>(round_up(last_position_ + 1 - key, kPanel), 0, kKeysTogether);
  }

  // Scores of a block of keys: 16 keys a step where all inputs of the queries fit registers, else 32
  // keys and 32 inputs.
  struct Scoring {
    ChunkTile& tile;
    const int64_t key, which, num_keys;
    int64_t row = 0, input = 0;

    Scoring(ChunkTile& tile, int64_t key, int64_t which)
        : tile(tile), key(key), which(which), num_keys(tile.num_keys(key)) {}

    bool is_over() const { return row >= num_keys; }
    void step() {
      if (is_over()) return;
      const int64_t dim = tile.padded_dim_;
      const bf16* keys = tile.heads_.panels.keys + (key + row) * dim;
      float* scores = tile.scores_[which] + row * kPanel;
      dim <= 2 * amx_tile::kBlock ? score_held(keys, dim, scores) : score_block(keys, dim, scores);
    }

   private:
    void score_held(const bf16* keys, int64_t dim, float* scores) {
      const bool has_last = dim > amx_tile::kBlock;
      if (row == 0) held::load_columns(tile.queries_, has_last);
      held::zero_sums();
      held::multiply(keys, keys + amx_tile::kBlock, dim, has_last);
      held::store_sums(scores);
      row += amx::kTileRows;
    }
    void score_block(const bf16* keys, int64_t dim, float* scores) {
      using namespace amx_tile;
      if (input == 0) amx_tile::zero_sums();
      const bf16* queries = reinterpret_cast<const bf16*>(tile.queries_) + input * kPanel;
      load_block<true>({keys + input, keys + input + amx::kTileRows * dim, queries, dim});
      multiply_loaded<true>();
      input += kBlock;
      if (input < dim) return;
      amx_tile::store_sums<true>(scores);
      input = 0, row += kPanel;
    }
  };

  // Adds the values of a block of keys, 16 of their numbers a step.
  struct Adding {
    ChunkTile& tile;
    const int64_t key;
    const bool is_whole;
    int64_t column = 0;

    Adding(ChunkTile& tile, int64_t key)
        : tile(tile), key(key), is_whole(tile.num_keys(key) == kKeysTogether) {}

    bool is_over() const { return column >= tile.padded_dim_; }
    void step() {
      using amx_tile::kBlock;
      if (is_over()) return;
      const int64_t dim = tile.padded_dim_;
      const bf16* values = tile.heads_.panels.values + key * dim + column * kBlock;
      float* sums = tile.sums_ + column * kPanel;
      if (column == 0) held::load_columns(tile.probabilities_, is_whole);
      held::load_sums(sums);
      held::multiply(values, values + kBlock * dim, kBlock, is_whole);
      held::store_sums(sums);
      column += amx::kTileRows;
    }
  };

  template <typename Steps>
  static void run(Steps&& steps) {
    while (!steps.is_over()) steps.step();
  }

  // The scores of keys that a query comes before.
  void hide_unseen(int64_t first_key, int64_t which) {
    const int64_t first_hidden = first_position_ + 1 - first_key;
    const int64_t count = num_keys(first_key);
    for (int64_t key = std::max<int64_t>(first_hidden, 0); key < count; ++key)
      for (int half = 0; half < kPanel; half += 16) {
        float* scores = scores_[which] + key * kPanel + half;
        const f32x16 position = static_cast<float>(first_key + key);
        store(scores, if_at_least(load(positions_ + half), position, load(scores), kUnseen));
      }
  }

  struct Tops {
    f32x16 halves[2];
  };

  // The largest scores of a block; beside() is called with every 16 keys.
  template <typename Beside>
  Tops tops(int64_t first_key, int64_t which, const Beside& beside) {
    hide_unseen(first_key, which);
    const float* scores = scores_[which];
    const int64_t count = num_keys(first_key);
    f32x16 left = kUnseen, right = kUnseen;
    Ordered ordered;
    for (int64_t first = 0; first < count; first += 16) {
      beside();
      for (int64_t key = first; key < first + 16; ++key) {
        const f32x16 a = load(scores + key * kPanel), b = load(scores + key * kPanel + 16);
        left = max(left, a), right = max(right, b);
        ordered.see(a, b);
      }
    }
    if (!ordered.all()) spoil(first_key, which);
    return {left, right};
  }

  // Results of queries with a score that is no number will be none.
  void spoil(int64_t first_key, int64_t which) {
    for (int64_t key = 0; key < num_keys(first_key); ++key)
      for (int half = 0; half < 2; ++half) {
        const f32x16 score = load(scores_[which] + key * kPanel + half * 16);
        totals_[half] += if_at_least(score, score, 0.0f, score);
      }
  }

  // Scores to probabilities; beside() is called with every 16 keys of a half.
  template <typename Beside>
  void weigh(int64_t first_key, int64_t which, const Beside& beside) {
    const int64_t count = num_keys(first_key);
    for (int half = 0; half < 2; ++half) {
      const float* scores = scores_[which] + half * 16;
      const Powers powers(log2_scale_, largest_[half]);
      uint32_t* pairs = probabilities_ + half * 16;
      f32x16 total = totals_[half];
      for (int64_t first = 0; first < count; first += 16) {
        beside();
        for (int64_t key = first; key < first + 16; key += 2) {
          const float* at = scores + key * kPanel;
          powers.store(pairs + key / 2 * kPanel, load(at), load(at + kPanel), total);
        }
      }
      totals_[half] = total;
    }
  }

  // Scales to larger scores where there are any, else by 1.
  void raise(const Tops& tops) {
    for (int half = 0; half < 2; ++half) {
      const f32x16 top = tops.halves[half] * log2_scale_, limit = largest_[half] + kLog2Slack;
      if (!any_above(top, limit)) continue;
      const f32x16 largest = if_at_least(limit, top, largest_[half], integer_above(top));
      const f32x16 factor =
          if_at_least(limit, top, 1.0f, exp2_roughly(largest_[half] - largest));
      largest_[half] = largest;
      totals_[half] = totals_[half] * factor;
      for (int64_t i = 0; i < padded_dim_; ++i) {
        float* sums = sums_ + i * kPanel + half * 16;
        store(sums, load(sums) * factor);
      }
    }
  }

  void write() {
    const int64_t row_words = padded_dim_ / 2;
    uint32_t* columns = queries_;
    for (int half = 0; half < 2; ++half) {
      const f32x16 factor = 1.0f / totals_[half];
      for (int64_t i = 0; i < row_words; ++i) {
        const float* sums = sums_ + 2 * i * kPanel + half * 16;
        store_pairs(columns + i * kPanel + half * 16, load(sums) * factor,
                    load(sums + kPanel) * factor);
      }
    }
    for (int64_t m = 0; m < kPanel; m += 16)
      for (int64_t i = 0; i < row_words; i += 16)
        transpose_words(columns + i * kPanel + m, kPanel, rows_ + m * row_words + i,
                        row_words);
    for (int64_t m = 0; m < num_queries_; ++m)
      std::memcpy(heads_.out(first_ + m), rows_ + m * row_words,
                  heads_.step.head_dim * sizeof(bf16));
  }

  static f32x16 if_at_least(const f32x16& a, const f32x16& b, const f32x16& yes,
                            const f32x16& no) {
    return f32x16::of_parts(
        [&](int i) { return a.part[i] >= b.part[i] ? yes.part[i] : no.part[i]; });
  }
  static f32x16 integer_above(const f32x16& x) {
    float numbers[16];
    store(numbers, x);
    for (float& number : numbers)
      number = std::abs(number) < kMostLog2 ? std::ceil(number) : HUGE_VALF;
    return load(numbers);
  }
  static bool any_above(const f32x16& a, const f32x16& b) {
    i32_lanes above = {};
    for (int i = 0; i < kParts; ++i) above |= a.part[i] > b.part[i];
    int32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= above[i];
    return any != 0;
  }

  const QueryHeads& heads_;
  const int64_t first_, num_queries_, first_position_, last_position_, padded_dim_;
  const float log2_scale_;
  Turn turn_;
  alignas(64) float positions_[kPanel];
  alignas(64) float scores_[2][kKeysTogether * kPanel];  // of this block and the next
  alignas(64) uint32_t probabilities_[kKeysTogether / 2 * kPanel];
  f32x16 largest_[2] = {kUnseen, kUnseen}, totals_[2] = {0.0f, 0.0f};
  uint32_t *queries_, *rows_;  // [H / 2, 32], [32, H / 2]
  float* sums_;                // [H, 32]
};

// Results of pairs [first, first + num_queries).
inline void attend_tile(const QueryHeads& heads, int64_t first, int64_t num_queries) {
  ChunkTile(heads, first, num_queries).attend();
}

}  // namespace sortserve
