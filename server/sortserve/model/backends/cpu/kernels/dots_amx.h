// Scores of decode attention by AMX: 16 keys as they lie in a page against four query heads of a group,
// so that nothing is widened and no vector is summed across.
#pragma once

#include "tile_amx.h"

#if defined(SORTSERVE_HAS_AMX)

#include <algorithm>

#include "lines.h"
#include "words.h"

namespace sortserve {
namespace amx_dots {

constexpr int kHeads = 4, kKeys = amx::kTileRows, kBlock = 32;  // heads, keys and inputs of a tile
constexpr int kScores = 0, kKeyTile = 1, kQueryTile = 2;

inline amx::Config config() {
  amx::Config config;
  config.shape(kScores, kKeys, kHeads * sizeof(float));
  config.shape(kKeyTile, kKeys);
  config.shape(kQueryTile, kBlock / 2, kHeads * sizeof(uint32_t));
  return config;
}

// to[head * stride + key] = from[key * 4 + head] for 16 keys and the first heads.
inline void store_by_head(const float* from, int num_heads, float* to, int64_t stride) {
#if defined(__AVX512F__)
  const __m512i first_two =
      _mm512_set_epi32(29, 25, 21, 17, 13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
  const __m512i last_two = _mm512_add_epi32(first_two, _mm512_set1_epi32(2));
  const auto of_eight_keys = [&](int key, const __m512i& which) {
    return _mm512_permutex2var_ps(_mm512_load_ps(from + key * kHeads), which,
                                  _mm512_load_ps(from + (key + 4) * kHeads));
  };
  for (int head = 0; head < num_heads; head += 2) {
    const __m512i which = head == 0 ? first_two : last_two;
    const __m512 low = of_eight_keys(0, which), high = of_eight_keys(8, which);
    _mm512_storeu_ps(to + head * stride, _mm512_shuffle_f32x4(low, high, 0x44));
    if (head + 1 < num_heads)
      _mm512_storeu_ps(to + (head + 1) * stride, _mm512_shuffle_f32x4(low, high, 0xee));
  }
#else
  for (int head = 0; head < num_heads; ++head)
    for (int key = 0; key < kKeys; ++key) to[head * stride + key] = from[key * kHeads + head];
#endif
}

// The query heads of one group, for as many keys as are asked for.
class GroupQueries {
 public:
  GroupQueries(const bf16* queries, int64_t group, int64_t dim)
      : group_(group), dim_(dim), padded_dim_((dim + kBlock - 1) / kBlock * kBlock) {
    thread_local Lines<uint32_t> words;
    words_ = words.reserve((group + kHeads - 1) * padded_dim_ / 2);
    std::fill_n(words_, (group + kHeads - 1) / kHeads * kHeads * padded_dim_ / 2, 0);
    for (int64_t g = 0; g < group; ++g)
      for (int64_t i = 0; i < dim; i += 2)
        tiles_of(g)[i / 2 * kHeads + g % kHeads] =
            pair_of(queries[g * dim + i], queries[g * dim + i + 1]);
    amx::configure(config());
  }
  GroupQueries(const GroupQueries&) = delete;
  ~GroupQueries() { amx::release(); }

  // scores[g * stride + j] = query g . key j for all g and j < n; up to 15 more of each are written.
  // Of keys, those up to ``readable`` may be read. Meanwhile as many bytes as the n keys have are
  // brought near from ``ahead``.
  void score(const bf16* keys, int64_t n, int64_t readable, const bf16* ahead, float* scores,
             int64_t stride) const {
    for (int64_t j = 0; j < n; j += kKeys) {
      const char* near = reinterpret_cast<const char*>(ahead + j * dim_);
      for (int64_t byte = 0; byte < kKeys * dim_ * 2; byte += 64)
        __builtin_prefetch(near + byte, 0, 2);
      if (dim_ == padded_dim_ && j + kKeys <= readable)
        score_tile(keys + j * dim_, scores + j, stride);
      else
        score_copies(keys + j * dim_, n - j, scores + j, stride);
    }
  }

 private:
  // Of the four heads that head g is one of: [H / 2, 4].
  uint32_t* tiles_of(int64_t g) const { return words_ + g / kHeads * kHeads * padded_dim_ / 2; }

  void score_tile(const bf16* keys, float* scores, int64_t stride) const {
    alignas(64) float sums[kKeys * kHeads];
    for (int64_t g = 0; g < group_; g += kHeads) {
      const uint32_t* queries = tiles_of(g);
      amx::zero<kScores>();
      for (int64_t i = 0; i < padded_dim_; i += kBlock) {
        amx::load<kKeyTile>(keys + i, padded_dim_ * sizeof(bf16));
        amx::load<kQueryTile>(queries + i / 2 * kHeads,
                              kHeads * sizeof(uint32_t));
        amx::multiply_bf16<kScores, kKeyTile, kQueryTile>();
      }
      amx::store<kScores>(sums, kHeads * sizeof(float));
      store_by_head(sums, static_cast<int>(std::min<int64_t>(kHeads, group_ - g)),
                    scores + g * stride, stride);
    }
  }

  // The same with keys that must not be read beyond their end, or are no whole number of blocks.
  void score_copies(const bf16* keys, int64_t n, float* scores, int64_t stride) const {
    thread_local Lines<bf16> copies;
    bf16* rows = copies.reserve(kKeys * padded_dim_);
    std::fill_n(rows, kKeys * padded_dim_, bf16{0});
    for (int64_t key = 0; key < std::min<int64_t>(kKeys, n); ++key)
      std::copy_n(keys + key * dim_, dim_, rows + key * padded_dim_);
    score_tile(rows, scores, stride);
  }

  const int64_t group_, dim_, padded_dim_;
  uint32_t* words_;
};

}  // namespace amx_dots
}  // namespace sortserve

#endif
