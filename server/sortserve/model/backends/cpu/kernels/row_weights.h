// The weights of the tokens of one row, and filters that drop the lighter ones.
//
// A weight is e^(score - largest score); weights lie in blocks with their sums and maxima. A filter
// finds the lightest weight that stays and drops what is lighter, without sorting the row: the
// range in which the limit lies is halved until few weights are in it, and those are sorted.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "block_maxima.h"
#include "vec.h"

namespace sortserve {

constexpr int64_t kBlock = 64;
constexpr int64_t kFew = 256;  // so many tokens are sorted as they are

// How far a share of a row's mass may be from torch's: 0.7e-6 by exponentials, which some versions
// of torch have to 20 units in the last place, and 1.1e-6 by block sums in float32, here and there.
constexpr double kDoubt = 2e-6;

// And how far a probability: torch divides by a sum that it adds up in float32, in eight lanes.
constexpr double kDoubtPerToken = 1.0 / (8 << 24);

// The largest weight is 1.
constexpr float kAboveAll = 1 + std::numeric_limits<float>::epsilon();

// A weight that is larger by more than this share is of a larger score.
constexpr float kClose = 1e-5f;

inline f32x16 if_below(const f32x16& x, float threshold, const f32x16& value) {
  const lanes limit = splat_lanes(threshold);
  return f32x16::of_parts([&](int i) {
    const i32_lanes is_below = x.part[i] < limit;
    return bit_cast<lanes>(is_below & bit_cast<i32_lanes>(value.part[i]));
  });
}

// The first n <= 16 scores, the rest as those of tokens that cannot be.
inline f32x16 load_scores(const float* logits, int64_t n) {
  if (n >= 16) return load(logits);
  float padded[16];
  std::fill(padded, padded + 16, kLowest);
  std::copy(logits, logits + n, padded);
  return load(padded);
}

struct Logits {
  const float* values;
  const float* maxima;  // of blocks, which may be other than ours
  int64_t size, num_maxima;
  float largest;
};

class Row {
 public:
  // Blocks without a score of at least floor weigh nothing, nor those without any.
  void weigh(const Logits& logits, float temperature, float floor);
  void keep_top_k(int64_t k);
  bool keep_top_p(float spare);   // false: it is in doubt what stays
  bool keep_min_p(float min_p);   // the same
  int64_t draw(double noise);  // -1: it is in doubt which
  double total() const;

 private:
  struct Part {
    double mass = 0, count = 0;
  };
  struct Token {
    float score;
    int64_t id;
  };

  int64_t num_blocks() const { return sums_.size(); }
  Part below(float threshold) const;
  double num_at_least(float threshold) const { return weights_.size() - below(threshold).count; }
  template <typename IsLow>
  void narrow(float* low, float* high, const IsLow& is_low) const;
  std::vector<Token> between(float low, float high) const;
  void drop_below(float threshold);
  void drop(int64_t id);
  int64_t draw_from_all(double noise) const;
  void add_up(int64_t block);

  const float* logits_;
  float temperature_;
  std::vector<float> weights_;     // [blocks, kBlock], zero beyond the vocabulary
  std::vector<float> maxima_;      // [blocks]; 0: what is in weights_ means nothing
  std::vector<double> sums_;       // [blocks]
  float highest_;                  // score
  std::vector<int64_t> doubtful_;  // of these the first none, some or all are to be dropped
};

inline void Row::weigh(const Logits& logits, float temperature, float floor) {
  logits_ = logits.values;
  temperature_ = temperature;
  highest_ = logits.largest / temperature;
  doubtful_.clear();
  const int64_t num_blocks = (logits.size + kBlock - 1) / kBlock;
  weights_.resize(num_blocks * kBlock);
  maxima_.resize(num_blocks);
  sums_.resize(num_blocks);
  const f32x16 divisor = temperature, highest = highest_;
  for (int64_t b = 0; b < num_blocks; ++b) {
    if (logits.num_maxima == num_blocks &&
        (logits.maxima[b] == kLowest || logits.maxima[b] / temperature < floor)) {
      sums_[b] = maxima_[b] = 0;
      continue;
    }
    for (int64_t i = b * kBlock; i < (b + 1) * kBlock; i += 16) {
      const f32x16 score = load_scores(logits_ + i, std::max<int64_t>(logits.size - i, 0));
      store(&weights_[i], exp(score / divisor - highest));
    }
    add_up(b);
  }
}

inline void Row::add_up(int64_t block) {
  const float* weights = &weights_[block * kBlock];
  f32x16 mass = {}, largest = {};
  for (int64_t i = 0; i < kBlock; i += 16) {
    const f32x16 weight = load(weights + i);
    mass += weight;
    largest = max(largest, weight);
  }
  sums_[block] = sum(mass);
  maxima_[block] = max(largest);
}

inline double Row::total() const {
  double total = 0;
  for (const double mass : sums_) total += mass;
  return total;
}

inline Row::Part Row::below(float threshold) const {
  Part part;
  f32x16 count = {};
  for (int64_t b = 0; b < num_blocks(); ++b) {
    if (maxima_[b] < threshold) {
      part.mass += sums_[b];
      part.count += kBlock;
      continue;
    }
    f32x16 mass = {};
    for (int64_t i = 0; i < kBlock; i += 16) {
      const f32x16 weight = load(&weights_[b * kBlock + i]);
      mass += if_below(weight, threshold, weight);
      count += if_below(weight, threshold, 1.0f);
    }
    part.mass += sum(mass);
  }
  part.count += sum(count);
  return part;
}

// Narrows [low, high), whose ends are low and not low, until few weights lie in it.
template <typename IsLow>
void Row::narrow(float* low, float* high, const IsLow& is_low) const {
  uint32_t first = bit_cast<uint32_t>(*low), last = bit_cast<uint32_t>(*high);
  double num_below_first = below(*low).count, num_below_last = below(*high).count;
  while (last - first > 1 && num_below_last - num_below_first > kFew) {
    const uint32_t middle = first + (last - first) / 2;
    const Part part = below(bit_cast<float>(middle));
    const bool goes_up = is_low(part);
    (goes_up ? first : last) = middle;
    (goes_up ? num_below_first : num_below_last) = part.count;
  }
  *low = bit_cast<float>(first) * (1 - kClose);
  *high = bit_cast<float>(last) * (1 + kClose);
}

// The tokens of such weights; the least score first, of equal ones the higher id.
inline std::vector<Row::Token> Row::between(float low, float high) const {
  std::vector<Token> tokens;
  for (int64_t b = 0; b < num_blocks(); ++b) {
    if (maxima_[b] < low) continue;
    const float* weights = &weights_[b * kBlock];
    int num_hits = 0;
    for (int i = 0; i < kBlock; ++i) num_hits += (weights[i] >= low) & (weights[i] < high);
    for (int i = 0; num_hits > 0; ++i) {
      if (!(weights[i] >= low && weights[i] < high)) continue;
      const int64_t id = b * kBlock + i;
      tokens.push_back({logits_[id] / temperature_, id});
      --num_hits;
    }
  }
  std::sort(tokens.begin(), tokens.end(), [](const Token& a, const Token& b) {
    return a.score != b.score ? a.score < b.score : a.id > b.id;
  });
  return tokens;
}

inline void Row::drop_below(float threshold) {
  for (int64_t b = 0; b < num_blocks(); ++b) {
    if (maxima_[b] < threshold) {
      sums_[b] = maxima_[b] = 0;
      continue;
    }
    for (int64_t i = b * kBlock; i < (b + 1) * kBlock; i += 16) {
      const f32x16 weight = load(&weights_[i]);
      store(&weights_[i], weight - if_below(weight, threshold, weight));
    }
    add_up(b);
  }
}

inline void Row::drop(int64_t id) {
  if (maxima_[id / kBlock] == 0) return;
  weights_[id] = 0;
  add_up(id / kBlock);
}

// Ties with the k-th largest score stay.
inline void Row::keep_top_k(int64_t k) {
  float low = std::numeric_limits<float>::min(), high = kAboveAll;
  if (num_at_least(low) <= k) return;
  narrow(&low, &high, [&](const Part& part) { return weights_.size() - part.count >= k; });
  const std::vector<Token> tokens = between(low, high);
  const float kth = tokens[tokens.size() - (k - num_at_least(high))].score;
  drop_below(low);
  for (const Token& token : tokens)
    if (token.score < kth) drop(token.id);
}

// Those go whose mass, with that of all tokens of less score, is at most spare; but the first of
// the likeliest stays.
inline bool Row::keep_top_p(float spare) {
  const double goal = spare * total();
  const double doubt = kDoubt * total() + kDoubtPerToken * weights_.size() * goal;
  float low = goal / weights_.size(), high = kAboveAll;  // what is below low weighs less than goal
  narrow(&low, &high, [&](const Part& part) { return part.mass <= goal; });
  double up_to = below(low).mass;
  if (up_to > goal - doubt) return false;
  const std::vector<Token> tokens = between(low, high);
  drop_below(low);
  for (const Token& token : tokens) {
    const bool is_last = &token == &tokens.back() && token.score == highest_;
    up_to += weights_[token.id];
    if (is_last || up_to > goal + doubt) return true;
    if (up_to > goal - doubt)
      doubtful_.push_back(token.id);
    else
      drop(token.id);
  }
  return false;
}

// As a share of the largest weight.
inline bool Row::keep_min_p(float min_p) {
  for (const Token& token : between(min_p * (1 - kClose), min_p * (1 + kClose)))
    if (token.score != highest_) return false;
  drop_below(std::min(min_p, 1.0f));
  return true;
}

inline int64_t Row::draw(double noise) {
  const int64_t token = draw_from_all(noise);
  for (const int64_t id : doubtful_) {
    drop(id);
    if (draw_from_all(noise) != token) return -1;
  }
  return token;
}

inline int64_t Row::draw_from_all(double noise) const {
  const double target = noise * total(), doubt = kDoubt * total();
  double before = 0;
  for (int64_t b = 0; b < num_blocks(); ++b) {
    if (before + sums_[b] <= target) {
      before += sums_[b];
      continue;
    }
    for (int64_t id = b * kBlock; id < (b + 1) * kBlock; ++id) {
      const double after = before + weights_[id];
      if (after > target) return target - before > doubt && after - target > doubt ? id : -1;
      before = after;
    }
    return -1;
  }
  return -1;
}

}  // namespace sortserve
