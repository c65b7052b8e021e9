// One key/value head of a prefill chunk, as it is laid out for matrix products.
#pragma once

#include "kernels.h"
#include "panel.h"
#include "words.h"

namespace sortserve {

struct Panels {
  int64_t kv_head, first_token, num_tokens, context_len;
  const int32_t* table;
  bf16 *keys, *values;  // packed_size elements together; their layout: prefill_rows.h, prefill_amx.h

  int64_t padded_context() const { return round_up(context_len, kPanel); }
  // The position of the chunk's first token.
  int64_t start() const { return context_len - num_tokens; }
};

// Where a token's key or value begins in ``cached``, the keys or values of all pages; tokens past
// the end of the context have that of ``zeros``.
inline const bf16* cached_token(const Step& step, const Panels& panels, const void* cached,
                                int64_t position, const bf16* zeros) {
  if (position >= panels.context_len) return zeros;
  return static_cast<const bf16*>(cached) +
         cached_at(step, panels.table, panels.kv_head, position);
}

// Pairs of one token of the chunk and one query head of the key/value head: where their queries lie,
// and where their results go.
struct QueryHeads {
  const Step& step;
  const AttentionCall& call;
  const Panels& panels;

  int64_t group() const { return step.num_heads / step.num_kv_heads; }
  int64_t count() const { return panels.num_tokens * group(); }
  int64_t position(int64_t index) const { return panels.start() + index / group(); }
  const bf16* query(int64_t index) const {
    const int64_t row_width = (step.num_heads + 2 * step.num_kv_heads) * step.head_dim;
    return static_cast<const bf16*>(call.qkv) + token(index) * row_width +
           head(index) * step.head_dim;
  }
  bf16* out(int64_t index) const {
    return static_cast<bf16*>(call.out) +
           (token(index) * step.num_heads + head(index)) * step.head_dim;
  }

 private:
  int64_t token(int64_t index) const { return panels.first_token + index / group(); }
  int64_t head(int64_t index) const { return panels.kv_head * group() + index % group(); }
};

}  // namespace sortserve
