// Attention over the paged KV cache, for tokens that attend on their own: decode above all, and in
// fp32 every token of a prompt, too.
//
// One call does a layer: norm of the query and key heads (Qwen3), RoPE, the write of new keys and
// values to their pages, attention. Pages are read in place. The query heads of a key/value head
// go together, so that each page is read from memory once. Work is split over (query, partition of
// kPartition cached tokens, key/value head); the split depends on the query's own length alone, so
// its result does not depend on the rows beside it.

#include <cmath>
#include <vector>

#include "dots.h"
#include "dots_amx.h"
#include "kernels.h"
#include "weighted_sums.h"

namespace sortserve {
namespace {

constexpr int64_t kPartition = 512;

// ---- norm, RoPE and the write to the cache

template <typename T>
void norm_head(T* head, const T* weight, int64_t n, double eps) {
  f32x16 squares = {};
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load(head + i, n - i);
    squares += v * v;
  }
  const f32x16 scale = 1.0f / std::sqrt(sum(squares) / n + static_cast<float>(eps));
  for (int64_t i = 0; i < n; i += 16)
    store(head + i, load(head + i, n - i) * scale * load(weight + i, n - i), n - i);
}

template <typename T>
void rotate_head(T* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = half - i;
    const f32x16 a = load(head + i, n), b = load(head + half + i, n);
    const f32x16 c = load(cos + i, n), s = load(sin + i, n);
    store(head + i, a * c - b * s, n);
    store(head + half + i, b * c + a * s, n);
  }
}

template <typename T>
void write_token(const Step& step, const AttentionCall& call, int64_t token) {
  const int64_t dim = step.head_dim, half = dim / 2;
  T* qkv = static_cast<T*>(call.qkv) + token * (step.num_heads + 2 * step.num_kv_heads) * dim;
  const float* cos = step.cos + step.positions[token] * half;
  const float* sin = step.sin + step.positions[token] * half;
  for (int64_t h = 0; h < step.num_heads + step.num_kv_heads; ++h) {
    const void* norm = h < step.num_heads ? call.q_norm : call.k_norm;
    if (norm != nullptr) norm_head(qkv + h * dim, static_cast<const T*>(norm), dim, step.eps);
    rotate_head(qkv + h * dim, cos, sin, half);
  }
  if (step.slots[token] < 0) return;
  const int64_t page = step.slots[token] / step.block_size;
  const int64_t offset = step.slots[token] % step.block_size;
  const T* new_keys = qkv + step.num_heads * dim;
  const T* new_values = new_keys + step.num_kv_heads * dim;
  for (int64_t h = 0; h < step.num_kv_heads; ++h) {
    const int64_t to = ((page * step.num_kv_heads + h) * step.block_size + offset) * dim;
    std::memcpy(static_cast<T*>(call.keys) + to, new_keys + h * dim, dim * sizeof(T));
    std::memcpy(static_cast<T*>(call.values) + to, new_values + h * dim, dim * sizeof(T));
  }
}

// ---- softmax

}  // namespace

void softmax(float* scores, int64_t n, float scale, float* largest, float* total) {
  for (int64_t i = n; i < round_up(n, 16); ++i) scores[i] = -INFINITY;
  f32x16 top = -INFINITY;
  for (int64_t i = 0; i < n; i += 16) top = max(top, load(scores + i));
  *largest = max(top) * scale;
  f32x16 sums = {};
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 p = exp(load(scores + i) * scale - *largest);
    store(scores + i, p);
    sums += p;
  }
  *total = sum(sums);
}

namespace {

// ---- one query, one key/value head, one partition

#if defined(SORTSERVE_HAS_AMX)
template <typename T>
using QueriesOf =
    std::conditional_t<std::is_same<T, bf16>::value, amx_dots::GroupQueries, GroupQueries<T>>;
#else
template <typename T>
using QueriesOf = GroupQueries<T>;
#endif

struct Task {
  int64_t token, kv_head;
  const int32_t* table;
  int64_t first, last;  // cached tokens; none of them: no task
};

struct Scratch {
  std::vector<float> scores, sums, largest, totals;  // each for the group's query heads
  const void* near = nullptr;  // the first of the keys that the last task brought near
};

// fn(position, number of tokens) for the part of each page that lies in the task.
template <typename Fn>
void for_each_block(const Step& step, const Task& task, const Fn& fn) {
  for (int64_t position = task.first; position < task.last;) {
    const int64_t left = step.block_size - position % step.block_size;
    const int64_t n = std::min(left, task.last - position);
    fn(position, n);
    position += n;
  }
}

template <typename T>
void prefetch(const T* data, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(data);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64)
    __builtin_prefetch(bytes + i, 0, 2);
}

template <typename T>
const T* first_key_of(const Step& step, const AttentionCall& call, const Task& task) {
  if (task.first == task.last) return nullptr;
  return static_cast<const T*>(call.keys) + cached_at(step, task.table, task.kv_head, task.first);
}

template <typename T>
const T* queries_of(const Step& step, const AttentionCall& call, const Task& task) {
  const int64_t group = step.num_heads / step.num_kv_heads;
  const int64_t row_width = (step.num_heads + 2 * step.num_kv_heads) * step.head_dim;
  return static_cast<const T*>(call.qkv) + task.token * row_width +
         task.kv_head * group * step.head_dim;
}

// Pages lie anywhere in memory, which the CPU cannot foresee. So the values are brought near while
// keys are multiplied, and the next task's keys while values are summed: a little with every vector,
// as no more than a few lines can be under way at once.
template <typename T>
void score_keys(const Step& step, const AttentionCall& call, const Task& task,
                const QueriesOf<T>& queries, bool are_near, float* scores, int64_t stride) {
  const int64_t dim = step.head_dim;
  const T* keys = static_cast<const T*>(call.keys);
  const T* values = static_cast<const T*>(call.values);
  for_each_block(step, task, [&](int64_t position, int64_t n) {
    const int64_t at = cached_at(step, task.table, task.kv_head, position);
    const int64_t ahead = position + 2 * step.block_size;
    if (!are_near && ahead < task.last)
      prefetch(keys + cached_at(step, task.table, task.kv_head, ahead), step.block_size * dim);
    queries.score(keys + at, n, step.block_size - position % step.block_size, values + at,
                  scores + position - task.first, stride);
  });
}

template <typename T>
void sum_values(const Step& step, const AttentionCall& call, const Task& task, const Task& next,
                const float* probabilities, int64_t stride, float* sums) {
  const int64_t dim = step.head_dim, group = step.num_heads / step.num_kv_heads;
  const int64_t sums_stride = round_up(dim, 16);
  const T* keys = static_cast<const T*>(call.keys);
  const T* values = static_cast<const T*>(call.values);
  for_each_block(step, task, [&](int64_t position, int64_t n) {
    const int64_t at = cached_at(step, task.table, task.kv_head, position);
    const int64_t next_position = next.first + position - task.first;
    const T* ahead = next_position < next.last
                         ? keys + cached_at(step, next.table, next.kv_head, next_position)
                         : values + at;
    const float* block = probabilities + position - task.first;
    for_heads<4>(0, group, [&](auto heads, int64_t g) {
      add_all_values<decltype(heads)::value>(block + g * stride, stride, values + at, dim, n,
                                             ahead, sums + g * sums_stride, sums_stride);
    });
  });
}

template <typename T>
void attend(const Step& step, const AttentionCall& call, const Task& task, const Task& next,
            Scratch& scratch) {
  const int64_t group = step.num_heads / step.num_kv_heads;
  // Scores are stored a vector at a time, so the last may run over by 15.
  const int64_t stride = kPartition + 16;
  scratch.scores.resize(group * stride);
  scratch.sums.assign(group * round_up(step.head_dim, 16), 0.0f);
  scratch.largest.resize(group);
  scratch.totals.resize(group);
  float* scores = scratch.scores.data();
  const bool are_near = scratch.near == first_key_of<T>(step, call, task);
  const QueriesOf<T> queries(queries_of<T>(step, call, task), group, step.head_dim);
  score_keys<T>(step, call, task, queries, are_near, scores, stride);
  for (int64_t g = 0; g < group; ++g)
    softmax(scores + g * stride, task.last - task.first, static_cast<float>(step.scale),
            &scratch.largest[g], &scratch.totals[g]);
  sum_values<T>(step, call, task, next, scores, stride, scratch.sums.data());
  scratch.near = first_key_of<T>(step, call, next);
}

// ---- all queries

template <typename T>
void write_out(const Step& step, const AttentionCall& call, int64_t token, int64_t head,
               const float* sums, float total) {
  const int64_t dim = step.head_dim;
  T* out = static_cast<T*>(call.out) + (token * step.num_heads + head) * dim;
  for (int64_t i = 0; i < dim; i += 16) store(out + i, load(sums + i) / total, dim - i);
}

int64_t num_parts_of(const Step& step, int64_t query) {
  return step.query_parts[query + 1] - step.query_parts[query];
}

// Partial results of queries with several partitions: for each partition and head the sums, then
// the largest score and the total.
int64_t partial_size(const Step& step) { return round_up(step.head_dim, 16) + 16; }

struct Partials {
  float* data;
  int64_t first_part;

  float* at(const Step& step, int64_t part, int64_t head) const {
    return data + ((part - first_part) * step.num_heads + head) * partial_size(step);
  }
};

int64_t query_of(const Step& step, int64_t part) {
  const int64_t* end = step.query_parts + step.num_queries + 1;
  return std::upper_bound(step.query_parts, end, part) - step.query_parts - 1;
}

Task task_of(const Step& step, int64_t part, int64_t kv_head) {
  const int64_t query = query_of(step, part), token = step.query_tokens[query];
  const int64_t first = (part - step.query_parts[query]) * kPartition;
  const int64_t last = std::min(first + kPartition, step.positions[token] + 1);
  return {token, kv_head, table_of(step, step.query_rows[query]), first, last};
}

// Task ``index`` of ``count`` that begin with the partition of ``partials``.
template <typename T>
void run_task(const Step& step, const AttentionCall& call, int64_t index, int64_t count,
              const Partials& partials) {
  thread_local Scratch scratch;
  const auto task_at = [&](int64_t i) {
    return task_of(step, partials.first_part + i / step.num_kv_heads, i % step.num_kv_heads);
  };
  const Task task = task_at(index);
  attend<T>(step, call, task, index + 1 < count ? task_at(index + 1) : Task{}, scratch);

  const int64_t part = partials.first_part + index / step.num_kv_heads;
  const int64_t query = query_of(step, part);
  const int64_t group = step.num_heads / step.num_kv_heads, width = round_up(step.head_dim, 16);
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = task.kv_head * group + g;
    const float* sums = scratch.sums.data() + g * width;
    if (num_parts_of(step, query) == 1) {
      write_out<T>(step, call, task.token, head, sums, scratch.totals[g]);
      continue;
    }
    float* partial = partials.at(step, part, head);
    std::copy(sums, sums + width, partial);
    partial[width] = scratch.largest[g];
    partial[width + 1] = scratch.totals[g];
  }
}

// Partitions of one query and head into one result: each counts by its own largest score.
template <typename T>
void merge_parts(const Step& step, const AttentionCall& call, int64_t query, int64_t head,
                 const Partials& partials) {
  const int64_t width = round_up(step.head_dim, 16);
  const int64_t first = step.query_parts[query], last = step.query_parts[query + 1];
  float* merged = partials.at(step, first, head);
  float largest = merged[width];
  for (int64_t part = first + 1; part < last; ++part)
    largest = std::max(largest, partials.at(step, part, head)[width]);
  float total = 0.0f;
  for (int64_t part = first; part < last; ++part) {
    const float* partial = partials.at(step, part, head);
    const float weight = std::exp(partial[width] - largest);
    total += weight * partial[width + 1];
    for (int64_t i = 0; i < width; i += 16) {
      const f32x16 before = part == first ? f32x16(0.0f) : load(merged + i);
      store(merged + i, before + weight * load(partial + i));
    }
  }
  write_out<T>(step, call, step.query_tokens[query], head, merged, total);
}

// Queries [first, last).
template <typename T>
void attend_some(Team& team, const Step& step, const AttentionCall& call, int64_t first,
                 int64_t last) {
  const int64_t first_part = step.query_parts[first];
  const int64_t num_parts = step.query_parts[last] - first_part, num_queries = last - first;
  thread_local std::vector<float> buffer;
  if (num_parts > num_queries) buffer.resize(num_parts * step.num_heads * partial_size(step));
  const Partials partials = {buffer.data(), first_part};
  // The heads of a query lie side by side in its pages: one thread takes them all if it can.
  const int64_t grain = num_parts >= 4 * team.num_threads() ? step.num_kv_heads : 1;
  const int64_t count = num_parts * step.num_kv_heads;
  team.parallel_for(count, grain,
                    [&](int64_t index) { run_task<T>(step, call, index, count, partials); });
  if (num_parts == num_queries) return;
  team.parallel_for(num_queries * step.num_heads, 1, [&](int64_t index) {
    const int64_t query = first + index / step.num_heads;
    if (num_parts_of(step, query) > 1)
      merge_parts<T>(step, call, query, index % step.num_heads, partials);
  });
}

// As many queries at a time as have no more than kMaxParts partitions: the buffer stays small.
template <typename T>
void attend_queries(Team& team, const Step& step, const AttentionCall& call) {
  constexpr int64_t kMaxParts = 1024;
  const int64_t* parts = step.query_parts;
  for (int64_t first = 0, last; first < step.num_queries; first = last) {
    for (last = first + 1; last < step.num_queries; ++last)
      if (parts[last + 1] - parts[first] > kMaxParts) break;
    attend_some<T>(team, step, call, first, last);
  }
}

}  // namespace

void attention(Team& team, const Step& step, const AttentionCall& call) {
  with_dtype(step.dtype, [&](auto type) {
    using T = decltype(type);
    team.parallel_for(step.num_tokens, 4,
                      [&](int64_t token) { write_token<T>(step, call, token); });
    attend_queries<T>(team, step, call);
  });
  if (step.num_chunks > 0) attend_chunks(team, step, call);
}

extern "C" int64_t sortserve_attention_partition() { return kPartition; }

extern "C" void sortserve_attention(const Step* step, const AttentionCall* call) {
  Team::run(step->num_threads, [&](Team& team) { attention(team, *step, *call); });
}

}  // namespace sortserve
