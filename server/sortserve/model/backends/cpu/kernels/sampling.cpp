// The next token of a row from its logits.
//
// What is drawn is defined by torch's exponentials and sums (engine/sampling), which differ from
// those here in their last bits. So only a draw that no such difference could change is answered;
// the others, a few in a hundred, are left open.

#include <functional>

#include "block_maxima.h"
#include "kernels.h"
#include "row_weights.h"

namespace sortserve {
namespace {

struct SamplingCall {
  const float* logits;       // [rows, vocab_size]
  const int64_t* rows;       // [num_rows] which of them
  const float* maxima;       // [rows, num_maxima] the largest logits of blocks of a row
  int64_t num_rows, vocab_size, num_maxima, num_threads;
  // Of draw_tokens:
  const float* temperature;  // [num_rows]
  const float* spare;        // [num_rows] 1 - top_p; 0: no filter
  const float* min_p;        // [num_rows] 0: no filter
  const int64_t* top_k;      // [num_rows] 0: no filter
  const double* noise;       // [num_rows] in [0, 1)
  int64_t* token;            // [num_rows] -1: left open
  // Of log_sum_exp:
  double* log_sum;           // [num_rows] log of the sum of e^(logit - largest)
};

struct BlocksCall {
  float* logits;        // [rows, vocab_size]
  float* maxima;        // [rows, num_maxima]
  const int64_t* rows;  // [num_rows] which of them; null: the first ones
  // Of apply_bitmasks:
  const uint32_t* const* masks;  // [num_rows][words] a bit a token; set: it may come
  int64_t num_rows, vocab_size, num_maxima, num_threads;
};

// A score below which no token survives top_k, or min_p where that is the first filter.
float floor_of(const SamplingCall& call, int64_t n, const Logits& logits) {
  const int64_t k = call.top_k[n];
  if (k > 0 && k <= logits.num_maxima) {  // as many blocks have a token of this score
    std::vector<float> maxima(logits.maxima, logits.maxima + logits.num_maxima);
    std::nth_element(maxima.begin(), maxima.begin() + k - 1, maxima.end(), std::greater<float>());
    return maxima[k - 1] / call.temperature[n];
  }
  if (k > 0 || call.spare[n] > 0 || call.min_p[n] <= 0) return kLowest;
  const float highest = logits.largest / call.temperature[n];
  return highest + std::log(call.min_p[n]) - (0.01f + 1e-6f * std::abs(highest));
}

// fn(row, n, logits) for each row n; the row is to be weighed first.
template <typename Fn>
void for_rows(const SamplingCall& call, const Fn& fn) {
  Team::run(std::min(call.num_threads, call.num_rows), [&](Team& team) {
    team.parallel_for(call.num_rows, 1, [&](int64_t n) {
      thread_local Row row;
      const float* maxima = call.maxima + call.rows[n] * call.num_maxima;
      const float largest = *std::max_element(maxima, maxima + call.num_maxima);
      fn(row, n, Logits{call.logits + call.rows[n] * call.vocab_size, maxima, call.vocab_size,
                        call.num_maxima, largest});
    });
  });
}

// fn(n, logits, maxima) for each row n.
template <typename Fn>
void for_blocks(const BlocksCall& call, const Fn& fn) {
  Team::run(std::min(call.num_threads, call.num_rows), [&](Team& team) {
    team.parallel_for(call.num_rows, 1, [&](int64_t n) {
      const int64_t row = call.rows == nullptr ? n : call.rows[n];
      fn(n, call.logits + row * call.vocab_size, call.maxima + row * call.num_maxima);
    });
  });
}

}  // namespace

extern "C" void sortserve_block_maxima(const BlocksCall* call) {
  for_blocks(*call, [&](int64_t, const float* logits, float* maxima) {
    find_maxima(logits, maxima, call->vocab_size, call->vocab_size / call->num_maxima);
  });
}

extern "C" void sortserve_apply_bitmasks(const BlocksCall* call) {
  for_blocks(*call, [&](int64_t n, float* logits, float* maxima) {
    apply_bitmask(call->masks[n], logits, maxima, call->vocab_size,
                  call->vocab_size / call->num_maxima);
  });
}

extern "C" void sortserve_draw_tokens(const SamplingCall* call) {
  for_rows(*call, [&](Row& row, int64_t n, const Logits& logits) {
    row.weigh(logits, call->temperature[n], floor_of(*call, n, logits));
    if (call->top_k[n] > 0) row.keep_top_k(call->top_k[n]);
    const bool is_sure = (call->spare[n] <= 0 || row.keep_top_p(call->spare[n])) &&
                         (call->min_p[n] <= 0 || row.keep_min_p(call->min_p[n]));
    call->token[n] = is_sure ? row.draw(call->noise[n]) : -1;
  });
}

extern "C" void sortserve_log_sum_exp(const SamplingCall* call) {
  for_rows(*call, [&](Row& row, int64_t n, const Logits& logits) {
    row.weigh(logits, 1.0f, kLowest);
    call->log_sum[n] = std::log(row.total());
  });
}

}  // namespace sortserve
