// A run of decoder layers in one call: bf16. Python: stack.py.
//
// The residual stream is h + delta; the addition is left to the next norm, which reads both anyway.

#include "kernels.h"

namespace sortserve {
namespace {

struct Layer {
  const void *input_norm, *post_attention_norm;  // [hidden]
  const void *q_norm, *k_norm;                   // [H], or null
  Matrix qkv, o, gate_up, down;
};

struct LayersCall {
  const Layer* layers;         // the first layer to run
  const int64_t* places;       // [num_layers, 2] of each its step, and its plane in pages
  const Step* steps;           // one per slab
  bf16* pages;                 // [planes, 2, pages, K, block_size, H]
  bf16 *h, *delta;             // [T, hidden], updated
  // Workspaces of T tokens up to a whole tile: [hidden], [(N + 2K) H], [N H], [intermediate].
  bf16 *x, *qkv, *heads, *mlp;
  int64_t num_layers, hidden_size;
  int64_t plane_size;          // elements of keys (or values) of one layer
};

// Rows of fewer tokens stay in the first cache however they lie.
constexpr int64_t kMinTokensInTiles = 64;

// As linear(), whatever the format; rows in tiles are for plain matrices alone.
void multiply(Team& team, const Matrix& matrix, const Rows<const bf16>& x, const Results& y,
              int64_t num_tokens) {
  if (matrix.format == kInt8) return linear_int8(team, matrix, x.data, y.data, num_tokens);
  linear(team, matrix, x, y, num_tokens);
}

void run_layer(Team& team, const LayersCall& call, const Layer& layer, const Step& step,
               bf16* keys) {
  const int64_t num_tokens = step.num_tokens;
  const auto norm = [&](const void* weight, const Matrix& reader) -> Rows<const bf16> {
    const bool in_tiles = num_tokens >= kMinTokensInTiles && takes_tiles(reader);
    add_rms_norm(team, {call.h, call.delta, weight, call.x, num_tokens, call.hidden_size,
                        kBfloat16, step.num_threads, step.eps}, in_tiles);
    return {call.x, call.hidden_size, in_tiles};
  };
  Rows<const bf16> x = norm(layer.input_norm, layer.qkv);
  multiply(team, layer.qkv, x, {call.qkv}, num_tokens);
  attention(team, step,
            {call.qkv, keys, keys + call.plane_size, layer.q_norm, layer.k_norm, call.heads});
  multiply(team, layer.o, {call.heads, layer.o.num_inputs}, {call.delta}, num_tokens);
  x = norm(layer.post_attention_norm, layer.gate_up);
  const bool mlp_in_tiles = x.in_tiles && takes_tiles(layer.down);
  multiply(team, layer.gate_up, x, {call.mlp, mlp_in_tiles}, num_tokens);
  multiply(team, layer.down, {call.mlp, layer.down.num_inputs, mlp_in_tiles}, {call.delta},
           num_tokens);
}

}  // namespace

extern "C" void sortserve_layers(const LayersCall* call) {
  Team::run(call->steps->num_threads, [&](Team& team) {
    for (int64_t i = 0; i < call->num_layers; ++i) {
      const int64_t *place = call->places + 2 * i;
      run_layer(team, *call, call->layers[i], call->steps[place[0]],
                call->pages + place[1] * 2 * call->plane_size);
    }
  });
}

}  // namespace sortserve
