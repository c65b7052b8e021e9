// y = x W^T + b in bf16 with fp32 accumulation, for CPUs with AVX-512 BF16. Weights are packed in
// panels (tile.h), so that a step over few tokens streams them once, in order. A token's result
// does not depend on the tokens beside it.

#include "kernels.h"
#include "tile.h"

namespace sortserve {

struct LinearCall {
  Matrix matrix;
  const bf16* x;  // [num_tokens, num_inputs]
  void* y;        // [num_tokens, num_outputs]
  int64_t num_tokens, num_threads;
};

#if defined(SORTSERVE_HAS_TILE)

// One row of one panel: bias, activation, rounding.
static void write_outputs(const Matrix& matrix, void* y, int64_t token, int64_t panel, f32x16 a,
                          f32x16 b) {
  if (matrix.bias != nullptr) {
    a += load(matrix.bias + panel * kPanel);
    b += load(matrix.bias + panel * kPanel + 16);
  }
  if (matrix.output == kSiluMul) {
    const int64_t first = panel * 16;
    bf16* out = static_cast<bf16*>(y) + token * matrix.num_outputs + first;
    return store(out, silu(a) * b, matrix.num_outputs - first);
  }
  const int64_t first = panel * kPanel, left = matrix.num_outputs - first;
  const auto both = [&](auto* out) {
    out += token * matrix.num_outputs + first;
    store(out, a, left);
    if (left > 16) store(out + 16, b, left - 16);
  };
  matrix.output == kFp32 ? both(static_cast<float*>(y)) : both(static_cast<bf16*>(y));
}

void linear(Team& team, const Matrix& matrix, const bf16* x, void* y, int64_t num_tokens) {
  const int64_t width = matrix.output == kSiluMul ? kPanel / 2 : kPanel;
  const int64_t num_panels = (matrix.num_outputs + width - 1) / width;
  const int64_t num_tiles = (num_tokens + kMaxRows - 1) / kMaxRows;
  const int64_t pairs = matrix.num_inputs / 2;
  const int64_t grain = std::max<int64_t>(1, num_panels / (team.num_threads() * 4));
  // The first tile of a panel waits for memory; the second and third, which do not, fetch the next
  // panel, half each. Hence also grains of neighbouring panels.
  team.parallel_for(num_panels, grain, [&](int64_t panel) {
    const bf16* weights = static_cast<const bf16*>(matrix.packed) + panel * pairs * 2 * kPanel;
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t first = i * num_tokens / num_tiles;
      const int64_t num_rows = (i + 1) * num_tokens / num_tiles - first;
      multiply_rows(num_rows, x + first * matrix.num_inputs, matrix.num_inputs, weights, pairs,
                    [&](int64_t m, f32x16 a, f32x16 b) {
                      write_outputs(matrix, y, first + m, panel, a, b);
                    },
                    i == 1 || i == 2 ? weights + (i + 1) * pairs * kPanel : nullptr);
    }
  });
}

extern "C" int64_t sortserve_has_bf16_kernels() { return 1; }

#else

void linear(Team&, const Matrix&, const bf16*, void*, int64_t) {}

extern "C" int64_t sortserve_has_bf16_kernels() { return 0; }

#endif

extern "C" void sortserve_linear(const LinearCall* call) {
  Team::run(call->num_threads, [&](Team& team) {
    linear(team, call->matrix, call->x, call->y, call->num_tokens);
  });
}

}  // namespace sortserve
