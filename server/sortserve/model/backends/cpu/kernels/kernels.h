// What the kernels share: dtypes, argument structures (mirrored field by field in the Python
// modules named at each), and the functions that one kernel calls of another.
//
// Shape legend: T tokens, N query heads, K key/value heads, H head_dim.
#pragma once

#include "parallel.h"
#include "rows.h"
#include "vec.h"

namespace sortserve {

enum Dtype : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// fn(T{}) with the element type of a dtype.
template <typename Fn>
void with_dtype(int64_t dtype, const Fn& fn) {
  switch (dtype) {
    case kFloat32: return fn(float{});
    case kBfloat16: return fn(bf16{});
    case kFloat16: return fn(fp16{});
  }
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- ops.cpp; Python: ops.py

struct RowsCall {
  void* x;             // [num_rows, width] (silu_and_mul: [num_rows, 2 width])
  const void* delta;   // [num_rows, width], or null
  const void* weight;  // [width]
  void* y;             // [num_rows, width]
  int64_t num_rows, width, dtype, num_threads;
  double eps;
};

// x += delta (if there is one); y = x / rms(x) * weight. y_in_tiles: see Rows.
void add_rms_norm(Team& team, const RowsCall& call, bool y_in_tiles);

// ---- linear.cpp; Python: linear.py

enum Output : int64_t { kBf16 = 0, kFp32 = 1, kSiluMul = 2 };

enum Format : int64_t { kPlain = 0, kInt8 = 1 };

struct Matrix {
  const void* packed;  // bf16 [panels, num_inputs / 2, 32, 2], fp32 [panels, num_inputs, 32], or
                       // int8 as in tile_int8.h
  const float* bias;   // [32 * panels], or null
  int64_t num_inputs, num_outputs;
  int64_t output;  // an Output; kSiluMul: a panel is half of it gates, then the same ups
  int64_t format;  // a Format
};

// Rows of outputs, of the type that the matrix says.
struct Results {
  void* data;
  bool in_tiles = false;  // see Rows
};

// Whether products of many rows with it take their rows in tiles.
bool takes_tiles(const Matrix& matrix);

// y = x W^T + b, in bf16 with fp32 accumulation.
void linear(Team& team, const Matrix& matrix, const Rows<const bf16>& x, const Results& y,
            int64_t num_tokens);

// The same with weights and activations in int8.
void linear_int8(Team& team, const Matrix& matrix, const bf16* x, void* y, int64_t num_tokens);

// ---- attention.cpp, prefill.cpp; Python: attention.py

// What the layers of a slab share in one step. A query is a token that attends on its own (decode);
// a chunk is a run of tokens of one row that attend together (prefill).
struct Step {
  const int64_t* positions;     // [T]
  const int64_t* slots;         // [T] page * block_size + offset; below 0: not written
  const float* cos;             // [positions, H / 2]
  const float* sin;
  const int32_t* block_tables;  // [rows, table_stride]
  const int64_t* query_tokens;  // [num_queries] which token
  const int64_t* query_rows;    // [num_queries] which row of block_tables
  const int64_t* query_parts;   // [num_queries + 1] partitions of all queries before this one
  const int64_t* chunks;        // [num_chunks, 3]: row, first token, end token
  int64_t num_tokens, num_queries, num_chunks, table_stride;
  int64_t num_heads, num_kv_heads, head_dim, block_size;
  int64_t dtype, num_threads;
  double eps, scale;
};

struct AttentionCall {
  void* qkv;           // [T, (N + 2K) H]; queries and keys are normed and rotated in place
  void* keys;          // [pages, K, block_size, H]
  void* values;        // as keys
  const void* q_norm;  // [H], or null
  const void* k_norm;
  void* out;           // [T, N H]; written at the tokens of queries and chunks
};

inline const int32_t* table_of(const Step& step, int64_t row) {
  return step.block_tables + row * step.table_stride;
}

// Index of the first element of a cached token in keys or values.
inline int64_t cached_at(const Step& step, const int32_t* table, int64_t kv_head,
                         int64_t position) {
  const int64_t block = step.block_size;
  const int64_t page = table[position / block];
  return ((page * step.num_kv_heads + kv_head) * block + position % block) * step.head_dim;
}

void attention(Team& team, const Step& step, const AttentionCall& call);

// The chunks' part of attention; bf16 only.
void attend_chunks(Team& team, const Step& step, const AttentionCall& call);

// Scores to probabilities: scores[i] = exp(scores[i] * scale - largest) for i < n, zero up to the
// next multiple of 16.
void softmax(float* scores, int64_t n, float scale, float* largest, float* total);

}  // namespace sortserve
