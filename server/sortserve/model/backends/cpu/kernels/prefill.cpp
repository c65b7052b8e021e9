// Attention of prefill chunks, as matrix products in bf16 with fp32 accumulation.
//
// Keys and values of a chunk's row are first copied from their pages to where products read them, once
// per key/value head. Then each turn takes some (token, query head) pairs of one key/value head through
// scores, softmax and values. A chunk's result does not depend on the rows beside it.

#include <vector>

#include "kernels.h"
#include "lines.h"
#include "tile.h"

#if defined(SORTSERVE_HAS_AMX)
#include "prefill_amx.h"
#else
#include "prefill_rows.h"
#endif

namespace sortserve {

void attend_chunks(Team& team, const Step& step, const AttentionCall& call) {
  const int64_t group = step.num_heads / step.num_kv_heads;
  struct Part {
    int64_t panels, first;
  };
  std::vector<Panels> all;
  std::vector<Part> packs, tiles;
  int64_t num_elements = 0;
  for (int64_t c = 0; c < step.num_chunks; ++c) {
    const int64_t* chunk = step.chunks + 3 * c;
    for (int64_t head = 0; head < step.num_kv_heads; ++head) {
      const int64_t index = all.size();
      all.push_back({head, chunk[1], chunk[2] - chunk[1], step.positions[chunk[2] - 1] + 1,
                     table_of(step, chunk[0]), nullptr, nullptr});
      num_elements += keys_size(step, all.back()) + values_size(step, all.back());
      for (int64_t i = 0; i < all.back().context_len; i += kPanel) packs.push_back({index, i});
      for (int64_t i = 0; i < all.back().num_tokens * group; i += kQueriesTogether)
        tiles.push_back({index, i});
    }
  }
  thread_local Lines<bf16> buffer;
  bf16* free = buffer.reserve(num_elements);
  for (Panels& panels : all) {
    panels.keys = free;
    panels.values = free + keys_size(step, panels);
    free = panels.values + values_size(step, panels);
  }
  team.parallel_for(packs.size(), 1, [&](int64_t i) {
    pack_tokens(step, call, all[packs[i].panels], packs[i].first);
  });
  team.parallel_for(tiles.size(), 2, [&](int64_t i) {
    const QueryHeads heads = {step, call, all[tiles[i].panels]};
    attend_tile(heads, tiles[i].first, std::min(kQueriesTogether, heads.count() - tiles[i].first));
  });
}

}  // namespace sortserve
