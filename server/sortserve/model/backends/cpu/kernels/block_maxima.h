// The largest logits of the blocks of a row, and what a mask of tokens does to both.
//
// A block is a power of two of tokens, at most 64. A NaN is larger than anything else, as in torch.
#pragma once

#include <algorithm>
#include <limits>

#include "vec.h"

namespace sortserve {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// NaN if there is one.
inline float max_of(const float* x, int64_t n) {
  float largest = x[0];
  bool has_nan = largest != largest;
  for (int64_t i = 1; i < n; ++i) {
    has_nan |= x[i] != x[i];
    largest = x[i] > largest ? x[i] : largest;
  }
  return has_nan ? std::numeric_limits<float>::quiet_NaN() : largest;
}

// The same of 64 values.
inline float max_of_64(const float* x) {
  lanes largest = load_lanes(x);
  i32_lanes has_nan = largest != largest;
#pragma GCC unroll 16
  for (int i = kLanes; i < 64; i += kLanes) {
    const lanes next = load_lanes(x + i);
    has_nan |= next != next;
    largest = next > largest ? next : largest;
  }
  largest = has_nan ? splat_lanes(std::numeric_limits<float>::quiet_NaN()) : largest;
  float few[kLanes];
  store_lanes(few, largest);
  return max_of(few, kLanes);
}

inline void find_maxima(const float* logits, float* maxima, int64_t size, int64_t block) {
  for (int64_t i = 0; i < size; i += block)
    maxima[i / block] = block == 64 ? max_of_64(logits + i) : max_of(logits + i, block);
}

// Logits of 64 tokens whose bit is clear become -inf.
inline void keep_64(uint64_t bits, float* logits) {
  i32_lanes bit_of_lane;
  for (int i = 0; i < kLanes; ++i) bit_of_lane[i] = 1 << i;
  for (int i = 0; i < 64; i += kLanes) {
    const i32_lanes is_set = ((i32_lanes{} + static_cast<int32_t>(bits >> i)) & bit_of_lane) != 0;
    store_lanes(logits + i, is_set ? load_lanes(logits + i) : splat_lanes(kLowest));
  }
}

constexpr int kFewTokens = 8;

// Logits of few tokens of 64 become -inf; false: so does a block's largest, or may do.
inline bool drop_few(uint64_t dropped, float* logits, const float* maxima, int64_t block) {
  bool is_largest = false;
  for (; dropped != 0; dropped &= dropped - 1) {
    const int i = __builtin_ctzll(dropped);
    is_largest |= !(logits[i] < maxima[i / block]);
    logits[i] = kLowest;
  }
  return !is_largest;
}

// Logits of tokens whose bit is clear become -inf, and so do the maxima. Most of a mask is much the
// same for 64 tokens at once: nothing is read where all may come and nothing where none may, and
// where few may not (a quote, a line break in a string) only these.
inline void apply_bitmask(const uint32_t* mask, float* logits, float* maxima, int64_t size,
                          int64_t block) {
  for (int64_t begin = 0; begin < size; begin += 64) {
    const int64_t n = std::min<int64_t>(size - begin, 64);
    const uint64_t upper = n > 32 ? mask[begin / 32 + 1] : 0;
    const uint64_t dropped = ~(upper << 32 | mask[begin / 32]) & (~0ull >> (64 - n));
    if (dropped == 0) continue;
    float* const maxima_here = maxima + begin / block;
    const int num_dropped = __builtin_popcountll(dropped);
    if (num_dropped == n) {
      std::fill(logits + begin, logits + begin + n, kLowest);
      std::fill(maxima_here, maxima_here + n / block, kLowest);
      continue;
    }
    if (num_dropped <= kFewTokens || n < 64) {
      if (drop_few(dropped, logits + begin, maxima_here, block)) continue;
    } else {
      keep_64(~dropped, logits + begin);
    }
    find_maxima(logits + begin, maxima_here, n, block);
  }
}

}  // namespace sortserve
